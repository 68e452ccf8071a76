"""Base against tuned, or runs against the first, item by item: dsrecipes compare RUN [RUN ...].

dsrecipes compare last
dsrecipes compare runs/gpt2_clm/A runs/gpt2_clm/B --dataset story.txt
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from dsrecipes.errors import UserError, plural
from dsrecipes.evaluation.evaluate import Evaluation, add_flags, shown, write_out
from dsrecipes.inference.device import memory_errors
from dsrecipes.inference.finished import open_run
from dsrecipes.io.arguments import CommandParser, check_out

if TYPE_CHECKING:
    from dsrecipes.io.console import Console

Json = dict[str, Any]
_FIGURE = {"loss": ("loss",), "choices": ("acc",), "answers": ("rouge_l", "exact_match"), "labels": ("loss",)}
"""What is compared in each task: a key of its items."""


@memory_errors("a smaller --batch_size")
def compare(
    *runs: str,
    dataset: str | None = None,
    split: str | None = None,
    task: str | None = None,
    skip_bad_rows: bool = False,
    seed: int = 0,
    console: Console | None = None,
    device: str = "auto",
    **settings: Any,
) -> Json:
    """One run's base against its tuned model, or several runs against the first, on the same items.

    Args:
        runs: run folders' paths, or `last`.
        seed: of the bootstrap.
        dataset, split, task, skip_bad_rows, console, device, settings: as evaluate takes them.

    Raises:
        UserError: no such run, rows or task, or runs that were not asked the same.
    """
    from dsrecipes.evaluation.measure import Settings

    told = Settings(**settings)
    prepared = [Evaluation(open_run(run, device), dataset, split, task, skip_bad_rows, told, console) for run in runs]
    if len(prepared) == 1:
        results = [prepared[0].of(base=True), prepared[0].of(base=False)]
    else:
        results = [each.of(base=False) for each in prepared]
    pairs = [pair(results[0], other, seed) for other in results[1:]]
    return {"results": results, "pairs": pairs, "overlaps": [overlap(each) for each in prepared]}


def pair(first: Json, second: Json, seed: int = 0) -> Json:
    """The second result minus the first.

    Raises:
        UserError: the two have other items, or count their tokens otherwise.
    """
    _refuse_unlike(first, second)
    told: Json = {"first": _name(first), "second": _name(second), "task": first["task"], "rows": first["rows"]}
    by_row = first["task"] == "labels"
    told["differences"] = {
        name: _difference(first["items"], second["items"], name, seed, by_row) for name in _FIGURE[first["task"]]
    }
    if first["task"] == "choices":
        told |= _flips(first["items"], second["items"]) | {"by_subject": _by_subject(first, second)}
    return told


def _name(result: Json) -> str:
    return f"{result['run']} ({result['weights']})"


def _refuse_unlike(first: Json, second: Json) -> None:
    keys = [[item["key"] for item in result["items"]] for result in (first, second)]
    if first["task"] != second["task"]:
        raise UserError(
            f"{first['run']} and {second['run']} are measured by {first['task']} and {second['task']}: give --task"
        )
    if keys[0] == keys[1]:
        return
    if first["task"] == "loss" and first["dataset"] == second["dataset"]:
        raise UserError(
            f"{first['run']} and {second['run']} cut the same data into other tokens or blocks, so their losses cannot be "
            "compared item by item"
        )
    raise UserError(
        f"{first['run']} and {second['run']} kept other rows aside: name the rows that both are to be measured on with --dataset"
    )


def _difference(first: list[Json], second: list[Json], name: str, seed: int, by_row: bool) -> Json:
    """The mean of each, the difference, and where 95% of the bootstrap's differences lie.

    Args:
        by_row: the loss of an item is that of a row without its weight, and not a sum over tokens with their weights.
    """
    import numpy as np

    from dsrecipes.evaluation.measure import weight_of
    from dsrecipes.evaluation.statistics import paired_interval

    values = [np.array([item[name] for item in items]) for items in (first, second)]
    weights = np.array([weight_of(item) if name == "loss" else 1 for item in first])
    if by_row:
        values = [each * weights for each in values]
    low, high = paired_interval(values[1] - values[0], weights, seed=seed)
    means = [float(each.sum() / weights.sum()) for each in values]
    return {
        "first": means[0], "second": means[1], "difference": means[1] - means[0], "low": low, "high": high,
        "shown": not low <= 0 <= high,
    }  # fmt: skip


def _flips(first: list[Json], second: list[Json]) -> Json:
    """The questions that only one got right, and McNemar's test of their numbers."""
    from dsrecipes.evaluation.statistics import mcnemar

    flipped: dict[str, list[Json]] = {"only_first": [], "only_second": []}
    for one, other in zip(first, second, strict=True):
        if one["acc"] != other["acc"]:
            told = {key: one[key] for key in ("item", "subject", "question", "options", "answer")}
            told |= {"first": one["predicted"], "second": other["predicted"]}
            flipped["only_first" if one["acc"] else "only_second"].append(told)
    return {"mcnemar_p": mcnemar(*map(len, flipped.values()))} | flipped


def _by_subject(first: Json, second: Json) -> dict[str, Json]:
    tables = [result["figures"]["accuracy_by_subject"] for result in (first, second)]
    return {
        name: {"first": each["accuracy"], "second": tables[1][name]["accuracy"], "questions": each["questions"]}
        for name, each in tables[0].items()
    }


def overlap(evaluation: Evaluation) -> Json:
    """Which of the measured rows stand in the run's training rows too: [{"item", "training row"}]."""
    from dsrecipes.evaluation.rows import EvaluationRows, contents

    trained = EvaluationRows(evaluation.run)
    known: dict[str, str] = {}
    for item in trained.items("train"):
        for content in contents(item.record):
            known.setdefault(content, item.where)
    measured = evaluation.rows.items(evaluation.split)
    if evaluation.task != "loss":
        measured = measured[: evaluation.settings.limit]
    met = [
        {"item": item.where, "training row": known[content]}
        for item in measured
        for content in contents(item.record)
        if content in known
    ]
    return {"run": str(evaluation.run.folder.path), "rows": len(measured), "met": met}


def lines(result: Json, samples: int) -> Iterator[str]:
    """What a person reads of a comparison."""
    head = result["results"][0]
    yield f"data      {plural(head['rows'], 'row')} of {head['split']} · {head['dataset']} · task {head['task']}"
    for told in result["overlaps"]:
        yield from _overlap_lines(told)
    for told, second in zip(result["pairs"], result["results"][1:], strict=True):
        yield f"\nfirst     {told['first']}\nsecond    {told['second']}"
        yield f"{'':<14}{'first':>10}{'second':>10}{'difference':>12}   95% interval"
        for name, each in told["differences"].items():
            span = f"{each['low']:+.4f} to {each['high']:+.4f}"
            verdict = "" if each["shown"] else "   no difference shown"
            yield f"{name:<14}{each['first']:>10.4f}{each['second']:>10.4f}{each['difference']:>+12.4f}   {span}{verdict}"
        if told["task"] == "choices":
            yield from _choice_lines(told, samples)
        if told["task"] == "answers":
            yield from _answer_lines(head["items"], second["items"], samples)


def _overlap_lines(told: Json) -> Iterator[str]:
    met = told["met"]
    if not met:
        yield f"overlap   none: no measured row stands in the training rows of {told['run']}"
        return
    yield f"overlap   {len({each['item'] for each in met})} of {plural(told['rows'], 'measured row')} in the training rows of {told['run']}:"
    yield from (f"          {each['item']}  =  {each['training row']}" for each in met[:5])
    if len(met) > 5:
        yield f"          and {len(met) - 5} more (--out lists all)"


def _choice_lines(told: Json, samples: int) -> Iterator[str]:
    counts = [len(told[name]) for name in ("only_first", "only_second")]
    yield (
        f"flipped   {counts[0]} right in the first alone, {counts[1]} in the second alone · McNemar's exact test p = "
        f"{told['mcnemar_p']:.4g}" + ("" if told["mcnemar_p"] < 0.05 else " (no difference shown)")
    )
    yield f"\n{'subject':<48}{'first':>8}{'second':>8}{'questions':>11}"
    for name, each in told["by_subject"].items():
        yield f"{name:<48}{each['first']:>8.3f}{each['second']:>8.3f}{each['questions']:>11,}"
    for name, said in (("only_first", "right in the first alone"), ("only_second", "right in the second alone")):
        for each in told[name][:samples]:
            yield f"\n{said} · {each['subject']} · {each['item']}\n  {each['question']}"
            yield from (f"  {letter}. {text}" for letter, text in zip("ABCD", each["options"], strict=True))
            yield f"  answer {each['answer']}, first {each['first']}, second {each['second']}"


def _answer_lines(first: Iterable[Json], second: Iterable[Json], samples: int) -> Iterator[str]:
    for number, (one, other) in enumerate(zip(first, second, strict=True)):
        if number == samples:
            return
        yield f"\n{one['item']}\nprompt    {one['prompt'].strip()}\nreference {one['reference']}"
        yield f"first     {one['answer']}\nsecond    {other['answer']}"


def main(argv: list[str]) -> int:
    """The command."""
    parser = CommandParser("compare", "Base against tuned, or several runs against the first, on the same items.")
    parser.add_argument(
        "runs", nargs="+", metavar="run", help="run folders, or last; of one run base and tuned are compared"
    )
    add_flags(parser)
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (default: 0)")
    parser.add_argument("--samples", type=int, default=5, help="flipped questions or answers to print (default: 5)")
    flags = vars(parser.parse_args(argv))
    out, samples = flags.pop("out"), flags.pop("samples")
    check_out(out)
    result = compare(*flags.pop("runs"), console=shown(), **flags)
    print("\n".join(lines(result, samples)))
    write_out(out, result)
    return 0
