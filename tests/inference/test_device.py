"""--device on every command that computes, and what each says when memory runs out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.finished_runs import made_run
from support.fork_server import Warm
from support.tiny import instructions, refusal, tiny_gpt2, tiny_llama, write_rows

from dsrecipes import UserError, load_recipe
from dsrecipes.cli import main
from dsrecipes.inference.device import find_device, memory_errors

PRETEND = "import torch; torch.cuda.is_available = lambda: True; torch.cuda.device_count = lambda: 1\n"
"""A GPU that is listed and not there: whatever touches it fails."""
COMMAND = "import sys; from dsrecipes import cli; code = cli.main({argv!r}); assert code == {code}, code"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A step of LoRA, and of LoRA on a 4-bit base."""
    folder = tmp_path_factory.mktemp("device")
    rows = write_rows(folder / "rows.json", instructions(12))
    values = {
        "model_name_or_path": tiny_llama(), "dataset": rows, "prompt_style": "chat", "max_length": 256, "lora_r": 4,
        "validation_split": 0.2, "max_steps": 1, "deepspeed": "none", "save_strategy": "no", "global_batch_size": 2,
        "per_device_train_batch_size": 2, "verify_model": False,
    }  # fmt: skip
    return {
        name: str(load_recipe("qlora_zero3", **values, load_in_4bit=four_bit, output_dir=str(folder / name)).run().path)
        for name, four_bit in (("lora", False), ("qlora", True))
    } | {"rows": rows}


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Warm:
    """Commands in processes of their own."""
    return Warm(tmp_path_factory.mktemp("warm"))


@pytest.mark.ranks
@pytest.mark.parametrize("name", ["lora", "qlora"])
@pytest.mark.parametrize(
    ("command", "flags"),
    [
        ("chat", []),
        ("generate", ["--prompts", "ROWS", "--max_new_tokens", "2"]),
        ("evaluate", []),
        ("compare", []),
        ("judge", ["--judge", "MODEL", "--verdict", "likelihood", "--max_new_tokens", "2", "--limit", "1", "--rubric", "RUBRIC"]),
        ("verify", []),
        ("export", ["--to", "DIR"]),
    ],
)  # fmt: skip
def test_cpu_is_the_cpu_where_a_gpu_is_listed(
    runs: dict[str, str], warm: Warm, tmp_path: Path, name: str, command: str, flags: list[str]
) -> None:
    rubric = tmp_path / "rubric.txt"
    rubric.write_text("{question}\n{answer_a}\n{answer_b}\nVERDICT: X")
    paths = {"ROWS": runs["rows"], "MODEL": tiny_llama(), "RUBRIC": str(rubric), "DIR": str(tmp_path / "new")}
    argv = [command, runs[name], *(paths.get(flag, flag) for flag in flags)]
    on_cpu = [] if command == "export" else ["--device", "cpu"]  # export's default
    done = warm.python(PRETEND + COMMAND.format(argv=[*argv, *on_cpu], code=0))
    assert done.code == 0, done.err
    assert not done.err.replace(
        "[transformers] The modules are dequantized in torch.float32 and casted to torch.float32.\n", ""
    )


@pytest.mark.parametrize("count", [0, 1, 8])
def test_the_choice(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    assert find_device() == torch.device("cuda" if count else "cpu")
    assert find_device(use_cpu=True) == find_device("cpu") == torch.device("cpu")
    for index in range(count):
        assert find_device(f"cuda:{index}") == torch.device("cuda", index)
    if count:
        assert find_device("cuda", use_cpu=True) == torch.device("cuda"), "what a user asks for wins"
    for name in (f"cuda:{count}", "cuda:999", *(["cuda"] if not count else [])):
        with pytest.raises(UserError, match=f"--device {name}: .*the devices are cpu.*DSR456"):
            find_device(name)
    for name in ("gpu", "mps", "cuda:", "cuda:-1", "cuda:x", "CPU", "", "0"):
        with pytest.raises(UserError, match=f"--device {name}: .*DSR456"):
            find_device(name)


@pytest.mark.parametrize("command", ["chat", "generate", "evaluate", "compare", "judge", "verify", "export"])
def test_an_impossible_device_is_one_message(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    run = made_run(tmp_path / "run", "gpt2_clm", tiny_gpt2())
    more = {"generate": ["--prompts", "x.txt"], "judge": ["--judge", tiny_gpt2()], "export": ["--to", tmp_path / "new"]}
    for device in ("cuda:7", "gpu"):
        message = refusal(main, [command, run, *more.get(command, []), "--device", device], capfd)
        assert message.startswith(f"error: --device {device}: ")


@pytest.mark.ranks
def test_memory_that_runs_out_is_one_message(warm: Warm, tmp_path: Path) -> None:
    """The logits of all rows take 1.2 GB; the process may take 600 MB more than it has."""
    run = made_run(tmp_path / "run", "gpt2_clm", tiny_gpt2(), max_length=256)
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": "Rain is water that falls from clouds. " * 40}] * 300)
    limit = (
        "import resource; pages = int(open('/proc/self/statm').read().split()[0])\n"
        "resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 600_000_000,) * 2)\n"
    )
    argv = ["evaluate", str(run), "--dataset", rows, "--split", "train"]
    done = warm.python(limit + COMMAND.format(argv=[*argv, "--batch_size", "600"], code=2))
    assert done.code == 0, done.err
    (line,) = done.err.splitlines()
    assert line.startswith("error: ran out of host memory: ") and "Try a smaller --batch_size, or a machine" in line
    assert "--device" not in line
    assert warm.python(limit + COMMAND.format(argv=[*argv, "--batch_size", "2", "--limit", "4"], code=0)).code == 0


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore"),
         "ran out of GPU memory: CUDA out of memory. Tried to allocate 2.00 GiB. Try --device cpu, or a smaller --x"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"), "Try --device cpu, or a smaller --x"),
        (MemoryError(), "ran out of host memory: MemoryError. Try a smaller --x, or a machine with more memory"),
        (OSError(12, "Cannot allocate memory"), "ran out of host memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), "ran out of host memory"),
    ],
)  # fmt: skip
def test_memory_as_the_cause_of_another_error(error: Exception, words: str) -> None:
    @memory_errors("a wrong remedy")
    @memory_errors("a smaller --x")
    def load() -> None:
        try:
            raise error
        except Exception as cause:
            raise UserError("the model cannot be loaded") from cause

    with pytest.raises(UserError) as caught:
        load()
    assert words in str(caught.value) and "wrong" not in str(caught.value)


def test_other_errors_stay_what_they_are() -> None:
    for error in (RuntimeError("size mismatch"), UserError("no such file"), OSError(28, "No space left on device")):
        with pytest.raises(type(error)) as caught, memory_errors():
            raise error
        assert caught.value is error
