"""How good are a run's answers compared with others, as an LLM judges them? Each pair in both orders: dsrecipes judge RUN

dsrecipes judge last --judge http://localhost:8000/v1 --judge_model NAME --prompts rows.json
dsrecipes judge last --judge FOLDER --against reference
"""

from __future__ import annotations

import gc
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsrecipes.errors import UserError
from dsrecipes.evaluation.judge_file import JudgeFile, cost_of
from dsrecipes.evaluation.judge_items import JudgedItem, judged_items, read_rows
from dsrecipes.evaluation.judge_models import Judge, LocalJudge, Reply, judge_folder
from dsrecipes.evaluation.judge_server import KEY, ServerJudge, is_url
from dsrecipes.evaluation.verdict import ORDERS, REMINDER, RUBRIC, fill, read_rubric, read_verdict, summary_text
from dsrecipes.inference.device import add_device, memory_errors
from dsrecipes.inference.finished import FinishedRun, open_run
from dsrecipes.inference.job_file import hash_of
from dsrecipes.io.arguments import CommandParser
from dsrecipes.io.console import Console
from dsrecipes.io.paths import user_path

Json = dict[str, Any]
VERDICTS = ("written", "likelihood")


@dataclass(frozen=True, kw_only=True)
class _Options:
    """Arguments of the command other than its run; `judge` explains them."""

    judge: str
    judge_model: str | None
    verdict: str
    against: str
    retries: int
    max_new_tokens: int
    judge_tokens: int
    batch_size: int
    timeout: float
    device: str

    def __post_init__(self) -> None:
        """Check each value (UserError)."""
        minima = {"retries": 0, "max_new_tokens": 1, "judge_tokens": 1, "batch_size": 1, "timeout": 1}
        for name, minimum in minima.items():
            _require_minimum(name, getattr(self, name), minimum)
        if self.verdict not in VERDICTS or (self.verdict == "likelihood" and is_url(self.judge)):
            raise UserError(
                "DSR491",
                f"--verdict {self.verdict}: give {' or '.join(VERDICTS)}; likelihood is for a model folder, not a server",
            )


def _require_minimum(name: str, value: float | None, minimum: int) -> None:
    if value is not None and value < minimum:
        raise UserError("DSR490", f"--{name} {value}: give {minimum} or more")


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
    """Count wins, losses and ties of the run's answers, with the win rate, its interval and the cost.

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
        out: the file that records everything, with which the same call resumes. Default: judge.jsonl in the run folder.
        retries: how often a reply without a verdict is requested again.
        max_new_tokens: of an answer.
        judge_tokens: new tokens of a judge's reply.
        batch_size: answers written together.
        timeout: seconds that a server has for a reply.
        device: of the run's model and of a judge that is a folder: cpu, cuda, cuda:N, or auto.

    Raises:
        UserError: whatever the user can fix.
    """
    # One object, because most functions below need several of its values.
    options = _Options(
        judge=judge,
        judge_model=judge_model,
        verdict=verdict,
        against=against,
        retries=retries,
        max_new_tokens=max_new_tokens,
        judge_tokens=judge_tokens,
        batch_size=batch_size,
        timeout=timeout,
        device=device,
    )
    _require_minimum("limit", limit, 1)
    # Whatever can be refused without a model is checked before one is loaded.
    text = read_rubric(rubric)
    source = ServerJudge(judge, judge_model, timeout) if is_url(judge) else judge_folder(judge)
    folder = source if isinstance(source, Path) else None
    tuned = open_run(run, device)
    other = tuned if against in ("base", "reference") else open_run(against, device)
    items = judged_items(tuned, other, read_rows(tuned, prompts, limit), against)
    path = user_path(out) if out else tuned.folder.path / "judge.jsonl"
    # Paths may change between calls, since a run can be moved; the models' checksums may not.
    about = {"run": str(tuned.folder.path), "judge_folder": str(folder) if folder else None}
    with JudgeFile(path, _job(tuned, other, items, text, folder, options), about) as file:
        _judge_run(file, tuned, other, items, text, source, options)
    return file.summary()


def _job(
    tuned: FinishedRun, other: FinishedRun, items: list[JudgedItem], rubric: str, folder: Path | None, options: _Options
) -> Json:
    """Everything that the verdicts depend on."""
    from dsrecipes.runs.weights import folder_checksum

    return {
        "run_model": folder_checksum(tuned.folder.model),
        "against": folder_checksum(other.folder.model) if other is not tuned else options.against,
        "items": len(items),
        "prompts": hash_of([[item.question, item.prompt.ids] for item in items]),
        "judge": folder_checksum(folder) if folder else options.judge,
        "judge_model": options.judge_model,
        "verdict": options.verdict,
        "rubric": hash_of(rubric),
        "retries": options.retries,
        "max_new_tokens": options.max_new_tokens,
        "judge_tokens": options.judge_tokens,
    }


def _judge_run(
    file: JudgeFile,
    tuned: FinishedRun,
    other: FinishedRun,
    items: list[JudgedItem],
    rubric: str,
    source: ServerJudge | Path,
    options: _Options,
) -> None:
    """Write and judge what the file lacks."""
    console = Console(main=sys.stderr.isatty(), out=sys.stderr)
    if isinstance(source, ServerJudge) and len(file.answers) < 2 * len(items):
        # A wrong key or address is reported before minutes of generating answers.
        file.append({"kind": "check", **cost_of([source.ask("Say OK.", 0, 1)])})
    _write_answers(file, tuned, other, items, options, console)
    # A finished job needs no judge, only its summary.
    if len(file.judgements) == 2 * len(items):
        return
    if isinstance(source, Path):
        console.say(f"loading   the judge, {source}")
        judge: Judge = LocalJudge(source, options.verdict == "likelihood", options.device)
    else:
        judge = source
    _judge_pairs(file, judge, rubric, items, options, console)


def _write_answers(
    file: JudgeFile, tuned: FinishedRun, other: FinishedRun, items: list[JudgedItem], options: _Options, console: Console
) -> None:
    """Record the answers of both sides that the file lacks; one model is in memory at a time."""
    if options.against == "reference":
        missing = [index for index in range(len(items)) if (index, "other") not in file.answers]
        answers = ({"item": index, "of": "other", "text": items[index].prompt.reference} for index in missing)
        file.append(*({"kind": "answer", **answer} for answer in answers))
    names = {"base": "the base model"}
    for side, run, name in (
        ("run", tuned, "the tuned model"),
        ("other", other, names.get(options.against, options.against)),
    ):
        missing = [index for index in range(len(items)) if (index, side) not in file.answers]
        if missing:
            console.say(f"loading   {name}")
            _write_side(file, run, side, name, items, missing, options, console)
            # The first model's memory must be free before the second is loaded.
            gc.collect()


def _write_side(
    file: JudgeFile,
    run: FinishedRun,
    side: str,
    name: str,
    items: list[JudgedItem],
    missing: list[int],
    options: _Options,
    console: Console,
) -> None:
    from dsrecipes.inference.answers import answers, generation_settings

    model = run.load(base=side == "other" and options.against == "base")
    ids = [(items[index].prompt if side == "run" else items[index].other).ids for index in missing]
    settings = generation_settings(run, model, max_new_tokens=options.max_new_tokens)
    with console.progress(f"answers of {name}", total=len(items), initial=len(items) - len(missing)) as bar:
        for number, answer in answers(model, run.tokenizer, ids, settings, options.batch_size):
            file.append({"kind": "answer", "item": missing[number], "of": side, "text": answer})
            bar.update(1)


def _judge_pairs(
    file: JudgeFile, judge: Judge, rubric: str, items: list[JudgedItem], options: _Options, console: Console
) -> None:
    """Judge the pairs and orders that the file lacks; equal answers are a tie that needs no judge."""
    with console.progress("judging", total=2 * len(items), initial=len(file.judgements)) as bar:
        for index, item in enumerate(items):
            for order in ORDERS:
                if (index, order) in file.judgements:
                    continue
                pair = [file.answers[index, side] for side in ("run", "other")]
                # In the second order the run's answer is B.
                pair = pair if order == ORDERS[0] else pair[::-1]
                verdict, replies = _verdict(judge, rubric, item.question, pair, options)
                judgement = {"kind": "judgement", "item": index, "order": order, "verdict": verdict, **cost_of(replies)}
                file.append(judgement | {"replies": [reply.text for reply in replies]})
                bar.update(1)


def _verdict(judge: Judge, rubric: str, question: str, pair: list[str], options: _Options) -> tuple[str | None, list[Reply]]:
    """The verdict on two answers, and all replies that it took."""
    replies: list[Reply] = []
    verdict = "TIE" if pair[0] == pair[1] else None
    prompt = fill(rubric, question, *pair)
    while verdict is None and len(replies) <= options.retries:
        replies.append(judge.ask(prompt + REMINDER if replies else prompt, len(replies), options.judge_tokens))
        verdict = read_verdict(replies[-1].text)
    return verdict, replies


def _parser() -> CommandParser:
    parser = CommandParser("judge", "Let an LLM grade a run's answers against others, each pair in both orders.")
    add = parser.add_argument
    add("run", metavar="RUN", help="a run folder, or `last`")
    add("--judge", required=True, metavar="FOLDER|URL", help=f"a model folder, or http(s)://HOST[:PORT]/v1 (key: {KEY})")
    add("--judge_model", metavar="NAME", help="the model's name on the server")
    add(
        "--verdict",
        default="written",
        metavar="written|likelihood",
        help="written by the judge, or the likeliest of the three verdict lines (a folder only; for a small model)",
    )
    add("--against", default="base", metavar="base|reference|RUN", help="default: base, the model before the run")
    add("--prompts", metavar="FILE", help="rows in the recipe's form; default: those that the run held out")
    add("--rubric", metavar="FILE", help=f"what the judge gets; start from a copy of {RUBRIC}")
    add("--limit", type=int, metavar="N", help="the first N rows only")
    add("--out", metavar="FILE.jsonl", help="the record, with which the same command resumes; default: judge.jsonl in RUN")
    add("--retries", type=int, default=2, metavar="N", help="when a reply has no verdict (default: 2)")
    add("--max_new_tokens", type=int, default=256, metavar="N", help="of an answer (default: 256)")
    add("--judge_tokens", type=int, default=512, metavar="N", help="of a judge's reply (default: 512)")
    add("--batch_size", type=int, default=8, metavar="N", help="answers written together (default: 8)")
    add("--timeout", type=float, default=300.0, metavar="S", help="seconds that a server has for a reply (default: 300)")
    add_device(parser)
    return parser


def main(argv: list[str]) -> int:
    """`dsrecipes judge`: the result on stdout, progress on stderr."""
    flags = _parser().parse_args(argv)
    try:
        print(summary_text(judge(**vars(flags)), flags.against))
    except KeyboardInterrupt:
        print("\nstopped; the same command resumes", file=sys.stderr)
        return 130
    return 0
