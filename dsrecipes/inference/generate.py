"""Answers to all rows of a file: batched, in input order, and a killed one goes on where it was.

dsrecipes generate last --prompts prompts.jsonl --out answers.jsonl
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsrecipes.errors import UserError, plural
from dsrecipes.inference.device import add_device, memory_errors
from dsrecipes.inference.finished import FinishedRun, open_run
from dsrecipes.inference.job_file import hash_of
from dsrecipes.inference.partial import PartialAnswers
from dsrecipes.inference.sampling import add_settings, check_sampling, settings_of
from dsrecipes.io.arguments import CommandParser, above_zero, check_out
from dsrecipes.io.paths import user_path

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel

    from dsrecipes.inference.answers import Prompt

Json = dict[str, Any]
Asked = tuple[str, int, "Prompt"]
"""Where a row stands, its number in the file from 0, its prompt."""


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
    """The model's answers to rows, in their order: {"index", "prompt", "answer"}, and "reference" where a row has one.

    Prompts are sorted by length and answered in batches, greedily unless a temperature is given. With sampling each
    batch is seeded by `seed` and its own number, so the answers are the same wherever a job was killed.

    Args:
        run: a run folder's path, `last`, or an opened run.
        prompts: a file that --dataset would take, or rows; in a .txt file each line is a prompt.
        out: a .jsonl file that does not exist yet. Answers are kept in OUT.partial as batches end, and the same call
            goes on from there.
        base: ask the model as it was before the run.
        skip_bad_rows: leave bad rows out; `index` still counts them.
        progress: a bar on stderr.
        device: cpu, cuda, cuda:N, or auto: a GPU where there is one, unless the run was trained with --use_cpu.
        settings: of transformers' GenerationConfig: max_new_tokens, temperature, top_p, ...

    Raises:
        UserError: no such run or file, a bad row, a prompt too long, an `out` that exists or was begun as another job.
    """
    from dsrecipes.inference.answers import generation_settings

    opened = run if isinstance(run, FinishedRun) else open_run(str(run), device)
    if batch_size < 1:
        raise UserError(f"--batch_size {batch_size}: give 1 or more")
    check_sampling(settings)
    target = user_path(out) if out is not None else None
    check_out(target)
    asked = _prompts(opened, prompts, skip_bad_rows)
    model = opened.load(base=base)
    chosen = generation_settings(opened, model, **settings)
    _check_room(asked, model, chosen)
    job = _job(opened, asked, base, {"batch_size": batch_size, "seed": seed, **settings})
    with PartialAnswers(target, job) as partial:
        _answer(opened, model, asked, chosen, batch_size, seed, partial, progress)
        rows = [_row(index, prompt, partial.done[index]) for _, index, prompt in asked]
        partial.finish(rows)
    return rows


def _row(index: int, prompt: Prompt, answer: str) -> Json:
    row = {"index": index, "prompt": prompt.text, "answer": answer}
    return row if prompt.reference is None else row | {"reference": prompt.reference}


def _prompts(run: FinishedRun, prompts: str | Path | Iterable[Json], skip_bad_rows: bool) -> list[Asked]:
    from dsrecipes.data.records import BAD_ROW, bad_row
    from dsrecipes.data.renamed import with_names
    from dsrecipes.inference.prompting import PromptField, ask, find_asking

    try:
        asking: PromptField | None = find_asking(run)
    except UserError:
        asking = None  # rows of several fields can be answered all the same
    asked: list[Asked] = []
    bad = 0
    for index, (where, row) in enumerate(_located(prompts)):
        try:
            if isinstance(row, str):
                row = (asking or find_asking(run)).row(row)
            row = with_names(row, run.config.data.columns)
            asked.append((where, index, ask(run, row, asking)))
        except BAD_ROW as error:
            if not skip_bad_rows:
                raise bad_row(where, error) from error
            bad += 1
    if bad:
        print(f"{plural(bad, 'bad row')} left out", file=sys.stderr)
    if not asked:
        raise UserError(f"--prompts {prompts}: no rows to answer")
    return asked


def _located(prompts: str | Path | Iterable[Json]) -> Iterator[tuple[str, Json | str]]:
    """Rows with their places; of a .txt file its lines, as texts."""
    from dsrecipes.data.decode import suffix
    from dsrecipes.data.files import FileRows
    from dsrecipes.data.load import load_splits
    from dsrecipes.data.rows import located
    from dsrecipes.io.paths import starter_path

    if not isinstance(prompts, (str, Path)):
        yield from located(prompts)
        return
    path = user_path(starter_path(str(prompts)))
    if not path.exists():
        raise UserError(f"--prompts {prompts}: no such file")
    for rows in load_splits(str(path)).values():
        assert isinstance(rows, FileRows)
        for file in rows.files:
            if suffix(file) == ".txt":
                yield from _text_lines(FileRows((file,)))
            else:
                yield from FileRows((file,), rows.split).located()


def _text_lines(rows: Any) -> Iterator[tuple[str, str]]:
    for where, row in rows.located():
        place, _, first = where.rpartition(" ")
        for number, line in enumerate(row["text"].splitlines(), int(first)):
            if line.strip():
                yield f"{place} {number}", line


def _check_room(asked: list[Asked], model: PreTrainedModel, settings: GenerationConfig) -> None:
    from dsrecipes.inference.answers import positions

    room = positions(model)
    for where, _, prompt in asked:
        if room and len(prompt.ids) + settings.max_new_tokens > room:
            raise UserError(
                f"{where}: {plural(len(prompt.ids), 'token')}, and with {settings.max_new_tokens} new ones they pass the model's "
                f"{room} positions: shorten the row, or give a smaller --max_new_tokens"
            )


def _job(run: FinishedRun, asked: list[Asked], base: bool, settings: Json) -> Json:
    """All that the answers follow from."""
    from dsrecipes.io.disk import checksum
    from dsrecipes.runs.weights import folder_checksum

    prompts = hash_of([[index, prompt.ids, prompt.reference] for _, index, prompt in asked])
    model = folder_checksum(run.folder.model)
    return {"config": checksum(run.folder.config), "run": model, "prompts": prompts, "base": base, **settings}


def _answer(
    run: FinishedRun, model: PreTrainedModel, asked: list[Asked], settings: GenerationConfig, batch_size: int, seed: int,
    partial: PartialAnswers, progress: bool,
) -> None:  # fmt: skip
    """Answer what is not answered yet; batches are those of the whole job, whatever is done already."""
    import torch
    from tqdm import tqdm

    from dsrecipes.inference.answers import answers

    order = sorted(asked, key=lambda each: -len(each[2].ids))
    with tqdm(total=len(order), unit="row", desc="answers", disable=not progress, file=sys.stderr) as bar:
        for begin in range(0, len(order), batch_size):
            batch = order[begin : begin + batch_size]
            if any(index not in partial.done for _, index, _ in batch):
                torch.manual_seed(seed + begin)
                ids = [prompt.ids for _, _, prompt in batch]
                strip = not batch[0][2].continues  # a recipe's prompts are all of a kind
                written = answers(model, run.tokenizer, ids, settings, batch_size=len(ids), strip=strip)
                partial.append(*({"index": batch[number][1], "answer": text} for number, text in written))
            bar.update(len(batch))


def main(argv: list[str]) -> int:
    """`dsrecipes generate RUN --prompts FILE [flags]`."""
    parser = CommandParser("generate", "Answers to all rows of a file, as JSON lines in the file's order.")
    parser.add_argument("run", metavar="RUN", help="a run folder, or `last`")
    parser.add_argument(
        "--prompts", required=True, metavar="FILE", help="rows, with or without answers; of a .txt file its lines"
    )
    parser.add_argument(
        "--out", metavar="FILE.jsonl", help="where the answers go; a killed job goes on (default: printed at the end)"
    )
    parser.add_argument("--base", action="store_true", help="ask the model as it was before the run")
    parser.add_argument("--batch_size", type=above_zero, default=8, help="prompts answered together (8)")
    parser.add_argument("--seed", type=int, default=0, help="of sampling (0)")
    parser.add_argument("--skip_bad_rows", action="store_true", help="leave bad rows out instead of stopping at the first")
    add_settings(parser)
    add_device(parser)
    flags = parser.parse_args(argv)
    try:
        rows = generate(
            flags.run, flags.prompts, out=flags.out, base=flags.base, batch_size=flags.batch_size,
            skip_bad_rows=flags.skip_bad_rows, seed=flags.seed, progress=sys.stderr.isatty(), device=flags.device, **settings_of(flags),
        )  # fmt: skip
    except KeyboardInterrupt:
        print("\nstopped" + ("; the same command goes on from here" if flags.out else ""), file=sys.stderr)
        return 130
    if flags.out:
        print(f"{plural(len(rows), 'answer')} in {flags.out}", file=sys.stderr)
    else:
        for row in rows:
            print(json.dumps(row, ensure_ascii=False))
    return 0
