"""What does a run's model answer to each row of a file? In batches, in input order, and resumable after a kill.

dsrecipes generate last --prompts prompts.jsonl --out answers.jsonl
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsrecipes.errors import UserError, plural
from dsrecipes.inference.device import add_device, memory_errors
from dsrecipes.inference.finished import FinishedRun, open_run
from dsrecipes.inference.job_file import ResumableJsonl, hash_of, json_lines, text_in, unwritable
from dsrecipes.inference.sampling import add_settings, check_sampling, settings_of
from dsrecipes.io.arguments import CommandParser, above_zero, check_out
from dsrecipes.io.disk import write_whole
from dsrecipes.io.paths import user_path

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel

    from dsrecipes.inference.prompting import Prompt

Json = dict[str, Any]


@dataclass(frozen=True)
class _Question:
    """A row to be answered."""

    where: str
    """File and row."""
    index: int
    """Number of the row, from 0, counting bad rows that are left out."""
    prompt: Prompt


class PartialAnswers(ResumableJsonl):
    """Answers by index, which survive a kill in OUT.partial until OUT is written; without an `out` nothing is written."""

    def __init__(self, out: Path | None, job: Json) -> None:
        """Name the file after `out`; `job` is that of ResumableJsonl."""
        super().__init__(out and out.with_name(f"{out.name}.partial"), "generate", job)
        self.out = out
        self.done: dict[int, str] = {}

    def load_line(self, line: Json) -> None:
        """Take an answer."""
        self.done[line["index"]] = text_in(line, "answer")

    def finish(self, rows: list[Json]) -> None:
        """Write the rows to OUT, and remove OUT.partial."""
        if self.out is None or self.path is None:
            return
        try:
            # OUT first: a kill between the two leaves both, and no answer is lost.
            write_whole(self.out, json_lines(rows))
            self.path.unlink()
        except OSError as error:
            raise unwritable(self.out, error) from error


@memory_errors("a smaller --batch_size")
def generate(
    run: str | Path | FinishedRun,
    prompts: str | Path | Iterable[Json],
    *,
    out: str | Path | None = None,
    base: bool = False,
    batch_size: int = 8,
    skip_bad_rows: bool = False,
    seed: int = 0,
    progress: bool = False,
    device: str = "auto",
    **settings: Any,
) -> list[Json]:
    """Answer rows, in their order: {"index", "prompt", "answer"}, and "reference" where a row has an answer.

    Prompts are sorted by length and answered in batches, greedily unless a temperature is given. With sampling each
    batch is seeded by `seed` and its own number, so that a job that was killed and resumed gives the same answers.

    Args:
        run: a run folder's path, `last`, or an opened run.
        prompts: a file that --dataset would take, or rows; in a .txt file each line is a prompt.
        out: a .jsonl file that does not exist yet. Answers are kept in OUT.partial as batches finish, and the same call
            resumes from there.
        base: ask the model as it was before the run.
        batch_size: prompts answered together.
        skip_bad_rows: leave bad rows out; `index` still counts them.
        seed: random seed of sampling.
        progress: show a bar on stderr.
        device: cpu, cuda, cuda:N, or auto: a GPU where there is one, unless the run was trained with --use_cpu.
        settings: of transformers' GenerationConfig: max_new_tokens, temperature, top_p, ...

    Raises:
        UserError: no such run or file, a bad row, a prompt too long, an `out` that exists or was begun as another job.
    """
    from dsrecipes.inference.answers import generation_settings

    opened = run if isinstance(run, FinishedRun) else open_run(str(run), device)
    if batch_size < 1:
        raise UserError("DSR440", f"--batch_size {batch_size}: give 1 or more")
    check_sampling(settings)
    target = user_path(out) if out is not None else None
    check_out(target)
    # A bad row is reported before the model is loaded, which may take minutes.
    questions = _read_questions(opened, prompts, skip_bad_rows)
    model = opened.load(base=base)
    generation = generation_settings(opened, model, **settings)
    _check_positions(questions, model, generation)
    job = _job(opened, questions, base, {"batch_size": batch_size, "seed": seed, **settings})
    with PartialAnswers(target, job) as partial:
        _answer(opened, model, questions, generation, batch_size, seed, partial, progress)
        rows = [_row(question, partial.done[question.index]) for question in questions]
        partial.finish(rows)
    return rows


def _row(question: _Question, answer: str) -> Json:
    prompt = question.prompt
    row = {"index": question.index, "prompt": prompt.text, "answer": answer}
    return row if prompt.reference is None else row | {"reference": prompt.reference}


def _read_questions(run: FinishedRun, prompts: str | Path | Iterable[Json], skip_bad_rows: bool) -> list[_Question]:
    from dsrecipes.data.records import BAD_ROW, bad_row
    from dsrecipes.data.renamed import with_names
    from dsrecipes.inference.prompting import find_prompt_field, prompt_of

    questions: list[_Question] = []
    bad = 0
    for index, (where, row) in enumerate(_located(prompts)):
        try:
            # A line of a .txt file has no field name; the recipe's `prompt` hook says which field it fills.
            if isinstance(row, str):
                row = find_prompt_field(run).row(row)
            row = with_names(row, run.config.data.columns)
            questions.append(_Question(where, index, prompt_of(run, row)))
        except BAD_ROW as error:
            if not skip_bad_rows:
                raise bad_row(where, error) from error
            bad += 1
    if bad:
        print(f"{plural(bad, 'bad row')} left out", file=sys.stderr)
    if not questions:
        raise UserError("DSR441", f"--prompts {prompts}: no rows to answer")
    return questions


def _located(prompts: str | Path | Iterable[Json]) -> Iterator[tuple[str, Json | str]]:
    """Yield rows with their locations; a .txt file gives its lines as texts."""
    from dsrecipes.data.decode import suffix
    from dsrecipes.data.files import FileRows
    from dsrecipes.data.load import load_splits
    from dsrecipes.data.row import located
    from dsrecipes.io.paths import starter_path

    if not isinstance(prompts, (str, Path)):
        yield from located(prompts)
        return
    path = user_path(starter_path(str(prompts)))
    if not path.exists():
        raise UserError("DSR441", f"--prompts {prompts}: no such file")
    for rows in load_splits(str(path)).values():
        assert isinstance(rows, FileRows)
        for file in rows.files:
            if suffix(file) == ".txt":
                yield from _text_lines(FileRows((file,)))
            else:
                yield from FileRows((file,), rows.split).located()


def _text_lines(rows: Any) -> Iterator[tuple[str, str]]:
    """The lines of a text file, which is read as documents of several lines."""
    for where, row in rows.located():
        prefix, _, first = where.rpartition(" ")
        for number, line in enumerate(row["text"].splitlines(), int(first)):
            if line.strip():
                yield f"{prefix} {number}", line


def _check_positions(questions: list[_Question], model: PreTrainedModel, settings: GenerationConfig) -> None:
    """Refuse prompts that are too long before the first is answered, by file and row."""
    from dsrecipes.inference.answers import positions, too_long

    limit = positions(model)
    for question in questions:
        tokens = len(question.prompt.ids)
        if limit and tokens + settings.max_new_tokens > limit:
            raise UserError("DSR432", f"{question.where}: {too_long(tokens, settings.max_new_tokens, limit)}")


def _job(run: FinishedRun, questions: list[_Question], base: bool, settings: Json) -> Json:
    """Everything that the answers depend on."""
    from dsrecipes.io.disk import checksum
    from dsrecipes.runs.weights import folder_checksum

    # Ids instead of texts, so that a changed template or tokenizer counts as another job.
    prompts = hash_of([[question.index, question.prompt.ids, question.prompt.reference] for question in questions])
    model = folder_checksum(run.folder.model)
    return {"config": checksum(run.folder.config), "run": model, "prompts": prompts, "base": base, **settings}


def _answer(
    run: FinishedRun,
    model: PreTrainedModel,
    questions: list[_Question],
    settings: GenerationConfig,
    batch_size: int,
    seed: int,
    partial: PartialAnswers,
    progress: bool,
) -> None:
    """Answer what is not answered yet."""
    import torch
    from tqdm import tqdm

    from dsrecipes.inference.answers import answers

    # Batches are those of the whole job, so that a resumed job pads and samples as an uninterrupted one.
    order = sorted(questions, key=lambda question: -len(question.prompt.ids))
    with tqdm(total=len(order), unit="row", desc="answers", disable=not progress, file=sys.stderr) as bar:
        for begin in range(0, len(order), batch_size):
            batch = order[begin : begin + batch_size]
            if any(question.index not in partial.done for question in batch):
                # A seed for each batch: skipping finished batches must not shift the random numbers of the others.
                torch.manual_seed(seed + begin)
                ids = [question.prompt.ids for question in batch]
                # All prompts of a recipe continue a text, or none does.
                strip = not batch[0].prompt.continues
                written = answers(model, run.tokenizer, ids, settings, batch_size=len(ids), strip=strip)
                partial.append(*({"index": batch[number].index, "answer": text} for number, text in written))
            bar.update(len(batch))


def _parser() -> CommandParser:
    parser = CommandParser("generate", "Answers to all rows of a file, as JSON lines in the file's order.")
    add = parser.add_argument
    add("run", metavar="RUN", help="a run folder, or `last`")
    add("--prompts", required=True, metavar="FILE", help="rows, with or without answers; of a .txt file its lines")
    add("--out", metavar="FILE.jsonl", help="write the answers here; a killed job resumes (default: print them at the end)")
    add("--base", action="store_true", help="ask the model as it was before the run")
    add("--batch_size", type=above_zero, default=8, help="prompts answered together (8)")
    add("--seed", type=int, default=0, help="random seed of sampling (0)")
    add("--skip_bad_rows", action="store_true", help="leave bad rows out instead of stopping at the first")
    add_settings(parser)
    add_device(parser)
    return parser


def main(argv: list[str]) -> int:
    """`dsrecipes generate RUN --prompts FILE [flags]`."""
    flags = _parser().parse_args(argv)
    settings = settings_of(flags)
    try:
        rows = generate(
            flags.run,
            flags.prompts,
            out=flags.out,
            base=flags.base,
            batch_size=flags.batch_size,
            skip_bad_rows=flags.skip_bad_rows,
            seed=flags.seed,
            progress=sys.stderr.isatty(),
            device=flags.device,
            **settings,
        )
    except KeyboardInterrupt:
        print("\nstopped" + ("; the same command resumes" if flags.out else ""), file=sys.stderr)
        return 130
    if flags.out:
        print(f"{plural(len(rows), 'answer')} in {flags.out}", file=sys.stderr)
    else:
        for row in rows:
            print(json.dumps(row, ensure_ascii=False))
    return 0
