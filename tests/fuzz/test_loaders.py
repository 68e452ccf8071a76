"""Fuzzing: every loader answers damaged input with a clear message or with success, and has no other effect."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from support.fuzzing import SECRETS, TEXTS, changed, fuzz, holds, json_file, snapshot, spoiled, text_of, values, write
from support.tiny import STARTER, instructions, llama_tokenizer, tiny_bert, tiny_gpt2, tiny_llama

from dsrecipes.config.encoding import EncodeOptions
from dsrecipes.config.find import find_config, find_recipe, find_zero
from dsrecipes.config.layers import layer, parse_flags
from dsrecipes.config.parse import build_config
from dsrecipes.config.schema import ModelConfig
from dsrecipes.data.decode import SUFFIXES
from dsrecipes.data.load import load_splits
from dsrecipes.data.prepare import prepare
from dsrecipes.data.questions import sources
from dsrecipes.evaluation.judge_file import JudgeFile
from dsrecipes.evaluation.rows import EvaluationRows
from dsrecipes.evaluation.verdict import read_rubric
from dsrecipes.inference.finished import open_run
from dsrecipes.inference.generate import PartialAnswers
from dsrecipes.io.console import Console
from dsrecipes.model.checks import check_model
from dsrecipes.model.configuration import load_config
from dsrecipes.model.load import load_model
from dsrecipes.model.tokenizer import check_vocabulary, load_tokenizer
from dsrecipes.publish.verify import verify
from dsrecipes.reporting import charts, tables
from dsrecipes.reporting.recorded import RecordedRun, read_json
from dsrecipes.reporting.report import report
from dsrecipes.runs.checkpoint_manifest import hash_files, write_manifest
from dsrecipes.runs.folder import RunFolder, find_checkpoints, find_run
from dsrecipes.runs.weights import read_tensors, weight_files
from dsrecipes.zero.blocks import check_blocks
from dsrecipes.zero.resolve import TrainerValues, check_with_deepspeed, read_zero, resolve

from support.finished_runs import made_run  # isort: skip

pytestmark = pytest.mark.ranks  # a minute
RECIPES = ("gpt2_clm", "alpaca_llama_sft", "bert_tmmlu_qa", "seq_classification")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a case's files: nothing may be written outside it, and no secret inside it."""
    base = tmp_path_factory.mktemp("fuzz")
    (base / "outside").mkdir()
    (base / "inside").mkdir()
    before, where = dict(os.environ), Path.cwd()
    os.environ |= SECRETS
    os.chdir(base / "outside")
    yield base / "inside"
    os.chdir(where)
    os.environ.clear()
    os.environ |= before
    assert not snapshot(base / "outside")
    for path in base.rglob("*"):
        if path.is_file():
            raw = path.read_bytes()
            assert not any(secret.encode() in raw for secret in SECRETS.values()), path


@st.composite
def lines_of(draw: st.DrawFn, value: list[dict]) -> bytes:
    """A .jsonl file with wrong values, or with wrong bytes."""
    lines = draw(changed(value))
    raw = b"\n".join(map(text_of, lines if isinstance(lines, list) else [lines])) + b"\n"
    return draw(spoiled(raw)) if draw(st.booleans()) else raw


# ---- YAML and flags ----

CONFIG = {
    "recipe": "gpt2_clm", "profile": "starter", "dataset": "starter:data/prose.txt", "max_length": 64, "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine", "deepspeed": "zero2", "lr_scheduler_kwargs": {"num_cycles": 2}, "warmup_steps": None,
    "global_batch_size": 8, "per_device_train_batch_size": 4, "lora_target_modules": ["c_attn"], "subjects": ["physics"],
    "use_cpu": True, "save_strategy": "steps", "optim": "adamw_torch", "report_to": ["none"], "no_packing": True,
}  # fmt: skip
YAML_LINES = (
    "a: &a [1]\nb: *a", "learning_rate: 2026-13-45", "seed: 0x_", "seed: 0b", "seed: !!int abc", "seed: !!float abc", "seed: !!bool abc",
    "seed: !!timestamp abc", "seed: !!binary abc", "seed: !!set {a, b}", "seed: !!omap [a: 1]", "seed: !!map [1, 2]",
    "seed: !!python/object/apply:os.system ['touch x']", "seed: !!python/name:os.system", "seed: 99:99:99", "? [1, 2]\n: 3", "{}: 1",
    "seed: &s [*s]", "seed: &s {s: *s}", "max-length: 3", "<<: {seed: 1}", "<<: 3", "<<: [1]", "%YAML 9.9\n---\na: 1", "a: 1\n---\nb: 2",
    "seed: |2\n x", "\tseed: 1", "seed: '", "!!str recipe: x", "null: 1", "seed: 2026-01-01", "dataset: 1_0", "lora_r: .inf",
    "num_train_epochs: .inf", "num_train_epochs: .nan", "seed: -1", "max_steps: 1e3", "=: 1", "seed: =", "- a", "seed: !x y",
)  # fmt: skip


def configured(path: Path) -> None:
    build_config(layer({"config": str(path)}))


@fuzz(200)
@given(st.data())
def test_yaml(folder: Path, data: st.DataObject) -> None:
    text = yaml.safe_dump(data.draw(changed(CONFIG, ("starter", "about", "config", "bf16", "num_train_epochs", "seed")))
                          if data.draw(st.booleans()) else CONFIG, allow_unicode=True).encode()  # fmt: skip
    if data.draw(st.booleans()):
        text += data.draw(st.sampled_from(YAML_LINES)).encode()
    if data.draw(st.booleans()):
        text = data.draw(spoiled(text))
    path = write(folder / "config.yaml", text)
    holds(lambda: configured(path))


@fuzz(250)
@given(st.lists(st.sampled_from((*(f"--{key}" for key in CONFIG), "--config", "--no_packing=true", "--=x", "--", "-", "-x", "--bf16"))
                | st.sampled_from(TEXTS) | st.text(max_size=6), max_size=6))  # fmt: skip
def test_flags(folder: Path, words: list[str]) -> None:
    holds(lambda: build_config(layer(parse_flags(["--recipe", "gpt2_clm", "--profile", "starter", *words]))))


@fuzz(150)
@given(st.sampled_from(sorted(CONFIG)), values)
def test_python_values(folder: Path, key: str, value: Any) -> None:
    holds(lambda: build_config(layer({"recipe": "gpt2_clm", "profile": "starter"} | {key: value})))


@fuzz(60)
@given(st.sampled_from(TEXTS) | st.text(max_size=10), st.sampled_from((
    find_config, find_zero, find_recipe, find_run, load_splits, read_rubric, lambda name: find_checkpoints(name, None, print),
    lambda name: list(sources(name, [])), lambda name: load_config(ModelConfig(model_name_or_path=name), "AutoModelForCausalLM"),
)))  # fmt: skip
def test_names(folder: Path, name: str, find: Callable[[str], Any]) -> None:
    holds(lambda: find(name))


# ---- ZeRO JSON ----

ZERO = {
    "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": 1, "gradient_clipping": 1.0,
    "fp16": {"enabled": "auto"}, "bf16": {"enabled": False},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": [0.9, 0.999], "eps": "auto"}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": "auto"}},
    "zero_optimization": {"stage": 3, "overlap_comm": False, "reduce_bucket_size": "auto", "offload_param": {"device": "cpu"},
                          "offload_optimizer": {"device": "nvme", "nvme_path": "auto"}, "stage3_max_reuse_distance": "auto"},
}  # fmt: skip


@fuzz(250)
@given(json_file(ZERO, ("zero_force_ds_cpu_optimizer", "steps_per_print", "zero_optimisation")))
def test_zero(folder: Path, raw: bytes) -> None:
    path = write(folder / "zero.json", raw)

    def read() -> None:
        config = build_config(layer({"recipe": "gpt2_clm", "profile": "starter", "deepspeed": str(path)}))
        zero = read_zero(path)
        _ = zero.stage, zero.uses_nvme, zero.uses_muon, zero.offloads_optimizer
        engine = resolve(zero, _gpt2_config(), TrainerValues(4, 2, 1, "fp32", config.train), [])
        check_with_deepspeed(engine, path)
        check_blocks(engine, path, False)

    holds(read)


def _gpt2_config() -> Any:
    return load_config(ModelConfig(model_name_or_path=tiny_gpt2()), "AutoModelForCausalLM")


# ---- data ----

ROWS = {
    "gpt2_clm": [{"text": "Rain falls.", "end": True}, {"text": "Snow is cold and white."}],
    "alpaca_llama_sft": [*instructions(2), {"messages": [{"role": "user", "content": "2?"}, {"role": "assistant", "content": "3."}]}],
    "bert_tmmlu_qa": [{"question": f"{n}?", "A": "a", "B": 2, "C": "c", "D": "d", "answer": "B"} for n in range(4)],
    "seq_classification": [{"text": f"Rain {n}.", "label": label, "weight": 1} for n, label in enumerate(["a", 2, ["a", "2"], 2.5])],
}  # fmt: skip


def files_of(rows: list[dict]) -> dict[str, bytes]:
    """EvaluationRows as each kind of file."""
    import pandas

    flat = [{key: value if isinstance(value, str) else json.dumps(value) for key, value in row.items()} for row in rows]
    parquet = io.BytesIO()
    pandas.DataFrame(flat).to_parquet(parquet)
    table = pandas.DataFrame(flat)
    return {
        ".json": text_of(rows), ".jsonl": b"\n".join(map(text_of, rows)), ".csv": table.to_csv(index=False).encode(),
        ".tsv": table.to_csv(index=False, sep="\t").encode(),
        ".parquet": parquet.getvalue(), ".txt": b" = Rain = \n\nRain falls.\n\n = Snow = \n\nSnow is cold.\n",
    }  # fmt: skip


def prepared(path: Path, recipe: str, style: str, skip: bool, packed: int) -> None:
    """The rows of a file to tokens, as a run does it."""
    from dsrecipes.recipe_class import recipe_class

    layers = layer({"recipe": recipe, "profile": "full", "dataset": str(path), "skip_bad_rows": skip})
    story = recipe_class(layers.recipe)(layers)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(STARTER / "bert") if recipe.startswith("bert") else llama_tokenizer()
    prepare(type(story), story.load_rows(), tokenizer, EncodeOptions(packed, style), validation_split=0.3, seed=1,
            skip_bad_rows=skip, console=Console(out=io.StringIO()))  # fmt: skip


@fuzz(400)
@given(st.data())
def test_data(folder: Path, data: st.DataObject) -> None:
    recipe = data.draw(st.sampled_from(RECIPES))
    suffix = data.draw(st.sampled_from(SUFFIXES)) + data.draw(st.sampled_from(("", "", ".gz")))
    rows = data.draw(changed(ROWS[recipe])) if data.draw(st.booleans()) and suffix.startswith(".json") else ROWS[recipe]
    raw = text_of(rows) if rows is not ROWS[recipe] else files_of(rows)[suffix.removesuffix(".gz")]
    if suffix.startswith(".jsonl") and isinstance(rows, list):
        raw = b"\n".join(map(text_of, rows))
    if data.draw(st.booleans()):
        raw = data.draw(spoiled(raw))
    path = write(folder / f"physics_test{suffix}", raw)
    if suffix.endswith(".gz") and data.draw(st.booleans()):
        path.write_bytes(data.draw(spoiled(path.read_bytes())))
    try:
        holds(lambda: prepared(path, recipe, data.draw(st.sampled_from(("alpaca", "chat"))), data.draw(st.booleans()), 64))
    finally:
        path.unlink()


# ---- models ----

MODELS = {"AutoModelForCausalLM": (tiny_gpt2, tiny_llama), "AutoModelForMultipleChoice": (tiny_bert,),
          "AutoModelForSequenceClassification": (tiny_bert, tiny_llama)}  # fmt: skip


@pytest.fixture(scope="module")
def model_copy(folder: Path) -> Callable[[str], Path]:
    """A fresh copy of a model folder, always in the same place."""

    def copy(source: str) -> Path:
        target = folder / "model"
        shutil.rmtree(target, ignore_errors=True)
        return shutil.copytree(source, target)

    return copy


def loaded(path: Path, auto: str, **options: Any) -> None:
    """All that a run does before it trains."""
    import torch

    asked = ModelConfig(model_name_or_path=str(path), **options)
    config = load_config(asked, auto)
    check_model(config, asked, 16, 0)
    tokenizer = load_tokenizer(asked)
    check_vocabulary(tokenizer, config)
    load_model(asked, config, auto, torch.float32, 0, False)
    tokenizer(["Read 3 pages."])


@fuzz(250)
@given(st.data())
def test_model_folder(folder: Path, model_copy: Callable[[str], Path], data: st.DataObject) -> None:
    auto = data.draw(st.sampled_from(sorted(MODELS)))
    path = model_copy(data.draw(st.sampled_from(MODELS[auto]))())
    file = data.draw(st.sampled_from(sorted(path.iterdir())))
    raw = file.read_bytes()
    if file.suffix == ".json":
        small = json.loads(raw)
        extra = (
            "auto_map",
            "quantization_config",
            "architectures",
            "model_type",
            "rope_parameters",
            "torch_dtype",
            "tokenizer_class",
        )
        file.write_bytes(data.draw(json_file(small, extra)))
    else:
        file.write_bytes(data.draw(spoiled(raw)))
    holds(lambda: loaded(path, auto, **data.draw(st.sampled_from(({}, {"lora_r": 2}, {"lora_r": 2, "load_in_4bit": True})))))


INDEX = {
    "metadata": {"total_size": 1},
    "weight_map": {"transformer.wte.weight": "model.safetensors", "x": "../../../../etc/passwd"},
}


@fuzz(80)
@given(json_file(INDEX, ("weight_map",)))
def test_index(folder: Path, model_copy: Callable[[str], Path], raw: bytes) -> None:
    path = model_copy(tiny_gpt2())
    (path / "model.safetensors").rename(path / "model-00001-of-00001.safetensors")
    write(path / "model.safetensors.index.json", raw)
    holds(lambda: [name for file in weight_files(path) for name, _ in read_tensors(file)])
    holds(lambda: loaded(path, "AutoModelForCausalLM"))


# ---- run folders ----

LOG = [
    {"step": n, "epoch": n / 4, "time": 1e9 + n, "loss": 5.0 - n, "learning_rate": 1e-3, "grad_norm": 1.0}
    for n in range(1, 4)
]
RUN_FILES: dict[str, Any] = {
    "log.jsonl": LOG, "metrics.json": {"step": 3, "train_loss": 2.0, "eval_accuracy_by_group": {"STEM": {"accuracy": 1.0, "questions": 2}}},
    "environment.json": {"command": "dsrecipes train", "devices": [], "packages": {"torch": "2"}, "origins": {"seed": "flag"}, "ranks": 1},
    "data.json": {"train": {"rows": 3, "kept": 2, "dropped": {"bad row": 1}, "lengths": {"edges": [0, 1, 2], "counts": [1, 2]}}},
    "VERIFIED.json": {"date": "x", "tensors": 3, "largest_difference": 0.0, "allowed": 1e-4, "files": {"model.safetensors": "0"}},
    "samples.jsonl": [{"prompt": "a", "answer": "b"}], "judge.json": {"a": [1, {"b": [2]}]},
}  # fmt: skip


@pytest.fixture(scope="module")
def run_folder(folder: Path) -> Path:
    """A run folder whose model was never trained."""
    run = made_run(folder / "run", "gpt2_clm", tiny_gpt2(), dataset="starter:data/prose.txt", max_length=64)
    for name, value in RUN_FILES.items():
        write(run / name, b"\n".join(map(text_of, value)) if name.endswith("l") else text_of(value))
    return run


@fuzz(40)
@given(st.data())
def test_report(run_folder: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(RUN_FILES)))
    whole = (run_folder / name).read_bytes()
    value = RUN_FILES[name]
    raw = data.draw(json_file(value))
    if name.endswith("l") and data.draw(st.booleans()):
        lines = data.draw(changed(value))
        raw = b"\n".join(map(text_of, lines)) if isinstance(lines, list) else raw
    try:
        write(run_folder / name, raw)
        holds(lambda: report(run_folder, out=run_folder / "report.html", lang="en"))
    finally:
        write(run_folder / name, whole)


@fuzz(200)
@given(st.data())
def test_recorded(run_folder: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(RUN_FILES)))
    whole = (run_folder / name).read_bytes()
    try:
        write(run_folder / name, data.draw(lines_of(RUN_FILES[name]) if name.endswith("l") else json_file(RUN_FILES[name])))
        holds(lambda: reported(run_folder))
    finally:
        write(run_folder / name, whole)


def reported(path: Path) -> None:
    """All that a report reads and computes, without its HTML."""
    run = RecordedRun(RunFolder(path), "run")
    for chart in (*charts.curves([run]), *charts.lengths([run])):
        chart.table()
    for value in (run.metrics, run.environment, run.verified, run.splits):
        tables.tables(value, "x", 1000)
        tables.nested([("run", value)])
    for split in run.splits:
        run.dropped(split)
    [tables.tables(read_json(other), "x", 1000) for other in run.others]


@fuzz(60)
@given(st.data())
def test_run_folder(run_folder: Path, data: st.DataObject) -> None:
    whole = (run_folder / "config.yaml").read_bytes()
    config = yaml.safe_load(whole)
    try:
        raw = yaml.safe_dump(data.draw(changed(config, ("trust_remote_code", "lora_r")))).encode()
        write(run_folder / "config.yaml", raw if data.draw(st.booleans()) else data.draw(spoiled(whole)))
        holds(lambda: EvaluationRows(open_run(str(run_folder))).items("train"))
    finally:
        write(run_folder / "config.yaml", whole)


@pytest.fixture(scope="module")
def checkpoint(folder: Path) -> Path:
    """What is_whole takes for a checkpoint."""
    path = folder / "dead" / "checkpoints" / "checkpoint-20"
    path.mkdir(parents=True)
    (path.parent / "checkpoint-\u00b2").mkdir()
    (path / "trainer_state.json").write_text("{}")
    write_manifest(path, hash_files(path, ["trainer_state.json"]), {"ranks": 1, "zero": 2}, {})
    return path


@fuzz(80)
@given(json_file({"made_by": {"ranks": 1, "zero": 2}, "files": {"trainer_state.json": 2, "../../x": 3}}))
def test_manifest(checkpoint: Path, raw: bytes) -> None:
    write(checkpoint / "manifest.json", raw)
    run = RunFolder(checkpoint.parents[1])
    for asked in ("auto", "step20", str(checkpoint)):
        holds(lambda asked=asked: find_checkpoints(asked, run, print))


JOB = {"prompts": "0" * 64, "items": 2}
JUDGED = [
    {"kind": "job", **JOB}, {"kind": "answer", "item": 0, "of": "run", "text": "a"},
    {"kind": "judgement", "item": 0, "order": "run first", "verdict": "A", "requests": 1, "prompt_tokens": 3, "completion_tokens": 3,
     "replies": ["VERDICT: A"]},
    {"kind": "judgement", "item": 0, "order": "other first", "verdict": None, "requests": 1, "prompt_tokens": None,
     "completion_tokens": 3, "replies": [""]},
    {"kind": "check", "requests": 1, "prompt_tokens": 1, "completion_tokens": 1},
]  # fmt: skip


@fuzz(200)
@given(st.data())
def test_job_files(folder: Path, data: st.DataObject) -> None:
    judged, partial = folder / "judge.jsonl", folder / "answers.jsonl.partial"
    write(judged, data.draw(lines_of(JUDGED)))
    write(partial, data.draw(lines_of([{"kind": "job", **JOB}, {"index": 0, "answer": "x"}, {"index": 1, "answer": "y"}])))

    def read_judged() -> None:
        with JudgeFile(judged, JOB) as file:
            file.summary()
            "".join(file.answers.values())

    def read_partial() -> None:
        with PartialAnswers(folder / "answers.jsonl", JOB) as file:
            "".join(file.done[index] for index in (0, 1) if index in file.done)

    holds(read_judged)
    holds(read_partial)


@pytest.fixture(scope="module")
def verifiable(folder: Path) -> Path:
    """A run folder that verify finds in order."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from dsrecipes.runs.reference import logits_of, random_inputs, saved_fingerprints, tokenizer_facts

    run = made_run(folder / "verifiable", "gpt2_clm", tiny_gpt2(), dataset="starter:data/prose.txt", max_length=64)
    ids = random_inputs("AutoModelForCausalLM", 2048, 16, 0)
    logits = logits_of(AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.float32), ids, "AutoModelForCausalLM")
    facts = {
        "step": 1, "auto_class": "AutoModelForCausalLM", "precision": "fp32", "dtype": "float32", "learned": True,
        "tokenizer": tokenizer_facts(AutoTokenizer.from_pretrained(run / "model")), "weights": saved_fingerprints(run / "model"),
        "files": {},
    }  # fmt: skip
    kept = {"random ids/input_ids": ids["input_ids"], "random ids/logits": logits}
    save_file(kept, run / "expected.safetensors", metadata={"facts": json.dumps(facts)})
    assert verify(str(run))["largest_difference"] == 0
    return run


@fuzz(120)
@given(st.data())
def test_verify(verifiable: Path, data: st.DataObject) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    model = [path.relative_to(verifiable) for path in sorted((verifiable / "model").iterdir())]
    path = verifiable / data.draw(st.sampled_from([Path("expected.safetensors"), Path("expected.safetensors"), *model]))
    whole = path.read_bytes()
    try:
        if path.name == "expected.safetensors" and data.draw(st.booleans()):
            with safe_open(path, "pt") as file:
                facts = json.loads(file.metadata()["facts"])
            facts |= {data.draw(st.sampled_from(sorted(facts))): data.draw(values)}
            save_file(load_file(path), path, metadata={"facts": json.dumps(facts)})
        elif path.suffix == ".json":
            path.write_bytes(data.draw(json_file(json.loads(whole))))
        else:
            head = min(len(whole), 2000)  # the names and shapes, which come before the numbers
            path.write_bytes(
                data.draw(spoiled(whole[:head])) + whole[head:] if data.draw(st.booleans()) else data.draw(spoiled(whole))
            )
        holds(lambda: verify(str(verifiable)))
    finally:
        path.write_bytes(whole)
