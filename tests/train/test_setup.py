"""Ranks, device, engine, precision and batch, resolved from environment and configuration."""

import contextlib
import os
from pathlib import Path

import pytest
import torch
from support.tiny import SHARED, needs_shared

from dsrecipes.config.layers import layer
from dsrecipes.config.parse import build_config
from dsrecipes.config.train_config import TrainConfig
from dsrecipes.errors import UserError, plural
from dsrecipes.runs.checkpoint_manifest import write_manifest
from dsrecipes.train.setup import resolve_setup
from dsrecipes.zero.limits import check_zeropp
from dsrecipes.zero.process import describe_hardware

RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    """Restore the environment, which resolving a setup completes."""
    threads = torch.get_num_threads()
    monkeypatch.setattr("dsrecipes.train.setup.computes_bf16", lambda: False)
    for key in (*RANKS, "CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR"):
        # set and deleted, so that monkeypatch also removes what the code under test sets
        monkeypatch.setenv(key, "")
        monkeypatch.delenv(key)
    yield
    torch.set_num_threads(threads)


def place(**values):
    return resolve_setup(build_config(layer({"recipe": "gpt2_clm", "profile": "starter", "use_cpu": True, **values})))


def test_one_process_on_a_cpu():
    here = place()
    assert (here.ranks.world, here.device, here.precision, here.zero.stage) == (1, "cpu", "fp32", 2)
    assert os.environ["RANK"] == "0" and int(os.environ["MASTER_PORT"]) and os.environ["CUDA_VISIBLE_DEVICES"] == ""
    assert here.micro * here.accumulation == 8 and here.fallback is None
    assert "ZeRO-2" in here.name() and here.made_by() == {
        "ranks": 1,
        "zero": 2,
        "sequences": 8,
        "layout": [None, False, False],
        "hardware": describe_hardware("cpu"),
    }
    plain = place(deepspeed="none")
    assert plain.zero is None and plain.name() == "plain PyTorch" and "RANK" not in os.environ


def test_the_batch_is_the_same_on_more_ranks(monkeypatch):
    for key, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(key, value)
    here = place(per_device_train_batch_size=2)
    assert (here.ranks.rank, here.micro, here.accumulation) == (1, 2, 2)
    # the global batch of 8 is the profile's, and gives way to the user's value
    odd = place(per_device_train_batch_size=3)
    assert (odd.micro, odd.accumulation) == (3, 1) and odd.notes[0].startswith("global_batch_size 8 became 6")
    with pytest.raises(UserError, match=r"global_batch_size 8 \(flag\) = per_device_train_batch_size 3 \(flag\)"):
        place(per_device_train_batch_size=3, global_batch_size=8)


def test_the_cores_are_divided(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for key, value in {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(key, value)
    place(per_device_train_batch_size=2)
    assert torch.get_num_threads() == 4


@pytest.mark.parametrize(
    ("values", "precision", "plain"),
    [
        ({}, "fp32", torch.float32),
        ({"bf16": True}, "bf16", torch.float32),
        ({"bf16": True, "lora_r": 4}, "bf16", torch.bfloat16),
    ],
)
def test_precision_and_dtype(values, precision, plain):
    here = place(**values, deepspeed="none")
    config = build_config(layer({"recipe": "gpt2_clm", "profile": "starter", **values}))
    assert here.precision == precision and here.dtype(config.model) == plain


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"fp16": True}, "fp16 needs a GPU; on a CPU give --fp16 false"),
        ({"deepspeed": "none", "require_deepspeed": True}, "--require_deepspeed and --deepspeed none contradict"),
        ({"deepspeed": "zero5"}, "--deepspeed zero5: no such file or name"),
    ],
)
def test_requests_that_cannot_be_met_are_refused(values, problem):
    with pytest.raises(UserError, match=problem):
        place(**values)


@pytest.fixture
def gpus(monkeypatch):
    """Two GPUs without bf16, as far as the setup can see."""
    monkeypatch.setattr("dsrecipes.train.setup._accelerator", lambda: "cuda")
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        (
            {},
            "stage 0 of DeepSpeed in fp16, which is the default on this GPU, as it has no bf16: .*--deepspeed zero1.*--fp16 false",
        ),
        ({"fp16": True}, "stage 0 of DeepSpeed in fp16: .*--deepspeed zero1"),
    ],
)
def test_stage_0_in_fp16_is_refused(gpus, values, problem):
    with pytest.raises(UserError, match=problem):
        place(use_cpu=False, deepspeed="zero0", **values)


def test_stage_0_in_other_precisions_and_other_stages_in_fp16_are_not(gpus):
    assert place(use_cpu=False, deepspeed="zero0", bf16=True).precision == "bf16"
    assert place(use_cpu=False, deepspeed="zero0", fp16=False).precision == "fp32"
    assert place(use_cpu=False, deepspeed="zero1").precision == "fp16"
    assert place(use_cpu=False, deepspeed="none").precision == "fp16"


@pytest.mark.parametrize(("visible", "left"), [(None, "0"), ("3,1", "3"), ("GPU-a,GPU-b", "GPU-a")])
def test_one_plain_process_has_one_gpu_and_no_rank(gpus, monkeypatch, visible, left):
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    here = place(use_cpu=False, deepspeed="none")
    assert (here.device, here.ranks.world, here.zero) == ("cuda", 1, None)
    assert not set(RANKS) & set(os.environ) and os.environ["CUDA_VISIBLE_DEVICES"] == left
    place(use_cpu=False)  # DeepSpeed needs a process group
    assert os.environ["RANK"] == "0"


def test_several_gpus_in_one_process_are_no_data_parallel(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    args = TrainConfig(output_dir=str(tmp_path), deepspeed=None)
    assert (args.n_gpu, args.parallel_mode.value, args.train_batch_size) == (1, "not_parallel", 8)


ZEROPP = {"zero_quantized_weights": True, "zero_hpz_partition_size": 8, "zero_quantized_gradients": True}


@pytest.mark.parametrize(
    ("section", "world", "device", "problem"),
    [
        ({"stage": 3, **ZEROPP}, 1, "cpu", r"z\.json: zero_quantized_weights, zero_quantized_gradients: .*only on a GPU.*; zero_hpz_partition_size is 8, which does not divide the 1 rank: set 1 \[DSR252\]$"),
        ({"stage": 3, **ZEROPP}, 4, "cuda", "zero_hpz_partition_size is 8, which does not divide the 4 ranks: set 1 or 2 or 4 \\[DSR252\\]$"),
        ({"stage": 3, **ZEROPP}, 16, "cuda", None),
        ({"stage": 3, "zero_hpz_partition_size": 2}, 2, "cpu", None),
        ({"stage": 2, "zero_hpz_partition_size": 8}, 2, "cpu", None),
        ({"stage": 3, "zero_hpz_partition_size": 0}, 2, "cuda", "zero_hpz_partition_size is 0"),
        ({"stage": 3, "zero_quantized_nontrainable_weights": True}, 2, "cpu", "zero_quantized_nontrainable_weights: .*only on a GPU"),
        ({"stage": 3, "zero_quantized_weights": False, "zero_hpz_partition_size": 1}, 3, "cpu", None),
    ],
)  # fmt: skip
def test_zeropp_where_it_cannot_run(section, world, device, problem):
    with pytest.raises(UserError, match=problem) if problem else contextlib.nullcontext():
        check_zeropp(Path("z.json"), section, world, device)


@needs_shared
def test_zeropp_json_of_others():
    with pytest.raises(UserError, match=r"zeropp\.json: .*only on a GPU; .*8, which does not divide"):
        place(deepspeed=str(SHARED / "cases" / "zero" / "zeropp.json"))


def test_without_deepspeed_the_setup_is_plain_and_says_why(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "deepspeed", None)
    here = place()
    assert here.zero is None and "deepspeed" in here.fallback and "does not import" in here.fallback
    with pytest.raises(UserError, match=r"DeepSpeed cannot start: .*pip install 'deepspeed<"):
        place(require_deepspeed=True)


def test_accelerates_deepspeed_and_none_contradict(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UserError, match="--use_deepspeed` and --deepspeed none contradict"):
        place(deepspeed="none")


def resumed(tmp_path, made, world, monkeypatch, **values):
    """The setup of a run that resumes from a checkpoint written elsewhere."""
    for key, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(world), "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(key, value)
    write_manifest(tmp_path, {}, made, {})
    config = build_config(
        layer(
            {"recipe": "gpt2_clm", "profile": "starter", "use_cpu": True, "resume_from_checkpoint": str(tmp_path), **values}
        )
    )
    here = resolve_setup(config)
    here.check_checkpoint(tmp_path, config.train)
    return here


@pytest.mark.parametrize(
    ("world", "values", "batch"),
    [
        (1, {}, (4, 2)),
        (4, {}, (2, 1)),
        (2, {"per_device_train_batch_size": 3}, (2, 2)),
        (2, {"global_batch_size": None, "gradient_accumulation_steps": 5, "per_device_train_batch_size": 1}, (1, 4)),
        (8, {"global_batch_size": None, "per_device_train_batch_size": 4}, (1, 1)),
    ],
)
def test_a_checkpoint_of_other_ranks_keeps_its_sequences_a_step(tmp_path, monkeypatch, world, values, batch):
    values = {"per_device_train_batch_size": 4} | values
    here = resumed(tmp_path, {"ranks": 16, "zero": 3, "sequences": 8}, world, monkeypatch, **values)
    assert (here.micro, here.accumulation) == batch and here.made_by()["sequences"] == 8
    assert here.notes[-1] == f"checkpoint of 16 ranks, ZeRO-3 resharded for {plural(world, 'rank')}, ZeRO-2"


@pytest.mark.parametrize(
    ("made", "problem"),
    [
        ({"ranks": 2, "zero": 2}, "written by 2 ranks, ZeRO-2 and does not say how many sequences a step had"),
        (
            {"ranks": 2, "zero": 2, "sequences": 8},
            "8 sequences a step, which 3 ranks cannot share: resume on 1 or 2 or 4 ranks",
        ),
    ],
)
def test_a_checkpoint_whose_steps_cannot_be_divided_is_refused(tmp_path, monkeypatch, made, problem):
    with pytest.raises(UserError, match=problem):
        resumed(tmp_path, made, 3, monkeypatch, global_batch_size=None, per_device_train_batch_size=2)


def test_the_same_setup_and_unsharded_states_are_loaded_directly(tmp_path, monkeypatch):
    assert not resumed(tmp_path, {"ranks": 2, "zero": None, "sequences": 8}, 1, monkeypatch, deepspeed="none").notes
    assert not resumed(tmp_path, {"ranks": 1, "zero": 2, "sequences": 8}, 1, monkeypatch).notes
    elsewhere = {"ranks": 1, "zero": 2, "sequences": 8, "layout": [None, True, False]}
    # DeepSpeed would load it without an error, with each state in a wrong position
    assert resumed(tmp_path, elsewhere, 1, monkeypatch).notes


def test_a_checkpoint_of_another_cpu_is_resumed_with_a_note(tmp_path, monkeypatch):
    made = {"ranks": 1, "zero": 2, "sequences": 8, "layout": [None, False, False]}
    elsewhere = resumed(tmp_path, made | {"hardware": "a CPU (AVX2, 96 threads)"}, 1, monkeypatch)
    assert len(elsewhere.notes) == 1
    assert elsewhere.notes[0].startswith("checkpoint written on a CPU (AVX2, 96 threads), resumed on a CPU (")


def test_a_cpu_that_computes_bf16_says_so_unless_a_precision_is_given(monkeypatch):
    monkeypatch.setattr("dsrecipes.train.setup.computes_bf16", lambda: True)
    assert [note for note in place().notes if "--bf16 true" in note]
    assert place().precision == "fp32" and not place(bf16=True).notes and not place(bf16=False).notes
