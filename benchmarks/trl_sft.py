"""TRL's SFTTrainer; runs in .bench/trl (make bench-envs) and is started by bench.py.

.bench/trl/bin/python benchmarks/trl_sft.py --name trl-packing --model .bench/model --data .bench/rows/FOLDER --out /tmp/o
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from datasets import load_dataset
from meter import LENGTH, RATE, Counted, Meter, arguments, micro_batch, write_prepared, write_result
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

PLAIN = {"train_sampling_strategy": "sequential"}
"""Rows lie in the file in an order in which each step's have 2,048 tokens together."""
CONFIGS: dict[str, dict[str, Any]] = {
    "trl-plain": {**PLAIN, "per_device_train_batch_size": 2},
    "trl-packing": {"packing": True, "per_device_train_batch_size": 4},
    "trl-best": {"packing": True, "per_device_train_batch_size": 1, "loss_type": "chunked_nll"},
}
"""Found by trying: README.md."""


def configuration(args: argparse.Namespace) -> dict[str, Any]:
    """The contestant's settings, with as many micro batches as fill a step."""
    config = CONFIGS[args.name] | args.set
    rows = 4 if config.get("packing") else args.rows_per_step
    micro = micro_batch(rows, config["per_device_train_batch_size"])
    return config | {"per_device_train_batch_size": micro, "gradient_accumulation_steps": rows // micro}


def trainer(args: argparse.Namespace, config: dict[str, Any], meter: Meter) -> SFTTrainer:
    """A trainer as TRL's quick start makes it; what is not in `config` is the same for all contestants."""
    own = {"max_length": LENGTH} | config
    attention = own.pop("attn_implementation", "sdpa")
    settings = SFTConfig(
        output_dir=str(args.out), max_steps=args.steps, learning_rate=RATE, weight_decay=0.0,
        lr_scheduler_type="constant", max_grad_norm=1.0, optim="adamw_torch_fused", use_cpu=True, bf16=False,
        gradient_checkpointing=False, save_strategy="no", logging_steps=1, report_to="none", disable_tqdm=True,
        dataset_num_proc=args.workers, model_init_kwargs={"dtype": "float32", "attn_implementation": attention}, **own,
    )  # fmt: skip
    return SFTTrainer(
        model=args.model, args=settings, processing_class=AutoTokenizer.from_pretrained(args.model),
        train_dataset=load_dataset("json", data_files=str(args.data / "trl.jsonl"), split="train"), callbacks=[meter],
    )  # fmt: skip


def prepare(args: argparse.Namespace) -> None:
    """Time the reading of the rows and SFTTrainer's own preparation of them."""
    spent: list[float] = []
    original = SFTTrainer._prepare_dataset

    def timed(*given: Any, **named: Any) -> Any:
        began = time.perf_counter()
        made = original(*given, **named)
        spent.append(time.perf_counter() - began)
        return made

    began = time.perf_counter()
    rows = load_dataset("json", data_files=str(args.data / "trl.jsonl"), split="train")
    spent.append(time.perf_counter() - began)
    SFTTrainer._prepare_dataset = timed
    made = trainer(args, configuration(args), Meter())  # finds the rows read already
    write_prepared(args, sum(spent), len(rows), len(made.train_dataset))


def main() -> None:
    """Train, and write the result and the weights."""
    args = arguments(__doc__, tuple(CONFIGS))
    torch.set_num_threads(2)
    if args.prepare:
        return prepare(args)
    meter, config = Meter(), configuration(args)
    run = trainer(args, config, meter)
    counted = Counted(run.data_collator, keep=4)
    run.data_collator = counted
    run.train()
    write_result(args, config, meter, counted.tokens, counted.seen)
    if not args.no_save:
        run.save_model(str(args.out / "model"))


if __name__ == "__main__":
    main()
