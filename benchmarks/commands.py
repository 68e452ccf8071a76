"""How long do the commands on a finished run take to start, compared with another commit?

    git worktree add /tmp/before dcddb8e
    .venv/bin/python benchmarks/commands.py --baseline /tmp/before [--rounds 5]

Both trees run the same commands on the same tiny run, interleaved, each in a process of its own: `chat` until its prompt
shows on a terminal, the others until they end. Wall time depends on what else the machine does, so the processor time of the
process is reported too.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import pty
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"
START = "import sys; sys.argv[0] = 'dsrecipes'; from dsrecipes.cli import main; sys.exit(main())"
"""What the installed command does; the package comes from PYTHONPATH."""
PROMPT = b"text> "


def make_run(folder: Path) -> tuple[Path, Path]:
    """A run folder of a GPT-2 with two layers, as training leaves it, and a file with a text to continue."""
    import yaml
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, set_seed

    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "dsrecipes" / "starter" / "gpt2")
    config = GPT2Config(vocab_size=2048, n_layer=2, n_head=2, n_embd=32, n_positions=256, bos_token_id=0, eos_token_id=0)
    run, text = folder / "run", folder / "text.txt"
    for target in (folder / "base", run / "model"):
        GPT2LMHeadModel(config).save_pretrained(target)
        tokenizer.save_pretrained(target)
    text.write_text("The ferry left at nine. " * 20, encoding="utf-8")
    values = {"recipe": "gpt2_clm", "profile": "full", "model_name_or_path": str(folder / "base"), "dataset": str(text)}
    values |= {"use_cpu": True, "max_length": 64}
    (run / "config.yaml").write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return run, text


def measure(tree: Path, argv: list[str], until: bytes | None) -> tuple[float, float]:
    """(seconds, processor seconds) of a command on a terminal of its own, until it ends or shows `until`."""
    began = time.monotonic()
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ.update(PYTHONPATH=str(tree), HF_HUB_OFFLINE="1", TERM="dumb")
        # -P: without it the working directory's package would come before PYTHONPATH's
        os.execv(sys.executable, [sys.executable, "-P", "-c", START, *argv])
    shown = b""
    for piece in _output(terminal):
        shown += piece
        if until is not None and until in shown:
            os.write(terminal, b"quit\n")
            until = None
            seconds = time.monotonic() - began
            break
    else:
        seconds = time.monotonic() - began
    for piece in _output(terminal):
        shown += piece
    _, status, usage = os.wait4(pid, 0)
    os.close(terminal)
    if status or until is not None:
        raise SystemExit(f"{tree}: {' '.join(argv)} failed:\n{shown.decode(errors='replace')}")
    return seconds, usage.ru_utime + usage.ru_stime


def _output(terminal: int) -> Iterator[bytes]:
    """What a terminal shows, until its process has closed it."""
    while True:
        try:
            piece = os.read(terminal, 4096)
        except OSError:  # Linux says so when the last process has closed its side
            return
        if not piece:
            return
        yield piece


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--baseline", type=Path, required=True, help="worktree of the commit to compare with")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", metavar="COMMAND", default="", help="chat, generate or evaluate alone")
    flags = parser.parse_args()
    trees = {"before": flags.baseline.resolve(), "after": ROOT}
    with tempfile.TemporaryDirectory() as scratch:
        run, text = make_run(Path(scratch))
        commands: dict[str, tuple[list[str], bytes | None]] = {
            "chat, to its prompt": (["chat", str(run)], PROMPT),
            "generate, one text": (["generate", str(run), "--prompts", str(text), "--max_new_tokens", "1"], None),
            "evaluate, one file": (["evaluate", str(run), "--dataset", str(text)], None),
        }
        commands = {name: command for name, command in commands.items() if name.startswith(flags.only)}
        times: dict[str, dict[str, list[tuple[float, float]]]] = {name: {"before": [], "after": []} for name in commands}
        for number in range(flags.rounds + 1):  # the first round fills the page cache and is not counted
            for name, (argv, until) in commands.items():
                for side in ("before", "after") if number % 2 else ("after", "before"):
                    result = measure(trees[side], argv, until)
                    if number:
                        times[name][side].append(result)
                        print(f"round {number} {name:<22}{side:<8}{result[0]:6.2f} s {result[1]:6.2f} s CPU", flush=True)
    lines = table(times)
    print("\n".join(lines))
    stem = RESULTS / f"{time.strftime('%Y-%m-%d')}-commands"
    head = [
        "# Start of the commands on a finished run", "",
        f"{flags.rounds} rounds, interleaved; medians. {platform.processor() or platform.machine()}, {os.cpu_count()} cores, "
        f"Python {platform.python_version()}. Ratios are of each round's pair; the lowest and highest follow.", "",
    ]  # fmt: skip
    stem.with_suffix(".md").write_text("\n".join([*head, *lines]) + "\n", encoding="utf-8")
    stem.with_suffix(".json").write_text(json.dumps(times, indent=1) + "\n", encoding="utf-8")


def table(times: dict[str, dict[str, list[tuple[float, float]]]]) -> list[str]:
    """A Markdown table: medians of both sides, and the ratio of the pairs."""
    rows = ["| command | | before | after | ratio |", "|---|---|---|---|---|"]
    for name, sides in times.items():
        for column, unit in ((1, "s CPU"), (0, "s")):
            before, after = ([pair[column] for pair in sides[side]] for side in ("before", "after"))
            ratios = [first / second for first, second in zip(before, after, strict=True)]
            medians = f"{statistics.median(before):.2f} | {statistics.median(after):.2f}"
            rows.append(
                f"| {name} | {unit} | {medians} | {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) |"
            )
    return rows


if __name__ == "__main__":
    main()
