"""What a judge is asked, the verdict read from its reply, and verdicts in both orders counted."""

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
"""The default rubric; a copy of it is where a user's own starts."""
PLACEHOLDERS = ("question", "answer_a", "answer_b")
ORDERS = ("run first", "other first")
"""Whose answer stands as A."""
_PLACE = re.compile("|".join(rf"\{{{name}\}}" for name in PLACEHOLDERS))
_VERDICT = re.compile(r"VERDICT: (A|B|TIE)")
REMINDER = "\n\nYour reply must end with one line that is VERDICT: A or VERDICT: B or VERDICT: TIE, and nothing else."
"""Stands behind the rubric when a reply had no verdict."""


def read_rubric(path: str | None) -> str:
    """The rubric's text.

    Raises:
        UserError: no such file, or it lacks a placeholder or the verdict's form.
    """
    try:
        file = user_path(path) if path else RUBRIC
        text = read_text(file)
    except UserError as error:
        raise UserError(f"--rubric {error}") from error
    for name in (*(f"{{{each}}}" for each in PLACEHOLDERS), "VERDICT:"):
        if name not in text:
            raise UserError(f"--rubric {file}: {name} is missing; start from a copy of {RUBRIC}")
    return text


def fill(rubric: str, question: str, answer_a: str, answer_b: str) -> str:
    """The rubric with all placeholders filled at once: braces in an answer stay what they are."""
    values = {"{question}": question, "{answer_a}": answer_a, "{answer_b}": answer_b}
    return _PLACE.sub(lambda found: values[found[0]], rubric)


def read_verdict(reply: str) -> str | None:
    """A, B or TIE where the last line is `VERDICT: ...` and no other line says another; else None."""
    lines = [line.strip() for line in reply.splitlines() if line.strip()]
    told = {found[1] for line in lines if (found := _VERDICT.fullmatch(line))}
    return told.pop() if len(told) == 1 and _VERDICT.fullmatch(lines[-1]) else None


def winner(order: str, verdict: str | None) -> str | None:
    """run, other or tie; None where there is no verdict."""
    if verdict is None:
        return None
    if verdict == "TIE":
        return "tie"
    return "run" if (verdict == "A") == (order == ORDERS[0]) else "other"


def wilson(share: float, count: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of `count`; with ties as halves it is, if anything, too wide."""
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def tally(judgements: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Wins, losses, ties, inconsistent and unparsed pairs, and the win rate with its interval.

    A win needs both orders; a pair whose orders disagree is a tie of its own kind (position bias, arXiv:2306.05685).
    A pair without a verdict in one order is unparsed, and is in no rate.
    """
    pairs: dict[int, dict[str, str | None]] = {}
    places: Counter[str | None] = Counter()
    for each in judgements:
        pairs.setdefault(each["item"], {})[each["order"]] = winner(each["order"], each["verdict"])
        places[each["verdict"] if each.get("requests") else None] += 1
    counts = dict.fromkeys(("wins", "losses", "ties", "inconsistent", "unparsed"), 0)
    for pair in pairs.values():
        found = {pair.get(order) for order in ORDERS}
        kind = "unparsed" if None in found else "inconsistent" if len(found) > 1 else str(found.pop())
        counts[{"run": "wins", "other": "losses", "tie": "ties"}.get(kind, kind)] += 1
    judged = sum(counts.values()) - counts["unparsed"]
    rate = (counts["wins"] + (counts["ties"] + counts["inconsistent"]) / 2) / judged if judged else None
    return {
        "items": len(pairs), **counts, "win_rate": rate, "win_rate_95": list(wilson(rate, judged)) if judged else None,
        "verdicts": {name: places[name] for name in ("A", "B", "TIE")},
    }  # fmt: skip


def words(result: dict[str, Any], against: str) -> str:
    """The result for a person."""
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
        f"verdicts  A {verdicts['A']} · B {verdicts['B']} · TIE {verdicts['TIE']} (a judge without a bias to a place has A near B)"
    )
    tokens = (
        f"{name} tokens {'not told by the server' if result[key] is None else format(result[key], ',')}"
        for name, key in (("prompt", "prompt_tokens"), ("reply", "completion_tokens"))
    )
    lines.append(f"cost      {plural(result['requests'], 'request')} · {' · '.join(tokens)}")
    return "\n".join([*lines, f"record    {result['out']}"])
