"""Bad input through the real entry point: one message that says what, where and what to do, and exit code 2."""

import gzip
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.tiny import instructions, refusal, small_disk, tiny_bert, tiny_gpt2, tiny_llama, write_rows

from dsrecipes import cli
from dsrecipes.run import main


def alpaca(tmp_path: Path, **changes: object) -> list[str]:
    """A command line that would train in seconds, with some words changed."""
    if not (tmp_path / "rows.jsonl").is_file():
        write_rows(tmp_path / "rows.jsonl", instructions(12))
    values = {
        "recipe": "alpaca_llama_sft", "profile": "starter", "use_cpu": "true", "model_name_or_path": tiny_llama(),
        "dataset": tmp_path / "rows.jsonl", "prompt_style": "alpaca", "max_length": 256, "max_steps": 1, "deepspeed": "none",
        "output_dir": tmp_path / "run", "verify_model": "false",
    } | changes  # fmt: skip
    return [f"--{key}={value}" for key, value in values.items() if value is not None]


FILES = {
    "malformed.jsonl": (b'{"instruction": "a", "output": "b"}\n{"instruction": \n', ["malformed.jsonl, line 2, column", "not JSON"]),
    "malformed.json": (b'[{"instruction": "a",\n "output" "b"}]', ["malformed.json, line 2, column 11", "not JSON"]),
    "malformed.csv": (b'instruction,output\na,b\na,"b\n', ["malformed.csv, line 3", "not CSV"]),
    "short.csv": (b"instruction,output\na,b\na\n", ["short.csv, line 3: 1 field where"]),
    "broken.jsonl.gz": (gzip.compress(b'{"instruction": "a", "output": "b"}\n' * 999)[:-20], ["broken.jsonl.gz", "damaged gzip"]),
    "broken.parquet": (b"PAR1", ["broken.parquet", "not a Parquet file"]),
    "latin.jsonl": ('{"instruction": "a", "output": "é"}'.encode("latin-1"), ["latin.jsonl", "not UTF-8", "line 1"]),
    "missing.jsonl": (b'{"instruction": "a", "output": "b"}\n{"output": "b"}', ["missing.jsonl, line 2: no known format of rows: the row has output; expected one of", "--skip_bad_rows"]),
    "typed.json": (b'[{"instruction": "a", "output": ["b"]}]', ["typed.json, row 1: field 'output' must be text, found list"]),
    "empty_output.json": (b'[{"instruction": "a", "output": ""}]', ["row 1: field 'output' is empty", "--skip_bad_rows"]),
    "empty.json": (b"[]", ["empty.json: the train data are empty"]),
    "long.json": (b'[{"instruction": "a", "output": "' + b"word " * 999 + b'"}]', ["no train row has a token", "1 longer than 256", "--max_length"]),
    "notes.docx": (b"x", ["notes.docx", "unknown kind of file", ".jsonl"]),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_bad_data(name, tmp_path, capfd):
    raw, parts = FILES[name]
    (tmp_path / name).write_bytes(raw)
    message = refusal(main, alpaca(tmp_path, dataset=tmp_path / name), capfd)
    assert all(part in message for part in parts), message
    assert not (tmp_path / "run").exists()


CASES = {
    "no model": ({"model_name_or_path": "./no/model"}, ["--model_name_or_path ./no/model", "no such folder"]),
    "another task": ({"model_name_or_path": tiny_bert}, ["BertForMultipleChoice", "causal language model"]),
    "hub": ({"model_name_or_path": "meta-llama/Llama-2-7b-hf"}, ["meta-llama/Llama-2-7b-hf", "cannot be reached", "FOLDER"]),
    "hub data": ({"dataset": "tatsu-lab/alpaca"}, ["data set tatsu-lab/alpaca", "cannot be reached", "--dataset FILE"]),
    "no data": ({"dataset": "gone.jsonl"}, ["--dataset gone.jsonl", "no such file"]),
    "no held-out data": ({"eval_dataset": "gone.jsonl"}, ["gone.jsonl", "no such file"]),
    "no chat template": ({"model_name_or_path": tiny_gpt2, "prompt_style": "chat"}, ["no chat template", "--prompt_style alpaca"]),
    "positions": ({"max_length": 1024}, ["--max_length 1024", "512 positions"]),
    "batch": ({"global_batch_size": 5, "per_device_train_batch_size": 2}, ["global_batch_size 5 (flag) =", "x ranks 1", "multiple of 2"]),
    "lora": ({"lora_target_modules": "no_proj"}, ["--lora_target_modules", "no_proj"]),
    "best model": ({"validation_split": 0, "load_best_model_at_end": True, "save_strategy": "steps"}, ["--load_best_model_at_end", "validation"]),
    "resume": ({"resume_from_checkpoint": "step7"}, ["step7", "does not exist"]),
    "resume without a run": ({"resume_from_checkpoint": "auto", "output_dir": None}, ["--output_dir"]),
    "zero json": ({"deepspeed": "{tmp}/zero.json"}, ["zero.json, line 2, column", "not JSON"]),
    "zero key": ({"deepspeed": "{tmp}/typo.json"}, ["typo.json", "'overlap_com'", "overlap_comm"]),
    "zero batch": ({"deepspeed": "{tmp}/batch.json"}, ["global_batch_size 64", "batch.json", "ranks 1"]),
    "fp16": ({"fp16": True}, ["fp16 needs a GPU"]),
    "attention": ({"attn_implementation": "flash_attention_9"}, ["flash_attention_9"]),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_bad_requests(name, tmp_path, capfd):
    changes, parts = CASES[name]
    (tmp_path / "zero.json").write_text('{"zero_optimization":\n oops}')
    (tmp_path / "typo.json").write_text('{"zero_optimization": {"stage": 2, "overlap_com": true}}')
    (tmp_path / "batch.json").write_text(
        '{"train_batch_size": 64, "train_micro_batch_size_per_gpu": 3, "zero_optimization": {"stage": 2}}'
    )
    values = {}
    for key, value in changes.items():
        # a model is made by a function, and None leaves a flag out
        if callable(value):
            values[key] = value()
        else:
            values[key] = None if value is None else str(value).format(tmp=tmp_path)
    message = refusal(main, alpaca(tmp_path, **values), capfd)
    assert all(part in message for part in parts), message
    assert not (tmp_path / "run").exists(), "the corrected command needs no other --output_dir"


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 269060552\n"
SPOILED = {
    "a pointer": ({"model.safetensors": LFS}, ["model.safetensors is a Git LFS pointer", "`git lfs pull`"]),
    "cut off": ({"model.safetensors": b"\0" * 99}, ["model.safetensors is truncated or damaged"]),
    "a pointer in an index": (
        {"model.safetensors": None, "model-1.safetensors": LFS, "model.safetensors.index.json": b'{"weight_map": {"a": "model-1.safetensors"}}'},
        ["model-1.safetensors is a Git LFS pointer"],
    ),
    "a file that is not loaded": ({"consolidated.safetensors": LFS}, None),
    "an adapter beside it": ({"adapter_config.json": b"{}"}, ["(config.json) and a LoRA adapter (adapter_config.json)"]),
}  # fmt: skip


@pytest.mark.parametrize("case", SPOILED)
def test_weights_that_cannot_be_read(case, tmp_path, capfd):
    files, parts = SPOILED[case]
    folder = Path(shutil.copytree(tiny_llama(), tmp_path / "model"))
    for name, raw in files.items():
        (folder / name).unlink(missing_ok=True)
        if raw is not None:
            (folder / name).write_bytes(raw)
    argv = [*alpaca(tmp_path, model_name_or_path=folder), "--dry_run"]
    if parts is None:
        assert main(argv) == 0
    else:
        message = refusal(main, argv, capfd)
        assert all(part in message for part in parts), message
    assert not (tmp_path / "run").exists()


def test_an_adapter_whose_base_is_a_hub_name_names_the_base(tmp_path, capfd):
    (tmp_path / "adapter").mkdir()
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": "org/base",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj"],
    }
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    shutil.copy(Path(tiny_llama()) / "model.safetensors", tmp_path / "adapter" / "adapter_model.safetensors")
    message = refusal(main, alpaca(tmp_path, model_name_or_path=tmp_path / "adapter"), capfd)
    assert "model org/base is a hub name" in message and f"{tmp_path / 'adapter' / 'adapter_config.json'} (base" in message


FROZEN = """
from dsrecipes.recipes.alpaca_llama_sft import AlpacaLlamaSft

class Frozen(AlpacaLlamaSft):
    def load_model(self, model_config, dtype, deepspeed):
        return super().load_model(model_config, dtype, deepspeed=deepspeed).requires_grad_(False)
"""


def test_a_model_with_nothing_to_train(tmp_path, capfd):
    (tmp_path / "frozen.py").write_text(FROZEN)
    message = refusal(main, alpaca(tmp_path, recipe=tmp_path / "frozen.py", profile=None), capfd)
    assert "no parameter that can be trained" in message


@pytest.mark.parametrize("command", ["chat", "evaluate", "compare", "verify", "export"])
def test_a_run_whose_base_model_is_gone(command, lora_run, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"hello\n")))
    folder = Path(shutil.copytree(lora_run, tmp_path / "run"))
    text = (folder / "config.yaml").read_text().replace(tiny_llama(), "/gone/base")
    (folder / "config.yaml").write_text(text)
    more = {"export": ["--to", tmp_path / "out"]}.get(command, [])
    message = refusal(cli.main, [command, folder, *more], capfd)
    assert (
        "base model" in message
        and "/gone/base" in message
        and f"correct model_name_or_path in {folder / 'config.yaml'}" in message
    )
    assert "--model_name_or_path" not in message


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory):
    """A run of one step that trained an adapter."""
    folder = tmp_path_factory.mktemp("lora")
    assert main(alpaca(folder, lora_r=4)) == 0
    return folder / "run"


def test_a_prequantized_model_with_zero3(tmp_path, capfd):
    shutil.copytree(tiny_llama(), tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "awq", "bits": 4}})
    )
    argv = alpaca(tmp_path, model_name_or_path=tmp_path / "model", deepspeed="zero3")
    message = refusal(main, argv, capfd)
    assert all(part in message for part in ("pre-quantized (awq)", "ZeRO-3", "--load_in_4bit", "zero2"))


def test_skipped_rows_are_counted(tmp_path, capfd):
    rows = write_rows(tmp_path / "bad.jsonl", [*instructions(6), {"instruction": "x"}, {"output": 3}])
    assert main([*alpaca(tmp_path, dataset=rows), "--skip_bad_rows", "--dry_run"]) == 0
    assert "dropped 2 bad rows" in capfd.readouterr().out


def test_an_existing_run_folder(tmp_path, capfd):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    message = refusal(main, alpaca(tmp_path), capfd)
    assert "exists and is not empty" in message and "--resume_from_checkpoint auto" in message
    assert "DSR336" in refusal(main, alpaca(tmp_path, overwrite_output_dir=True), capfd)
    assert (tmp_path / "run" / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"dataset": "gone.jsonl"}, "no such file"),
        ({"optim": "lomo"}, "--optim lomo"),
        ({"attn_implementation": "flash_attention_9"}, "flash_attention_9"),
        ({"dataset": "{tmp}/run/rows.jsonl"}, "--overwrite_output_dir would delete"),
        ({"model_name_or_path": "{tmp}/run/model"}, "--overwrite_output_dir would delete"),
    ],
)
def test_an_old_run_is_not_deleted_for_a_command_that_is_refused(tmp_path, capfd, changes, part):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("recipe: alpaca_llama_sft\n")
    write_rows(run / "rows.jsonl", instructions(4))
    shutil.copytree(tiny_llama(), run / "model")
    changes = {key: value.format(tmp=tmp_path) for key, value in changes.items()} | {"overwrite_output_dir": True}
    assert part in refusal(main, alpaca(tmp_path, **changes), capfd)
    assert len(list(run.rglob("*.jsonl"))) == 1 and (run / "model" / "model.safetensors").is_file()


def test_a_full_disk_is_refused(tmp_path, capfd):
    with small_disk(tmp_path / "disk") as disk:
        message = refusal(main, alpaca(tmp_path, output_dir=disk / "run"), capfd)
    assert "no space left on the disk" in message and str(disk / "run") in message


def test_a_disk_without_room_for_a_checkpoint_costs_no_training(tmp_path, capfd):
    changes = {
        "recipe": "gpt2_clm", "model_name_or_path": "starter:gpt2", "from_scratch": True, "dataset": "starter:data/prose.txt",
        "lora_r": 0, "save_steps": 1, "max_length": 16, "max_steps": 2,
    }  # fmt: skip
    with small_disk(tmp_path / "disk", "size=65m") as disk:
        assert main(alpaca(tmp_path, output_dir=disk / "run", **changes)) == 0
        out = capfd.readouterr().out
        assert out.count("step 1 is not saved") == 1 and "step 2 is in no checkpoint" in out
        assert (disk / "run" / "model" / "model.safetensors").is_file()


def test_verbose_shows_the_traceback(tmp_path, capfd):
    assert main([*alpaca(tmp_path, dataset="gone.jsonl"), "--verbose"]) == 2
    err = capfd.readouterr().err
    assert "Traceback" in err and "error: --dataset gone.jsonl" in err


UNNEEDED = ("torch._inductor.compile_fx", "datasets", "pandas", "peft", "bitsandbytes", "scipy")
PROGRAM = """
import sys, torch
from dsrecipes.run import main
compile = torch.compile
assert main() == 0 and torch.compile is compile and "deepspeed.runtime.zero.stage_1_and_2" in sys.modules
print([name for name in {names} if sys.modules.get(name)])
"""


@pytest.mark.ranks
def test_a_run_imports_nothing_that_it_does_not_need(tmp_path):
    argv = ["run.py", "--recipe", "gpt2_clm", "--profile", "starter", "--use_cpu", "--dry_run"]
    program = f"import sys; sys.argv = {argv}\n" + PROGRAM.format(names=UNNEEDED)
    for _ in range(2):  # the first prepares the rows, for which pyarrow imports pandas
        done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr
