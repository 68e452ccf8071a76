"""A finished run measured: dsrecipes evaluate RUN [--dataset D] [--task loss|choices|answers|labels] [--base].

dsrecipes evaluate last
dsrecipes evaluate last --dataset exam --num_fewshot 5
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsrecipes.config.sources import paths_of
from dsrecipes.errors import UserError, plural
from dsrecipes.evaluation.log_likelihood import FORMS
from dsrecipes.inference.device import add_device, memory_errors
from dsrecipes.inference.finished import FinishedRun, open_run
from dsrecipes.io.arguments import CommandParser, above_zero, check_out

if TYPE_CHECKING:
    from dsrecipes.evaluation.measure import Measure, Settings
    from dsrecipes.evaluation.rows import Item
    from dsrecipes.io.console import Console

Json = dict[str, Any]
TASKS = ("loss", "choices", "answers", "labels")


@memory_errors("a smaller --batch_size")
def evaluate(
    run: str,
    *,
    dataset: str | None = None,
    split: str | None = None,
    base: bool = False,
    task: str | None = None,
    skip_bad_rows: bool = False,
    console: Console | None = None,
    device: str = "auto",
    **settings: Any,
) -> Json:
    """A run's figures on its own held-out rows or another data set, and what each item got.

    Args:
        run: a run folder's path, or `last`.
        dataset: a file, folder or hub name; the run's own data where it is not given.
        split: test, validation or train; the first of these that is there.
        base: measure the model as it was before the run.
        task: loss, choices, answers or labels; what the recipe trains where it is not given.
        skip_bad_rows: leave out rows of `dataset` that cannot be read.
        console: shows progress; none where it is not given.
        device: cpu, cuda, cuda:N, or auto: a GPU where there is one, unless the run was trained with --use_cpu.
        settings: fields of dsrecipes.evaluation.measure.Settings.

    Raises:
        UserError: no such run, rows or task.
    """
    from dsrecipes.evaluation.measure import Settings

    prepared = Evaluation(open_run(run, device), dataset, split, task, skip_bad_rows, Settings(**settings), console)
    return prepared.of(base)


class Evaluation:
    """EvaluationRows of one split, ready to be put to a run's model, tuned or not."""

    def __init__(
        self,
        run: FinishedRun,
        dataset: str | None,
        split: str | None,
        task: str | None,
        skip_bad_rows: bool,
        settings: Settings,
        console: Console | None,
    ) -> None:
        from dsrecipes.evaluation.rows import EvaluationRows
        from dsrecipes.io.console import Console

        self.run, self.settings = run, settings
        self.console = console or Console(main=False)
        self.task = task or self._fitting()
        self._refuse_unfit(dataset)
        if self.task == "choices" and self._writes():
            from dsrecipes.evaluation.rows import QuestionRows

            self.rows: EvaluationRows | QuestionRows = QuestionRows(str(dataset), skip_bad_rows)
        else:
            self.rows = EvaluationRows(run, dataset, skip_bad_rows)
        self.split = self.rows.choose(split)
        self.measure, self.total = self._prepared()

    def _writes(self) -> bool:
        return self.run.recipe.auto_class.endswith("ForCausalLM")

    def _fitting(self) -> str:
        if self._writes():
            return "loss"
        return "labels" if self._classifies() else "choices"

    def _classifies(self) -> bool:
        return self.run.recipe.auto_class.endswith("ForSequenceClassification")

    def _refuse_unfit(self, dataset: str | None) -> None:
        name = self.run.config.layers.recipe.name
        for asked, known in ((self.task, TASKS), (self.settings.form, tuple(FORMS))):
            if asked not in known:
                raise UserError(f"{asked!r} is unknown; choose from {', '.join(known)}")
        if not (self._writes() or self._classifies()) and self.run.recipe.auto_class != "AutoModelForMultipleChoice":
            raise UserError(
                f"{name}: evaluate measures causal language models, multiple choice and classifiers, not a "
                f"{self.run.recipe.auto_class}"
            )
        if self._classifies() != (self.task == "labels"):
            raise UserError(f"--task {self.task}: a model of {name} is measured by --task {self._fitting()}")
        if not self._writes() and self.task not in ("choices", "labels"):
            raise UserError(f"--task {self.task}: a model of {name} answers questions with four options; --task choices")
        if self._writes() and self.task == "choices" and not dataset:
            raise UserError(
                "--task choices: name a file or folder of questions with --dataset (columns question,A,B,C,D,answer)"
            )
        if self.settings.num_fewshot and not (self._writes() and self.task == "choices"):
            raise UserError("--num_fewshot is for questions put to a model that writes: --task choices")

    def _prepared(self) -> tuple[Measure, int]:
        from dsrecipes.evaluation import measure
        from dsrecipes.evaluation.rows import EvaluationRows, QuestionRows

        if self.task == "loss":
            assert isinstance(self.rows, EvaluationRows)
            return measure.losses(self.run, self.rows.sequences(self.split, self.console), self.settings)
        items = self.items()
        if self.task == "answers":
            return measure.written(self.run, items, self.settings)
        if self.task == "labels":
            return measure.labels_by_head(self.run, items, self.settings)
        if not isinstance(self.rows, QuestionRows):
            return measure.choices_by_head(self.run, items, self.settings)
        shots = self.rows.shots(items, self.split, self.settings.num_fewshot)
        return measure.choices_by_likelihood(self.run, items, shots, self.settings)

    def items(self) -> list[Item]:
        """The rows of the split, up to the limit; those of weight 0 are left out, as in training."""
        found = [item for item in self.rows.items(self.split) if item.record.get("weight") != 0]
        if self.task == "labels":  # a hub data set may have rows without one
            found = [item for item in found if item.record.get("label", "") is not None]
        found = found[: self.settings.limit]
        if not found:
            raise UserError(f"{self.rows.name}: no rows in {self.split}")
        return found

    def _source(self) -> str:
        """Where the rows come from; a run may take its validation rows from another file."""
        data = self.run.config.data
        own = self.split == "validation" and self.rows.name == paths_of(data.sources)
        return (own and paths_of(data.eval_sources)) or self.rows.name

    def of(self, base: bool) -> Json:
        """Figures of the tuned model or the base."""
        from dsrecipes.evaluation.measure import figures, weight_of
        from dsrecipes.inference.labels import label_names

        model = self.run.load(base=base)
        with self.console.progress("base" if base else "tuned", total=self.total, leave=False) as bar:
            items = self.measure(model, bar)
        told: Json = {"run": str(self.run.folder.path), "weights": "base" if base else "tuned", "task": self.task}
        told |= {"dataset": self._source(), "split": self.split, "rows": len(items)}
        if self.task == "choices" and self._writes():
            told |= {"form": self.settings.form, "num_fewshot": self.settings.num_fewshot}
        if self.task != "answers":
            told["weighted"] = sum(weight_of(item) != item.get("tokens", 1) for item in items)
        names = label_names(model) if self.task == "labels" else None
        return told | {"figures": figures(self.task, items, names), "items": items}


def lines(result: Json) -> Iterator[str]:
    """What a person reads of a result."""
    how = f" · form {result['form']}, {result['num_fewshot']}-shot" if "form" in result else ""
    yield f"run       {result['run']} · {result['weights']} model"
    yield f"data      {plural(result['rows'], 'row')} of {result['split']} · {result['dataset']}"
    yield f"task      {result['task']}{how}"
    if result.get("weighted"):
        yield f"weights   {plural(result['weighted'], 'row')} with weights other than 1; the loss is a weighted mean"
    figures = result["figures"]
    yield "          " + " · ".join(f"{name} {value:,.4f}" for name, value in figures.items() if isinstance(value, float))
    if "by_label" in figures:
        yield from _label_lines(figures)
        return
    for name, values in figures.get("by_source", {}).items():
        shown = " · ".join(f"{key} {value:,.4f}" for key, value in values.items() if isinstance(value, float))
        yield f"          {name}: {shown} · {plural(values['tokens'], 'token')}"
    if "confusion" not in figures:
        return
    for kind in ("group", "subject"):
        table = figures[f"accuracy_by_{kind}"]
        yield f"\n{kind:<48}accuracy  questions"
        yield from (f"{name:<48}{each['accuracy']:>8.3f}{each['questions']:>11,}" for name, each in table.items())
    yield "\nanswer    said A   said B   said C   said D"
    yield from (
        f"{letter:<6}" + "".join(f"{count:>9,}" for count in row)
        for letter, row in zip("ABCD", figures["confusion"], strict=True)
    )
    yield "\nsure of its answer   accuracy  questions"
    yield from (f"{each['confidence']:<21.3f}{each['accuracy']:>8.3f}{each['questions']:>11,}" for each in figures["bins"])


def _label_lines(figures: Json) -> Iterator[str]:
    columns = ("precision", "recall", "f1")
    yield f"\n{'label':<32}" + "".join(f"{name:>11}" for name in columns) + f"{'rows':>9}"
    for name, row in figures["by_label"].items():
        yield f"{name:<32}" + "".join(f"{row[column]:>11.3f}" for column in columns) + f"{row['rows']:>9,}"
    mistakes = [
        (count, label, predicted)
        for label, counts in zip(figures["by_label"], figures.get("confusion", []), strict=False)
        for predicted, count in zip(figures["by_label"], counts, strict=True)
        if count and label != predicted
    ]
    if mistakes:
        yield "\nmost frequent mistakes"
        yield from (
            f"{count:>7,}  {label} taken for {predicted}"
            for count, label, predicted in sorted(mistakes, key=lambda mistake: -mistake[0])[:10]
        )


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Flags that evaluate and compare share."""
    parser.add_argument("--dataset", help="file, folder or hub name (default: the run's own)")
    parser.add_argument("--split", choices=("test", "validation", "train"), help="default: the first of these that is there")
    parser.add_argument("--task", choices=TASKS, help="default: what the recipe trains (loss, choices or labels)")
    parser.add_argument("--limit", type=above_zero, help="take the first N rows")
    parser.add_argument("--batch_size", type=above_zero, default=8, help="rows at a time (default: 8)")
    parser.add_argument("--num_fewshot", type=_count_or_none, default=0, help="solved questions before each (default: 0)")
    parser.add_argument(
        "--form", choices=tuple(FORMS), default="tmmluplus",
        help="lm-evaluation-harness's task whose wording is used for a model that writes (default: tmmluplus)",
    )  # fmt: skip
    parser.add_argument(
        "--max_new_tokens", type=above_zero, default=256, help="longest answer of --task answers (default: 256)"
    )
    parser.add_argument("--skip_bad_rows", action="store_true", help="leave out rows of --dataset that cannot be read")
    add_device(parser)
    parser.add_argument("--out", type=Path, help="write everything, item by item, into a new .json file")


def _count_or_none(text: str) -> int:
    return 0 if text == "0" else above_zero(text)


def write_out(path: Path | None, result: Json) -> None:
    """The result as JSON, and a line that says where."""
    if path:
        path.write_text(json.dumps(result, ensure_ascii=False, indent=1) + "\n", "utf-8")
        print(f"\nwritten   {path}")


def main(argv: list[str]) -> int:
    """The command."""
    parser = CommandParser("evaluate", "Measure a finished run on rows that it did not train on.")
    parser.add_argument("run", help="a run folder, or last")
    parser.add_argument("--base", action="store_true", help="measure the model as it was before the run")
    add_flags(parser)
    flags = vars(parser.parse_args(argv))
    out = flags.pop("out")
    check_out(out)
    result = evaluate(flags.pop("run"), console=shown(), **flags)
    print("\n".join(lines(result)))
    write_out(out, result)
    return 0


def shown() -> Console:
    """A console whose progress bars leave stdout to the results."""
    from dsrecipes.io.console import Console

    console = Console(out=sys.stderr)
    console.bars = sys.stderr.isatty()
    return console
