"""What is wrong with a step, what to try, and what to change when memory ran out."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from dsrecipes.model.memory import is_out_of_memory
from dsrecipes.train.diagnosis import Health, health, nan_remedies
from dsrecipes.train.memory import Load, out_of_memory, remedies

RUN = {"max_grad_norm": 1.0, "learning_rate": 2e-4}
LOAD = Load(
    micro=4, accumulation=2, world=8, max_length=2048, checkpointing=False, stage=2, offloads=False, lora_r=0, in_4bit=False,
    on_device=True, weights=14_000_000_000, states=98_000_000_000,
)  # fmt: skip


def test_the_greatest_result_of_the_ranks_is_that_of_the_step():
    nan, inf = math.nan, math.inf
    assert health([1.0, 0.0], 2.0, False) == Health.OK
    assert health([0.0, 0.0], None, False) == Health.NO_LOSS
    assert health([1.0, nan], 2.0, False) == health([-inf], nan, False) == Health.BAD_LOSS
    assert health([1.0], inf, False) == health([0.0], nan, False) == Health.BAD_NORM
    assert health([1.0], inf, overflowed=True) == Health.OK
    # a rank may have only padding in an epoch's last step
    assert max(Health.NO_LOSS, Health.OK) == Health.OK and max(Health.OK, Health.BAD_NORM) == Health.BAD_NORM


def test_remedies_are_those_that_are_on():
    on = {"zero_optimization": {"overlap_comm": True}}
    assert [text[:12] for text in nan_remedies(Health.BAD_LOSS, RUN | {"max_grad_norm": 0}, on, "fp16")] == [
        "set overlap_", "--bf16 true ", "--max_grad_n", "a tenth of t",
    ]  # fmt: skip
    assert nan_remedies(Health.BAD_NORM, RUN, {}, "bf16") == [
        "a tenth of the learning rate (--learning_rate 2e-05) or a longer warmup (--warmup_steps)"
    ]
    assert ["labels" in text for text in nan_remedies(Health.NO_LOSS, RUN, on, "fp16")] == [False, True]


def names(**changed: object) -> list[str]:
    """The flags that are proposed, in order."""
    return [text.split(" (")[0] for text in remedies(dataclasses.replace(LOAD, **changed))]


def test_what_to_change_has_the_numbers_of_the_run():
    assert remedies(LOAD) == [
        "--per_device_train_batch_size 2 --gradient_accumulation_steps 4 (now 4 and 2; the same 64 sequences a step)",
        "--gradient_checkpointing true (activations of one layer at a time; a third slower)",
        "--max_length 1024 (now 2048; longer rows are dropped)",
        "--deepspeed zero3 (weights 14 GB a rank, then 1.75 GB)",
        "--deepspeed zero2_offload (12.2 GB of optimizer states a rank go to host memory)",
        "--lora_r 16 (gradients and optimizer states are 98 GB now)",
    ]


def test_what_is_on_or_would_not_help_is_left_out():
    assert names(micro=1)[0] == "--gradient_checkpointing true"
    assert names(micro=3)[0] == "--per_device_train_batch_size 1 --gradient_accumulation_steps 6"
    assert "--deepspeed zero3" not in names(world=1) + names(stage=3)
    assert names(stage=3, micro=1, checkpointing=True, max_length=64) == ["--deepspeed zero3_offload", "--lora_r 16"]
    assert names(on_device=False, world=1, micro=1, checkpointing=True, lora_r=8)[-1] == "--load_in_4bit true"
    assert names(training=False) == ["--deepspeed zero3", "--lora_r 16"]
    everything = {"micro": 1, "checkpointing": True, "stage": 3, "offloads": True, "lora_r": 8, "in_4bit": True}
    assert names(**everything, max_length=64) == []
    assert out_of_memory(dataclasses.replace(LOAD, **everything, max_length=64), 0, MemoryError(), "in step 1") == (
        "rank 0 ran out of device memory in step 1: MemoryError. Take a smaller model or more memory."
    )


def test_which_errors_say_that_memory_ran_out():
    with pytest.raises(RuntimeError) as allocator:
        torch.empty(1 << 60)
    for error in (allocator.value, MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")):
        assert is_out_of_memory(error), error
    for error in (RuntimeError("size mismatch"), OSError(28, "No space left on device"), ValueError("out of memory")):
        assert not is_out_of_memory(error), error
