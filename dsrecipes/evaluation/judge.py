"""An LLM grades a run's answers against others, each pair in both orders.

dsrecipes judge last --judge http://localhost:8000/v1 --judge_model NAME --prompts rows.json
dsrecipes judge last --judge FOLDER --against reference
"""

from __future__ import annotations

import contextlib
import gc
import sys
from dataclasses import dataclass
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

from dsrecipes.errors import UserError
from dsrecipes.evaluation.judge_file import JudgeFile, cost_of
from dsrecipes.evaluation.judge_models import Judge, LocalJudge, Reply, judge_folder
from dsrecipes.evaluation.judge_server import KEY, ServerJudge, is_url
from dsrecipes.evaluation.verdict import ORDERS, REMINDER, RUBRIC, fill, read_rubric, read_verdict, words
from dsrecipes.inference.device import add_device, memory_errors
from dsrecipes.inference.finished import FinishedRun, open_run
from dsrecipes.inference.job_file import hash_of
from dsrecipes.io.arguments import CommandParser
from dsrecipes.io.console import Console
from dsrecipes.io.paths import user_path

if TYPE_CHECKING:
    from dsrecipes.inference.answers import Prompt

Json = dict[str, Any]
VERDICTS = ("written", "likelihood")


@dataclass(frozen=True)
class _Item:
    """A question as the judge reads it, and both runs' prompts."""

    question: str
    prompt: Prompt
    other: Prompt | None


@memory_errors("a smaller --batch_size, --max_new_tokens or --judge_tokens")
def judge(
    run: str,
    *,
    judge: str,
    judge_model: str | None = None,
    verdict: str = "written",
    against: str = "base",
    prompts: str | None = None,
    rubric: str | None = None,
    limit: int | None = None,
    out: str | None = None,
    retries: int = 2,
    max_new_tokens: int = 256,
    judge_tokens: int = 512,
    batch_size: int = 8,
    timeout: float = 300.0,
    device: str = "auto",
) -> Json:
    """Wins, losses and ties of the run's answers, with the win rate, its interval and the cost.

    Args:
        run: a run folder, or `last`.
        judge: a model folder, or the address of an OpenAI-compatible server, http(s)://HOST[:PORT]/v1.
        judge_model: the model's name on that server.
        verdict: `written` by the judge, or `likelihood`: a model folder writes nothing, and the likeliest of the three
            verdict lines counts.
        against: `base`, `reference` (the rows' own answers) or another run folder.
        prompts: a file of rows in the recipe's form; default: the rows that the run held out.
        rubric: a text with {question}, {answer_a}, {answer_b} and the verdict's form; default: the one shipped.
        limit: judge the first rows only.
        out: the file that records everything; the same call goes on with it. Default: judge.jsonl in the run folder.
        retries: how often a reply without a verdict is asked for again.
        max_new_tokens: of an answer.
        judge_tokens: new tokens of a judge's reply.
        batch_size: answers written at once.
        timeout: seconds that a server has for a reply.
        device: of the run's model and of a judge that is a folder: cpu, cuda, cuda:N, or auto.

    Raises:
        UserError: whatever the user can mend.
    """
    least = {"limit": 1, "retries": 0, "max_new_tokens": 1, "judge_tokens": 1, "batch_size": 1, "timeout": 1}
    given = (limit, retries, max_new_tokens, judge_tokens, batch_size, timeout)
    for (name, low), value in zip(least.items(), given, strict=True):
        if value is not None and value < low:
            raise UserError(f"--{name} {value}: give {low} or more")
    if verdict not in VERDICTS or (verdict == "likelihood" and is_url(judge)):
        raise UserError(f"--verdict {verdict}: give {' or '.join(VERDICTS)}; likelihood is for a model folder, not a server")
    from dsrecipes.runs.weights import folder_checksum

    text = read_rubric(rubric)
    server = ServerJudge(judge, judge_model, timeout) if is_url(judge) else None
    folder = None if server else judge_folder(judge)
    tuned = open_run(run, device)
    other = tuned if against in ("base", "reference") else open_run(against, device)
    items = _items(tuned, other, _rows(tuned, prompts, limit), against)
    job = {
        "run_model": folder_checksum(tuned.folder.model),
        "against": folder_checksum(other.folder.model) if other is not tuned else against,
        "items": len(items), "prompts": hash_of([[each.question, each.prompt.ids] for each in items]),
        "judge": folder_checksum(folder) if folder else judge, "judge_model": judge_model, "verdict": verdict,
        "rubric": hash_of(text), "retries": retries, "max_new_tokens": max_new_tokens, "judge_tokens": judge_tokens,
    }  # fmt: skip
    path = user_path(out) if out else tuned.folder.path / "judge.jsonl"
    about = {"run": str(tuned.folder.path), "judge_folder": str(folder) if folder else None}
    with JudgeFile(path, job, about) as file:
        console = Console(main=sys.stderr.isatty(), out=sys.stderr)
        asked: Judge | None = server
        if server and len(file.answers) < 2 * len(items):  # a wrong key or address is told before minutes of writing
            file.append({"kind": "check", **cost_of([server.ask("Say OK.", 0, 1)])})
        _write_answers(file, tuned, other, items, against, max_new_tokens, batch_size, console)
        if folder and len(file.judgements) < 2 * len(items):
            console.say(f"loading   the judge, {folder}")
            asked = LocalJudge(folder, verdict == "likelihood", device)
        if asked:
            _judge_all(file, asked, text, items, retries, judge_tokens, console)
    return file.summary()


def _rows(run: FinishedRun, prompts: str | None, limit: int | None) -> list[tuple[str, Json]]:
    """(where, row) of a file's rows, or of those that the run held out."""
    from dsrecipes.data.decode import SUFFIXES, suffix
    from dsrecipes.data.load import load_splits
    from dsrecipes.data.renamed import OptionalColumns, renamed
    from dsrecipes.data.rows import located
    from dsrecipes.evaluation.rows import EvaluationRows

    if prompts:
        path = user_path(prompts)
        if not path.is_file() or suffix(path) not in SUFFIXES:
            raise UserError(f"--prompts {prompts}: no such file, or of a kind that is not read ({' '.join(SUFFIXES)})")
        splits = renamed(load_splits(str(path)), OptionalColumns(run.config.data.columns))
        found = list(islice(chain.from_iterable(map(located, splits.values())), limit))
    else:
        held = EvaluationRows(run)
        items = held.items(held.splits[0]) if held.splits[0] != "train" else []
        found = [(each.where, each.row) for each in items[:limit]]
    if not found:
        raise UserError(f"--prompts {prompts}: no rows" if prompts else "the run held no rows out: give --prompts FILE")
    return found


def _items(tuned: FinishedRun, other: FinishedRun, rows: list[tuple[str, Json]], against: str) -> list[_Item]:
    from dsrecipes.data.records import BAD_ROW, fault_of
    from dsrecipes.inference.answers import prompt_of

    items = []
    for where, row in rows:
        try:
            prompt = prompt_of(tuned, row)
            items.append(
                _Item(_question(tuned, row, prompt), prompt, prompt_of(other, row) if other is not tuned else prompt)
            )
        except BAD_ROW as error:
            raise UserError(f"{where}: {fault_of(error)}") from error
        if against == "reference" and not prompt.reference:
            raise UserError(f"{where}: the row has no answer of its own, which --against reference needs")
    return items


def _question(run: FinishedRun, row: Json, prompt: Prompt) -> str:
    """What was asked, without the marks of the model's prompt format where the row's form is known."""
    from dsrecipes.data.parse import instruction_record, with_answer
    from dsrecipes.data.records import BAD_ROW

    with contextlib.suppress(*BAD_ROW):
        record = instruction_record(with_answer(row, "-")[0])
        if "messages" not in record:
            return "\n\n".join(filter(None, (record["instruction"], record["input"])))
        turns = record["messages"][:-1]
        return (
            turns[0]["content"] if len(turns) == 1 else "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)
        )
    return run.tokenizer.decode(prompt.ids, skip_special_tokens=True)


def _write_answers(
    file: JudgeFile, tuned: FinishedRun, other: FinishedRun, items: list[_Item], against: str, max_new_tokens: int,
    batch_size: int, console: Console,
) -> None:  # fmt: skip
    """Record the answers of both sides that the file lacks; one model is in memory at a time."""
    from dsrecipes.inference.answers import answers, generation_settings

    if against == "reference":
        told = [(index, each.prompt.reference) for index, each in enumerate(items) if (index, "other") not in file.answers]
        file.append(*({"kind": "answer", "item": index, "of": "other", "text": text} for index, text in told))
    for side, run in (("run", tuned), ("other", other)):
        missing = [index for index in range(len(items)) if (index, side) not in file.answers]
        if not missing:
            continue
        name = "the tuned model" if side == "run" else "the base model" if against == "base" else against
        console.say(f"loading   {name}")
        model = run.load(base=side == "other" and against == "base")
        ids = [(items[index].prompt if side == "run" else items[index].other).ids for index in missing]
        settings = generation_settings(run, model, max_new_tokens=max_new_tokens)
        with console.progress(f"answers of {name}", total=len(items), initial=len(items) - len(missing)) as bar:
            for place, answer in answers(model, run.tokenizer, ids, settings, batch_size):
                file.append({"kind": "answer", "item": missing[place], "of": side, "text": answer})
                bar.update(1)
        del model
        gc.collect()


def _judge_all(
    file: JudgeFile, judge: Judge, rubric: str, items: list[_Item], retries: int, judge_tokens: int, console: Console
) -> None:
    """Each pair in both orders, those that the file has left out; equal answers are a tie that needs no judge."""
    with console.progress("judging", total=2 * len(items), initial=len(file.judgements)) as bar:
        for index, item in enumerate(items):
            for order in ORDERS:
                if (index, order) in file.judgements:
                    continue
                pair = [file.answers[index, side] for side in ("run", "other")]
                pair = pair if order == ORDERS[0] else pair[::-1]
                replies: list[Reply] = []
                verdict = "TIE" if pair[0] == pair[1] else None
                prompt = fill(rubric, item.question, *pair)
                while verdict is None and len(replies) <= retries:
                    replies.append(judge.ask(prompt + REMINDER if replies else prompt, len(replies), judge_tokens))
                    verdict = read_verdict(replies[-1].text)
                file.append({"kind": "judgement", "item": index, "order": order, "verdict": verdict, **cost_of(replies),
                            "replies": [each.text for each in replies]})  # fmt: skip
                bar.update(1)


def _parser() -> CommandParser:
    parser = CommandParser("judge", "Let an LLM grade a run's answers against others, each pair in both orders.")
    add = parser.add_argument
    add("run", metavar="RUN", help="a run folder, or `last`")
    add("--judge", required=True, metavar="FOLDER|URL", help=f"a model folder, or http(s)://HOST[:PORT]/v1 (key: {KEY})")
    add("--judge_model", metavar="NAME", help="the model's name on the server")
    add("--verdict", default="written", metavar="written|likelihood",
        help="written by the judge, or the likeliest of the three verdict lines (a folder only; for a small model)")  # fmt: skip
    add("--against", default="base", metavar="base|reference|RUN", help="default: base, the model before the run")
    add("--prompts", metavar="FILE", help="rows in the recipe's form; default: those that the run held out")
    add("--rubric", metavar="FILE", help=f"what the judge is asked; start from a copy of {RUBRIC}")
    add("--limit", type=int, metavar="N", help="the first N rows only")
    add("--out", metavar="FILE.jsonl", help="the record, with which the same command goes on; default: judge.jsonl in RUN")
    add("--retries", type=int, default=2, metavar="N", help="when a reply has no verdict (default: 2)")
    add("--max_new_tokens", type=int, default=256, metavar="N", help="of an answer (default: 256)")
    add("--judge_tokens", type=int, default=512, metavar="N", help="of a judge's reply (default: 512)")
    add("--batch_size", type=int, default=8, metavar="N", help="answers written at once (default: 8)")
    add("--timeout", type=float, default=300.0, metavar="S", help="seconds that a server has for a reply (default: 300)")
    add_device(parser)
    return parser


def main(argv: list[str]) -> int:
    """`dsrecipes judge`: the result on stdout, progress on stderr."""
    flags = _parser().parse_args(argv)
    try:
        print(words(judge(**vars(flags)), flags.against))
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0
