"""Bytes that each rank holds and sends at a ZeRO stage; bench.py starts it once for each stage and number of ranks.

.venv/bin/python -m torch.distributed.run --standalone --nproc_per_node 2 benchmarks/zero.py OUT.json FLAGS.json

It counts alone: DeepSpeed's log of communication waits for every operation, so bench.py times the steps without it.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

import deepspeed.comm
import torch
from transformers import TrainerCallback

from dsrecipes import load_recipe
from dsrecipes.zero.shards import held_bytes, storage_bytes

SMALL = 1 << 14
"""Bytes; smaller tensors are not counted among the buffers."""


def counted(engine: Any) -> dict[str, int]:
    """Bytes of this rank's parameters, gradients, optimizer states and buffers, between backward and the update.

    Buffers are all other live tensors: communication buckets, batches, rotary tables.
    """
    parts = held_bytes(engine.module, engine.optimizer)
    known = {key: size for part in parts.values() for key, size in part.items()}
    everything = (each for each in gc.get_objects() if issubclass(type(each), torch.Tensor))
    buffers = {key: size for key, size in storage_bytes(everything, known).items() if size >= SMALL}
    return {name: sum(part.values()) for name, part in (parts | {"buffers": buffers}).items()}


def sent(log: dict[str, dict[int, list]], ranks: int) -> dict[str, float]:
    """Bytes that a rank sends by operation, as ring algorithms do it; the log has calls by operation and size.

    The size of an all-gather is what a rank gives, of the other operations the whole tensor.
    """
    share = (ranks - 1) / ranks
    factor = {"all_gather": ranks - 1, "all_reduce": 2 * share}
    bytes_sent = {}
    for name, sizes in log.items():
        times = next((value for key, value in factor.items() if name.startswith(key)), share)
        bytes_sent[name] = times * sum(size * record[0] for size, record in sizes.items())
    return bytes_sent


class Count(TrainerCallback):
    """Count what is held just before the last update, and what is sent in each step."""

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.held, self.sent = trainer, {}, []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the engine before each update: afterwards gradients are gone."""
        engine = self.trainer.deepspeed
        update = engine.step

        def count_and_step(*given: Any, **named: Any) -> Any:
            self.held = counted(engine)
            return update(*given, **named)

        engine.step = count_and_step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Forget what was sent before."""
        deepspeed.comm.comm.comms_logger.reset_data()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep what the step sent."""
        self.sent.append(sent(deepspeed.comm.comm.comms_logger.comms_dict, args.world_size))


def main() -> None:
    """Train a few steps and write what rank 0 holds and sends at the last."""
    out, flags = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    trainer = load_recipe("alpaca_llama_sft", **flags).build_trainer()
    count = Count(trainer)
    trainer.add_callback(count)
    trainer.train()
    if int(os.environ.get("RANK", "0")) == 0:
        out.write_text(json.dumps({"held": count.held, "sent": count.sent[-1]}))


if __name__ == "__main__":
    main()
