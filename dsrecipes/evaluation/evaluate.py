"""How good is a finished run on rows that it did not train on? dsrecipes evaluate RUN [--dataset D] [--task T] [--base]

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
from dsrecipes.evaluation.forms import FORMS
from dsrecipes.evaluation.tasks import TASKS, Measure, Settings, choose_task, writes_text
from dsrecipes.inference.device import add_device, memory_errors
from dsrecipes.inference.finished import FinishedRun, open_run
from dsrecipes.io.arguments import CommandParser, above_zero, check_out

if TYPE_CHECKING:
    from dsrecipes.evaluation.rows import Item
    from dsrecipes.io.console import Console

Json = dict[str, Any]


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
    """Measure a run on its own held-out rows or another data set: figures, and the result of each item.

    Args:
        run: a run folder's path, or `last`.
        dataset: a file, folder or hub name; default: the run's own data.
        split: test, validation or train; default: the first of these that exists.
        base: measure the model as it was before the run.
        task: loss, choices, answers or labels; default: what the recipe trains.
        skip_bad_rows: leave out rows of `dataset` that cannot be read.
        console: shows progress; default: none is shown.
        device: cpu, cuda, cuda:N, or auto: a GPU where there is one, unless the run was trained with --use_cpu.
        settings: fields of dsrecipes.evaluation.tasks.Settings.

    Raises:
        UserError: no such run, rows or task.
    """
    evaluation = Evaluation(open_run(run, device), dataset, split, task, skip_bad_rows, Settings(**settings), console)
    return evaluation.run_on(base)


class Evaluation:
    """Rows of one split, prepared once, for measuring a run's model after training and before it."""

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
        from dsrecipes.evaluation.rows import EvaluationRows, QuestionRows
        from dsrecipes.io.console import Console

        self.run, self.settings = run, settings
        self.console = console or Console(main=False)
        self.task = choose_task(run, task, dataset, settings)
        self.rows: EvaluationRows | QuestionRows
        if self._asks_questions():
            # The recipe's format_row does not read questions, so they are read without it.
            self.rows = QuestionRows(str(dataset), skip_bad_rows)
        else:
            self.rows = EvaluationRows(run, dataset, skip_bad_rows)
        self.split = self.rows.choose(split)
        # Before a model is loaded, so that a row that cannot be read is reported at once.
        self.measure, self.total = self._prepare()

    def _asks_questions(self) -> bool:
        """Whether four-way questions are put to a model that writes text, whose recipe has no such rows."""
        return self.task == "choices" and writes_text(self.run)

    def _prepare(self) -> tuple[Measure, int]:
        """The measurement of the task on these rows, and the steps of its progress bar."""
        from dsrecipes.evaluation import measure_answers, measure_choices, measure_labels, measure_loss
        from dsrecipes.evaluation.rows import EvaluationRows, QuestionRows

        run, settings = self.run, self.settings
        if self.task == "loss":
            assert isinstance(self.rows, EvaluationRows)
            return measure_loss.measure_loss(run, self.rows.sequences(self.split, self.console), settings)
        items = self.items()
        if self.task == "answers":
            return measure_answers.measure_answers(run, items, settings)
        if self.task == "labels":
            return measure_labels.measure_labels(run, items, settings)
        if not isinstance(self.rows, QuestionRows):
            return measure_choices.measure_choices_by_head(run, items, settings)
        shots = self.rows.shots(items, self.split, settings.num_fewshot)
        return measure_choices.measure_choices_by_likelihood(run, items, shots, settings)

    def items(self) -> list[Item]:
        """The rows of the split that count, up to the limit; for --task loss all, because its limit counts sequences.

        Raises:
            UserError: there are none.
        """
        from dsrecipes.evaluation.rows import counted

        limit = None if self.task == "loss" else self.settings.limit
        items = counted(self.rows.items(self.split), self.task)[:limit]
        if not items:
            raise UserError("DSR475", f"{self.rows.name}: no rows in {self.split}")
        return items

    def _source(self) -> str:
        """Paths or hub names of the rows; a run may take its validation rows from another file."""
        # --eval_dataset is another data set, but only for the validation rows of the run's own data.
        data = self.run.config.data
        if self.split == "validation" and self.rows.name == paths_of(data.sources) and data.eval_sources:
            return paths_of(data.eval_sources)
        return self.rows.name

    def run_on(self, base: bool) -> Json:
        """Measure the trained model, or the one before the run where `base`."""
        from dsrecipes.evaluation.metrics import add_scores, figures_of, weight_of
        from dsrecipes.inference.labels import label_names

        model = self.run.load(base=base)
        with self.console.progress("base" if base else "tuned", total=self.total, leave=False) as bar:
            items = self.measure(model, bar)
        add_scores(self.task, items)
        result: Json = {"run": str(self.run.folder.path), "weights": "base" if base else "tuned", "task": self.task}
        result |= {"dataset": self._source(), "split": self.split, "rows": len(items)}
        if self._asks_questions():
            result |= {"form": self.settings.form, "num_fewshot": self.settings.num_fewshot}
        if self.task != "answers":
            result["weighted"] = sum(weight_of(item) != item.get("tokens", 1) for item in items)
        names = label_names(model) if self.task == "labels" else None
        return result | {"figures": figures_of(self.task, items, names), "items": items}


def lines(result: Json) -> Iterator[str]:
    """Yield a result as text, line by line."""
    from dsrecipes.evaluation.metrics import figure_lines

    form = f" · form {result['form']}, {result['num_fewshot']}-shot" if "form" in result else ""
    yield f"run       {result['run']} · {result['weights']} model"
    yield f"data      {plural(result['rows'], 'row')} of {result['split']} · {result['dataset']}"
    yield f"task      {result['task']}{form}"
    if result.get("weighted"):
        yield f"weights   {plural(result['weighted'], 'row')} with weights other than 1; the loss is a weighted mean"
    yield from figure_lines(result["task"], result["figures"])


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that evaluate and compare share."""
    add = parser.add_argument
    add("--dataset", help="file, folder or hub name (default: the run's own)")
    add("--split", choices=("test", "validation", "train"), help="default: the first of these that exists")
    add("--task", choices=TASKS, help="default: what the recipe trains (loss, choices or labels)")
    add("--limit", type=above_zero, help="take the first N rows")
    add("--batch_size", type=above_zero, default=8, help="rows computed together (default: 8)")
    add("--num_fewshot", type=_zero_or_more, default=0, help="solved questions before each question (default: 0)")
    add(
        "--form",
        choices=tuple(FORMS),
        default="tmmluplus",
        help="task of lm-evaluation-harness whose wording is used for a model that writes (default: tmmluplus)",
    )
    add("--max_new_tokens", type=above_zero, default=256, help="longest answer of --task answers (default: 256)")
    add("--skip_bad_rows", action="store_true", help="leave out rows of --dataset that cannot be read")
    add_device(parser)
    add("--out", type=Path, help="write all results, item by item, to a new .json file")


def _zero_or_more(text: str) -> int:
    return 0 if text == "0" else above_zero(text)


def write_out(path: Path | None, result: Json) -> None:
    """Write the result as JSON where --out was given, and print where."""
    if path:
        path.write_text(json.dumps(result, ensure_ascii=False, indent=1) + "\n", "utf-8")
        print(f"\nwritten   {path}")


def main(argv: list[str]) -> int:
    """`dsrecipes evaluate RUN [flags]`."""
    parser = CommandParser("evaluate", "Measure a finished run on rows that it did not train on.")
    parser.add_argument("run", help="a run folder, or last")
    parser.add_argument("--base", action="store_true", help="measure the model as it was before the run")
    add_flags(parser)
    flags = vars(parser.parse_args(argv))
    out = flags.pop("out")
    check_out(out)
    result = evaluate(flags.pop("run"), console=progress_console(), **flags)
    print("\n".join(lines(result)))
    write_out(out, result)
    return 0


def progress_console() -> Console:
    """A console whose progress bars go to stderr, so that stdout has the results alone."""
    from dsrecipes.io.console import Console

    console = Console(out=sys.stderr)
    console.bars = sys.stderr.isatty()
    return console
