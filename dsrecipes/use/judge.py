"""An LLM grades a run's answers against others, each pair in both orders.

dsrecipes judge last --judge http://localhost:8000/v1 --judge_model NAME --prompts rows.json
dsrecipes judge last --judge FOLDER --against reference
"""

from __future__ import annotations

import gc
import hashlib
import json
import sys
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsrecipes.errors import UserError
from dsrecipes.use.finished import CommandParser, FinishedRun, open_run
from dsrecipes.use.judge_file import JudgeFile, alone
from dsrecipes.use.judge_models import (
    KEY,
    Judge,
    LocalJudge,
    Reply,
    ServerJudge,
    fingerprint,
    is_url,
    judge_folder,
)
from dsrecipes.use.verdict import ORDERS, REMINDER, RUBRIC, fill, read_rubric, read_verdict, tally

if TYPE_CHECKING:
    from dsrecipes.runs.console import Console
    from dsrecipes.use.answers import Prompt

Json = dict[str, Any]
VERDICTS = ("written", "likelihood")


@dataclass(frozen=True)
class _Item:
    """A question as the judge reads it, and both runs' prompts."""

    question: str
    prompt: Prompt
    other: Prompt | None


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
    text = read_rubric(rubric)
    server = ServerJudge(judge, judge_model, timeout) if is_url(judge) else None
    folder = None if server else judge_folder(judge)
    tuned = open_run(run)
    other = tuned if against in ("base", "reference") else open_run(against)
    items = _items(tuned, other, _rows(tuned, prompts, limit), against)
    job = {
        "run": str(tuned.folder.path), "run_model": fingerprint(tuned.folder.model),
        "against": fingerprint(other.folder.model) if other is not tuned else against,
        "items": len(items), "prompts": _hash([[each.question, each.prompt.ids] for each in items]),
        "judge": judge if server else fingerprint(folder), "judge_folder": str(folder) if folder else None,
        "judge_model": judge_model, "verdict": verdict, "rubric": _hash(text), "retries": retries, "max_new_tokens": max_new_tokens,
        "judge_tokens": judge_tokens,
    }  # fmt: skip
    path = Path(out).expanduser() if out else tuned.folder.path / "judge.jsonl"
    with alone(path):
        file = JudgeFile(path, job)
        console = _console()
        asked: Judge | None = server
        if server and len(file.answers) < 2 * len(items):  # a wrong key or address is told before minutes of writing
            file.write({"kind": "check", **_cost([server.ask("Say OK.", 0, 1)])})
        _write_answers(file, tuned, other, items, against, max_new_tokens, batch_size, console)
        if folder and len(file.judgements) < 2 * len(items):
            console.say(f"loading   the judge, {folder}")
            asked = LocalJudge(folder, verdict == "likelihood")
        if asked:
            _judge_all(file, asked, text, items, retries, judge_tokens, console)
    return _summary(file)


def _console() -> Console:
    """Progress goes to stderr, the result to stdout."""
    from dsrecipes.runs.console import Console

    console = Console()
    console.out = sys.stderr
    return console


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, ensure_ascii=False).encode()).hexdigest()


def _rows(run: FinishedRun, prompts: str | None, limit: int | None) -> list[tuple[str, Json]]:
    """(where, row) of a file's rows, or of those that the run held out."""
    from dsrecipes.data.files import SUFFIXES, FileRows, located, suffix
    from dsrecipes.data.records import content_of, hold_out
    from dsrecipes.layers import layer

    if prompts:
        path = Path(prompts).expanduser()
        if not path.is_file() or suffix(path) not in SUFFIXES:
            raise UserError(f"--prompts {prompts}: no such file, or of a kind that is not read ({' '.join(SUFFIXES)})")
        found = list(islice(located(FileRows((path,))), limit))
    else:
        splits = run.recipe(layer({"config": str(run.folder.config)})).load_rows()
        held = splits.get("test") or splits.get("validation")
        rows = []
        for where, row in located(held or splits["train"]):
            try:
                rows.append((where, row, content_of(run.recipe.format_row(row))))
            except (ValueError, KeyError, TypeError, AttributeError):
                continue  # dropped when the run began, or it would not have ended
        share = 0.0 if held else run.config.data.validation_split
        out = (
            hold_out([key for *_, key in rows], share, run.config.train["seed"])
            if share
            else range(len(rows) if held else 0)
        )
        found = [(where, row) for index, (where, row, _) in enumerate(rows) if index in out][:limit]
    if not found:
        raise UserError(
            f"--prompts {prompts}: no rows in it" if prompts else "the run held no rows out: give --prompts FILE"
        )
    return found


def _items(tuned: FinishedRun, other: FinishedRun, rows: list[tuple[str, Json]], against: str) -> list[_Item]:
    from dsrecipes.use.answers import prompt_of

    items = []
    for where, row in rows:
        try:
            prompt = prompt_of(tuned, row)
            items.append(
                _Item(_question(tuned, row, prompt), prompt, prompt_of(other, row) if other is not tuned else prompt)
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            problem = f"field {error} is missing" if isinstance(error, KeyError) else str(error)
            raise UserError(f"{where}: {problem}") from error
        if against == "reference" and not prompt.reference:
            raise UserError(f"{where}: the row has no answer of its own, which --against reference needs")
    return items


def _question(run: FinishedRun, row: Json, prompt: Prompt) -> str:
    """What was asked, without the marks of the model's prompt format where the row's form is known."""
    for key in ("messages", "conversations"):
        if isinstance(row.get(key), list):
            turns = [(turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))) for turn in row[key]]
            turns = turns[:-1] if turns[-1][0] in ("assistant", "gpt") else turns
            return turns[0][1] if len(turns) == 1 else "\n\n".join(f"{role}: {said}" for role, said in turns)
    if isinstance(row.get("instruction"), str):
        return "\n\n".join(filter(None, (row["instruction"], row.get("input"))))
    return run.tokenizer.decode(prompt.ids, skip_special_tokens=True)


def _write_answers(
    file: JudgeFile,
    tuned: FinishedRun,
    other: FinishedRun,
    items: list[_Item],
    against: str,
    max_new_tokens: int,
    batch_size: int,
    console: Console,
) -> None:
    """Record the answers of both sides that the file lacks; one model is in memory at a time."""
    from dsrecipes.use.answers import answers, generation_settings

    for side, run in (("run", tuned), ("other", other)):
        missing = [index for index in range(len(items)) if (index, side) not in file.answers]
        if side == "other" and against == "reference":
            for index in missing:
                file.write({"kind": "answer", "item": index, "of": side, "text": items[index].prompt.reference})
            continue
        if not missing:
            continue
        name = "the tuned model" if side == "run" else "the base model" if against == "base" else against
        console.say(f"loading   {name}")
        model = run.load(base=side == "other" and against == "base")
        ids = [(items[index].prompt if side == "run" else items[index].other).ids for index in missing]
        settings = generation_settings(run, model, max_new_tokens=max_new_tokens)
        with console.progress(f"answers of {name}", total=len(items), initial=len(items) - len(missing)) as bar:
            for place, answer in answers(model, run.tokenizer, ids, settings, batch_size):
                file.write({"kind": "answer", "item": missing[place], "of": side, "text": answer})
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
                    replies.append(judge.ask(prompt + REMINDER * bool(replies), len(replies), judge_tokens))
                    verdict = read_verdict(replies[-1].text)
                file.write({"kind": "judgement", "item": index, "order": order, "verdict": verdict, **_cost(replies),
                            "replies": [each.text for each in replies]})  # fmt: skip
                bar.update(1)


def _cost(replies: list[Reply]) -> Json:
    """Requests and tokens; None for tokens that a server did not tell."""
    tokens = {}
    for name in ("prompt_tokens", "completion_tokens"):
        counts = [getattr(each, name) for each in replies]
        tokens[name] = None if None in counts else sum(counts)
    return {"requests": len(replies), **tokens}


def _summary(file: JudgeFile) -> Json:
    lines = [*file.checks, *file.judgements.values()]
    cost: Json = {"requests": sum(line["requests"] for line in lines)}
    for name in ("prompt_tokens", "completion_tokens"):
        counts = [line[name] for line in lines]
        cost[name] = None if None in counts else sum(counts)
    return {**tally(file.judgements.values()), **cost, "out": str(file.path)}


def _told(result: Json, against: str) -> str:
    """The result for a person."""
    other = {"base": "the base model", "reference": "the rows' own answers"}.get(against, against)
    lines = [
        f"against   {other} · {result['items']} items, each in both orders",
        f"result    {result['wins']} wins · {result['losses']} losses · {result['ties']} ties · "
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
    lines.append(f"cost      {result['requests']:,} requests · {' · '.join(tokens)}")
    return "\n".join([*lines, f"record    {result['out']}"])


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
    return parser


def main(argv: list[str]) -> int:
    """`dsrecipes judge`: the result on stdout, progress on stderr."""
    flags = _parser().parse_args(argv)
    try:
        print(_told(judge(**vars(flags)), flags.against))
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0
