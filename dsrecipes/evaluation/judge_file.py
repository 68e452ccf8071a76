"""The record of a judge's work: answers, judgements and what they cost."""

from __future__ import annotations

from pathlib import Path

from dsrecipes.evaluation.judge_models import Reply
from dsrecipes.evaluation.verdict import ORDERS, tally
from dsrecipes.inference.job_file import Json, ResumableJsonl, text_in

_COSTS = ("requests", "prompt_tokens", "completion_tokens")


class JudgeFile(ResumableJsonl):
    """The answers and judgements so far, and where more are appended."""

    def __init__(self, path: Path, job: Json, about: Json | None = None) -> None:
        """As ResumableJsonl."""
        super().__init__(path, "judge", job, about)
        self.answers: dict[tuple[int, str], str] = {}
        self.judgements: dict[tuple[int, str], Json] = {}
        self.checks: list[Json] = []

    def take(self, line: Json) -> None:
        """Sort a line by its kind."""
        if line["kind"] == "answer":
            self.answers[line["item"], line["of"]] = text_in(line, "text")
            return
        if any(not isinstance(line.get(name), int | None) for name in _COSTS):
            raise TypeError(_COSTS)
        if line["kind"] == "judgement":
            if line["verdict"] not in ("A", "B", "TIE", None) or line["order"] not in ORDERS:
                raise TypeError(line["verdict"])
            self.judgements[line["item"], line["order"]] = line
        elif line["kind"] == "check":
            self.checks.append(line)

    def summary(self) -> Json:
        """All judgements counted, and their cost."""
        cost = _total([*self.checks, *self.judgements.values()])
        return {**tally(self.judgements.values()), **cost, "out": str(self.path)}


def cost_of(replies: list[Reply]) -> Json:
    """Requests and tokens of replies."""
    return _total([{"requests": 1, **vars(each)} for each in replies])


def _total(costs: list[Json]) -> Json:
    """None for tokens that a server did not tell."""
    told: Json = {}
    for name in _COSTS:
        counts = [each.get(name) for each in costs]
        told[name] = None if None in counts else sum(counts)
    return told
