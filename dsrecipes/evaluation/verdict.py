"""What is a judge asked, how is its reply read, and how are verdicts in both orders counted?"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dsrecipes.errors import UserError, plural
from dsrecipes.io.paths import user_path
from dsrecipes.io.text import read_text

RUBRIC = Path(__file__).with_name("judge_rubric.txt")
"""The default rubric, which a user copies and changes."""
PLACEHOLDERS = ("question", "answer_a", "answer_b")
ORDERS = ("run first", "other first")
"""Orders of a pair: whose answer is A."""
_PLACEHOLDER = re.compile("|".join(rf"\{{{name}\}}" for name in PLACEHOLDERS))
_VERDICT = re.compile(r"VERDICT: (A|B|TIE)")
REMINDER = "\n\nYour reply must end with one line that is VERDICT: A or VERDICT: B or VERDICT: TIE, and nothing else."
"""Follows the rubric when a reply had no verdict."""


def read_rubric(path: str | None) -> str:
    """Read the rubric's text.

    Raises:
        UserError: no such file, or it lacks a placeholder or the verdict's form.
    """
    try:
        file = user_path(path) if path else RUBRIC
        text = read_text(file)
    except UserError as error:
        raise error.at("--rubric") from error
    for part in (*(f"{{{name}}}" for name in PLACEHOLDERS), "VERDICT:"):
        if part not in text:
            raise UserError("DSR496", f"--rubric {file}: {part} is missing; start from a copy of {RUBRIC}")
    return text


def fill(rubric: str, question: str, answer_a: str, answer_b: str) -> str:
    """Fill all placeholders of the rubric at once, so that braces in an answer are not taken for one."""
    values = {"{question}": question, "{answer_a}": answer_a, "{answer_b}": answer_b}
    return _PLACEHOLDER.sub(lambda match: values[match[0]], rubric)


def read_verdict(reply: str) -> str | None:
    """A, B or TIE where the last line is `VERDICT: ...` and no other line gives another; else None."""
    lines = [line.strip() for line in reply.splitlines() if line.strip()]
    matches = [_VERDICT.fullmatch(line) for line in lines]
    verdicts = {match[1] for match in matches if match}
    # A judge may quote the form before it decides; two different verdicts count as none.
    return verdicts.pop() if len(verdicts) == 1 and matches[-1] else None


def winner(order: str, verdict: str | None) -> str | None:
    """run, other or tie; None where there is no verdict."""
    if verdict is None:
        return None
    if verdict == "TIE":
        return "tie"
    return "run" if (verdict == "A") == (order == ORDERS[0]) else "other"


def wilson(share: float, count: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval (1927), 95 % by default; with ties as halves it is, if anything, too wide.

    Args:
        share: 0 to 1.
        count: pairs.
        z: the normal quantile of the coverage.
    """
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def tally(judgements: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Count wins, losses, ties, inconsistent and unparsed pairs, with the win rate and its interval.

    A win needs both orders; a pair whose orders disagree counts as a tie, and is reported apart (position bias,
    arXiv:2306.05685). A pair without a verdict in one order is unparsed, and not in the win rate.
    """
    pairs: dict[int, dict[str, str | None]] = {}
    verdicts: Counter[str | None] = Counter()
    for judgement in judgements:
        order, verdict = judgement["order"], judgement["verdict"]
        pairs.setdefault(judgement["item"], {})[order] = winner(order, verdict)
        # Equal answers are a tie without a judge, which says nothing about its position bias.
        verdicts[verdict if judgement.get("requests") else None] += 1
    counts = dict.fromkeys(("wins", "losses", "ties", "inconsistent", "unparsed"), 0)
    for pair in pairs.values():
        counts[_outcome({pair.get(order) for order in ORDERS})] += 1
    judged = sum(counts.values()) - counts["unparsed"]
    # A tie is half a win, so that 50 % means no difference.
    rate = (counts["wins"] + (counts["ties"] + counts["inconsistent"]) / 2) / judged if judged else None
    return {
        "items": len(pairs),
        **counts,
        "win_rate": rate,
        "win_rate_95": list(wilson(rate, judged)) if rate is not None else None,
        "verdicts": {name: verdicts[name] for name in ("A", "B", "TIE")},
    }


def _outcome(winners: set[str | None]) -> str:
    """Classify a pair by the winners in both orders."""
    if None in winners:
        return "unparsed"
    if len(winners) > 1:
        return "inconsistent"
    return {"run": "wins", "other": "losses", "tie": "ties"}[str(winners.pop())]


def summary_text(result: dict[str, Any], against: str) -> str:
    """The result as text, in several lines."""
    other = {"base": "the base model", "reference": "the rows' own answers"}.get(against, against)
    lines = [
        f"against   {other} · {plural(result['items'], 'item')}, each in both orders",
        f"result    {plural(result['wins'], 'win')} · {plural(result['losses'], 'loss')} · {plural(result['ties'], 'tie')} · "
        f"{result['inconsistent']} inconsistent (the orders disagree: counted as ties) · {result['unparsed']} unparsed",
    ]
    if result["win_rate"] is None:
        lines.append(
            "win rate  none: no pair has a verdict in both orders; take a judge that follows the rubric's last line"
        )
    else:
        low, high = result["win_rate_95"]
        shown = "" if low > 0.5 or high < 0.5 else " · no difference shown"
        lines.append(
            f"win rate  {result['win_rate']:.1%}, 95 % interval {low:.1%} to {high:.1%} (Wilson, ties as halves){shown}"
        )
    verdicts = result["verdicts"]
    lines.append(
        f"verdicts  A {verdicts['A']} · B {verdicts['B']} · TIE {verdicts['TIE']} (a judge without position bias has A near B)"
    )
    tokens = (
        f"{name} tokens {'not reported by the server' if result[key] is None else format(result[key], ',')}"
        for name, key in (("prompt", "prompt_tokens"), ("reply", "completion_tokens"))
    )
    lines.append(f"cost      {plural(result['requests'], 'request')} · {' · '.join(tokens)}")
    return "\n".join([*lines, f"record    {result['out']}"])
