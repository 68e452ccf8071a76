"""What has a judge done so far? Its file: answers, judgements and what they cost."""

from __future__ import annotations

from pathlib import Path

from dsrecipes.evaluation.judge_models import Reply
from dsrecipes.evaluation.verdict import ORDERS, tally
from dsrecipes.inference.job_file import Json, ResumableJsonl, text_in

_COSTS = ("requests", "prompt_tokens", "completion_tokens")


class JudgeFile(ResumableJsonl):
    """Answers and judgements of earlier calls and this one."""

    def __init__(self, path: Path, job: Json, about: Json | None = None) -> None:
        """Start without answers; the arguments are those of ResumableJsonl."""
        super().__init__(path, "judge", job, about)
        self.answers: dict[tuple[int, str], str] = {}
        self.judgements: dict[tuple[int, str], Json] = {}
        self.checks: list[Json] = []

    def load_line(self, line: Json) -> None:
        """Take an answer, a judgement or the cost of a check."""
        if line["kind"] == "answer":
            self.answers[line["item"], line["of"]] = text_in(line, "text")
            return
        if any(not isinstance(line.get(name), int | None) for name in _COSTS):
            raise TypeError(_COSTS)
        if line["kind"] == "judgement":
            # A file that was edited by hand is reported as damaged instead of counted.
            if line["verdict"] not in ("A", "B", "TIE", None) or line["order"] not in ORDERS:
                raise TypeError(line["verdict"])
            self.judgements[line["item"], line["order"]] = line
        elif line["kind"] == "check":
            self.checks.append(line)

    def summary(self) -> Json:
        """Counts of all judgements, and their cost."""
        cost = _total([*self.checks, *self.judgements.values()])
        return {**tally(self.judgements.values()), **cost, "out": str(self.path)}


def cost_of(replies: list[Reply]) -> Json:
    """Requests and tokens of replies."""
    return _total([{"requests": 1, **vars(reply)} for reply in replies])


def _total(costs: list[Json]) -> Json:
    """Sum costs; None for tokens that a server did not report."""
    total: Json = {}
    for name in _COSTS:
        counts = [cost.get(name) for cost in costs]
        total[name] = None if None in counts else sum(counts)
    return total
