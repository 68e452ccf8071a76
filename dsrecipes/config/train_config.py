"""How do our training flags become transformers.TrainingArguments, and a process group that works on CPU too?

Apart from schema.py because importing TrainingArguments loads torch, accelerate, peft and bitsandbytes.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property

import torch
from transformers import TrainingArguments

from dsrecipes.config.schema import DataConfig, ModelConfig, RunConfig


@dataclass(kw_only=True)
class TrainConfig(RunConfig, TrainingArguments):  # type: ignore[misc]  # deepspeed and report_to have narrower types here
    """transformers.TrainingArguments with the fields of a run; under a launcher, building one creates the process group."""

    @cached_property
    def _setup_devices(self) -> torch.device:
        """Give DeepSpeed and DDP real gloo ranks on CPU.

        accelerate counts one process there: its DeepSpeed path knows no CPU backend, and its plain path needs use_cpu. Two
        ranks would silently train two models.
        """
        if self._on_accelerator():
            device = super()._setup_devices
            # No DataParallel, which would divide the rows of a micro batch among the GPUs.
            self._n_gpu = min(self._n_gpu, 1)
            return device
        from accelerate.state import AcceleratorState, PartialState
        from accelerate.utils import DistributedType

        AcceleratorState._reset_state(reset_partial_state=True)
        if self.deepspeed:
            import deepspeed

            deepspeed.init_distributed("gloo", auto_mpi_discovery=False, timeout=self.ddp_timeout_delta)
        # A single plain process has no rank, so accelerate cannot create a group for it.
        group = {"backend": "gloo", "timeout": self.ddp_timeout_delta} if "RANK" in os.environ else {}
        self.distributed_state = PartialState(cpu=True, **group)
        if self.deepspeed:
            self.distributed_state.distributed_type = DistributedType.DEEPSPEED
        self._n_gpu = 0
        return torch.device("cpu")

    def _on_accelerator(self) -> bool:
        return not self.use_cpu and torch.accelerator.is_available()


CONFIG_CLASSES = (ModelConfig, DataConfig, TrainConfig)
"""The dataclasses whose fields are the flags of `dsrecipes train`."""
