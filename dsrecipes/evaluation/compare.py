"""What did training change? Base against tuned, or runs against the first, item by item: dsrecipes compare RUN [RUN ...]

dsrecipes compare last
dsrecipes compare runs/gpt2_clm/A runs/gpt2_clm/B --dataset story.txt
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from dsrecipes.errors import UserError, plural
from dsrecipes.evaluation.evaluate import Evaluation, add_flags, progress_console, write_out
from dsrecipes.evaluation.tasks import Settings
from dsrecipes.inference.device import memory_errors
from dsrecipes.inference.finished import open_run
from dsrecipes.io.arguments import CommandParser, check_out

if TYPE_CHECKING:
    from dsrecipes.evaluation.metrics import Metric
    from dsrecipes.io.console import Console

Json = dict[str, Any]
_OVERLAPS = 5
"""Number of overlapping rows that are printed; --out has all."""


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
    """Compare one run's base with its tuned model, or several runs with the first, on the same items.

    Args:
        runs: run folders' paths, or `last`.
        seed: of the bootstrap.
        dataset, split, task, skip_bad_rows, console, device, settings: as `evaluate` takes them.

    Raises:
        UserError: no such run, rows or task, or runs that are measured on different items.
    """
    options = Settings(**settings)
    evaluations = [Evaluation(open_run(run, device), dataset, split, task, skip_bad_rows, options, console) for run in runs]
    if len(evaluations) == 1:
        results = [evaluations[0].run_on(base=True), evaluations[0].run_on(base=False)]
    else:
        results = [evaluation.run_on(base=False) for evaluation in evaluations]
    pairs = [pair(results[0], other, seed) for other in results[1:]]
    return {"results": results, "pairs": pairs, "overlaps": [overlap(evaluation) for evaluation in evaluations]}


def pair(first: Json, second: Json, seed: int = 0) -> Json:
    """The second result minus the first.

    Raises:
        UserError: the two have different items, or count their tokens differently.
    """
    from dsrecipes.evaluation.metrics import compared_metrics

    _refuse_different(first, second)
    task = first["task"]
    result: Json = {"first": _name(first), "second": _name(second), "task": task, "rows": first["rows"]}
    result["differences"] = {
        metric.name: _difference(first["items"], second["items"], metric, seed) for metric in compared_metrics(task)
    }
    if task == "choices":
        result |= _flips(first["items"], second["items"]) | {"by_subject": _by_subject(first, second)}
    return result


def _name(result: Json) -> str:
    return f"{result['run']} ({result['weights']})"


def _refuse_different(first: Json, second: Json) -> None:
    """Raise where the two results are not of the same items (their keys say so)."""
    names = f"{first['run']} and {second['run']}"
    # Items are paired by position, so their order must be the same too.
    keys = [[item["key"] for item in result["items"]] for result in (first, second)]
    if first["task"] != second["task"]:
        raise UserError("DSR478", f"{names} are measured by {first['task']} and {second['task']}: give --task")
    if keys[0] == keys[1]:
        return
    # The key of a sequence is its token ids, which another tokenizer or --max_length changes.
    if first["task"] == "loss" and first["dataset"] == second["dataset"]:
        raise UserError(
            "DSR479", f"{names} cut the same data into different tokens or blocks: losses cannot be compared item by item"
        )
    raise UserError("DSR480", f"{names} held out different rows: name the rows to measure both on with --dataset")


def _difference(first: list[Json], second: list[Json], metric: Metric, seed: int) -> Json:
    """The mean of each, their difference, and its 95% bootstrap interval."""
    from dsrecipes.evaluation.statistics import paired_interval

    values = [metric.values(first), metric.values(second)]
    weights = [metric.weights(first), metric.weights(second)]
    # Differences are resampled, not the two results: items that are hard for both add no uncertainty.
    if (weights[0] == weights[1]).all():
        low, high = paired_interval(values[1] - values[0], weights[1], seed=seed)
    else:
        # Two classifiers that were trained with other --class_weights: each mean has its own weights, as in evaluate.
        low, high = paired_interval(values[1], weights[1], against=(values[0], weights[0]), seed=seed)
    means = [metric.mean(first), metric.mean(second)]
    return {
        "first": means[0],
        "second": means[1],
        "difference": means[1] - means[0],
        "low": low,
        "high": high,
        "shown": not low <= 0 <= high,
    }


def _flips(first: list[Json], second: list[Json]) -> Json:
    """The questions that only one got right, and the p value of McNemar's test on their numbers."""
    from dsrecipes.evaluation.statistics import mcnemar

    flips: dict[str, list[Json]] = {"only_first": [], "only_second": []}
    for item, other in zip(first, second, strict=True):
        if item["acc"] != other["acc"]:
            flip = {key: item[key] for key in ("item", "subject", "question", "options", "answer")}
            flip |= {"first": item["predicted"], "second": other["predicted"]}
            flips["only_first" if item["acc"] else "only_second"].append(flip)
    return {"mcnemar_p": mcnemar(*map(len, flips.values()))} | flips


def _by_subject(first: Json, second: Json) -> dict[str, Json]:
    tables = [result["figures"]["accuracy_by_subject"] for result in (first, second)]
    return {
        name: {"first": row["accuracy"], "second": tables[1][name]["accuracy"], "questions": row["questions"]}
        for name, row in tables[0].items()
    }


def overlap(evaluation: Evaluation) -> Json:
    """Find measured rows that are in the run's training rows too.

    Returns:
        run, the number of measured rows, and `met`: pairs {"item", "training row"} of places.
    """
    from dsrecipes.evaluation.rows import EvaluationRows, contents, counted

    trained: dict[str, str] = {}
    # Rows are compared by content: a copy may be in another file, under another number.
    for item in counted(EvaluationRows(evaluation.run).items("train"), evaluation.task):
        for content in contents(item.record):
            trained.setdefault(content, item.where)
    measured = evaluation.items()
    met = [
        {"item": item.where, "training row": trained[content]}
        for item in measured
        for content in contents(item.record)
        if content in trained
    ]
    return {"run": str(evaluation.run.folder.path), "rows": len(measured), "met": met}


def lines(result: Json, samples: int) -> Iterator[str]:
    """Yield a comparison as text, line by line."""
    head = result["results"][0]
    yield f"data      {plural(head['rows'], 'row')} of {head['split']} · {head['dataset']} · task {head['task']}"
    for facts in result["overlaps"]:
        yield from _overlap_lines(facts)
    for compared, second in zip(result["pairs"], result["results"][1:], strict=True):
        yield f"\nfirst     {compared['first']}\nsecond    {compared['second']}"
        yield f"{'':<14}{'first':>10}{'second':>10}{'difference':>12}   95% interval"
        for name, row in compared["differences"].items():
            interval = f"{row['low']:+.4f} to {row['high']:+.4f}"
            verdict = "" if row["shown"] else "   no difference shown"
            numbers = f"{row['first']:>10.4f}{row['second']:>10.4f}{row['difference']:>+12.4f}"
            yield f"{name:<14}{numbers}   {interval}{verdict}"
        if compared["task"] == "choices":
            yield from _choice_lines(compared, samples)
        if compared["task"] == "answers":
            yield from _answer_lines(head["items"], second["items"], samples)


def _overlap_lines(facts: Json) -> Iterator[str]:
    met = facts["met"]
    if not met:
        yield f"overlap   none: no measured row is in the training rows of {facts['run']}"
        return
    measured = plural(facts["rows"], "measured row")
    yield f"overlap   {len({row['item'] for row in met})} of {measured} in the training rows of {facts['run']}:"
    yield from (f"          {row['item']}  =  {row['training row']}" for row in met[:_OVERLAPS])
    if len(met) > _OVERLAPS:
        yield f"          and {len(met) - _OVERLAPS} more (--out lists all)"


def _choice_lines(compared: Json, samples: int) -> Iterator[str]:
    counts = [len(compared[name]) for name in ("only_first", "only_second")]
    p_value = compared["mcnemar_p"]
    verdict = "" if p_value < 0.05 else " (no difference shown)"
    yield (
        f"flipped   {counts[0]} right in the first alone, {counts[1]} in the second alone · McNemar's exact test p = "
        f"{p_value:.4g}{verdict}"
    )
    yield f"\n{'subject':<48}{'first':>8}{'second':>8}{'questions':>11}"
    for name, row in compared["by_subject"].items():
        yield f"{name:<48}{row['first']:>8.3f}{row['second']:>8.3f}{row['questions']:>11,}"
    for name, title in (("only_first", "right in the first alone"), ("only_second", "right in the second alone")):
        for flip in compared[name][:samples]:
            yield f"\n{title} · {flip['subject']} · {flip['item']}\n  {flip['question']}"
            yield from (f"  {letter}. {text}" for letter, text in zip("ABCD", flip["options"], strict=True))
            yield f"  answer {flip['answer']}, first {flip['first']}, second {flip['second']}"


def _answer_lines(first: Iterable[Json], second: Iterable[Json], samples: int) -> Iterator[str]:
    for number, (item, other) in enumerate(zip(first, second, strict=True)):
        if number == samples:
            return
        yield f"\n{item['item']}\nprompt    {item['prompt'].strip()}\nreference {item['reference']}"
        yield f"first     {item['answer']}\nsecond    {other['answer']}"


def main(argv: list[str]) -> int:
    """`dsrecipes compare RUN [RUN ...] [flags]`."""
    parser = CommandParser("compare", "Base against tuned, or several runs against the first, on the same items.")
    parser.add_argument(
        "runs", nargs="+", metavar="run", help="run folders, or last; of one run base and tuned are compared"
    )
    add_flags(parser)
    parser.add_argument("--seed", type=int, default=0, help="random seed of the bootstrap (default: 0)")
    parser.add_argument("--samples", type=int, default=5, help="flipped questions or answers to print (default: 5)")
    flags = vars(parser.parse_args(argv))
    out, samples = flags.pop("out"), flags.pop("samples")
    check_out(out)
    result = compare(*flags.pop("runs"), console=progress_console(), **flags)
    print("\n".join(lines(result, samples)))
    write_out(out, result)
    return 0
