"""LLaMA-Factory's supervised fine-tuning; runs in .bench/lf (make bench-envs) and is started by bench.py.

.bench/lf/bin/python benchmarks/llama_factory.py --name lf-default --model .bench/model --data .bench/rows/FOLDER --out /tmp/o
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
from llamafactory.hparams import get_train_args
from llamafactory.model import load_tokenizer
from llamafactory.train.sft import workflow
from llamafactory.train.tuner import run_exp
from meter import LENGTH, RATE, Counted, Meter, arguments, micro_batch, write_prepared, write_result

CONFIGS: dict[str, dict[str, Any]] = {
    "lf-default": {"disable_shuffling": True, "per_device_train_batch_size": 2},
    "lf-neat-packing": {"neat_packing": True, "per_device_train_batch_size": 1},
}
"""Found by trying: README.md. Rows lie in the file in an order in which each step's have 2,048 tokens together."""


def configuration(args: argparse.Namespace) -> dict[str, Any]:
    """The contestant's settings, with as many micro batches as fill a step."""
    config = CONFIGS[args.name] | args.set
    rows = 4 if config.get("neat_packing") else args.rows_per_step
    micro = micro_batch(rows, config["per_device_train_batch_size"])
    return config | {"per_device_train_batch_size": micro, "gradient_accumulation_steps": rows // micro}


def settings(args: argparse.Namespace, config: dict[str, Any]) -> dict[str, Any]:
    """The YAML of a run as a dict; what is not in `config` is the same for all contestants."""
    return {
        "stage": "sft", "do_train": True, "finetuning_type": "full", "model_name_or_path": args.model,
        "dataset": "bench", "dataset_dir": str(args.data / "lf"), "template": "empty", "cutoff_len": LENGTH,
        "preprocessing_num_workers": args.workers, "output_dir": str(args.out / "model"), "max_steps": args.steps,
        "learning_rate": RATE, "weight_decay": 0.0, "lr_scheduler_type": "constant", "max_grad_norm": 1.0,
        "optim": "adamw_torch_fused", "use_cpu": True, "bf16": False, "fp16": False, "save_strategy": "no",
        "disable_gradient_checkpointing": True, "logging_steps": 1, "report_to": "none", "disable_tqdm": True,
        **config,
    }  # fmt: skip


def prepare(args: argparse.Namespace) -> None:
    """Time LLaMA-Factory's get_dataset, which reads, tokenizes and packs."""
    model_args, data_args, training_args, _, _ = get_train_args(settings(args, configuration(args)))
    module = load_tokenizer(model_args)
    template = get_template_and_fix_tokenizer(module["tokenizer"], data_args)
    began = time.perf_counter()
    made = get_dataset(template, model_args, data_args, training_args, stage="sft", **module)
    seconds = time.perf_counter() - began
    rows = sum(1 for _ in (args.data / "trl.jsonl").open(encoding="utf-8"))
    write_prepared(args, seconds, rows, len(made["train_dataset"]))


def main() -> None:
    """Train, and write the result and the weights."""
    args = arguments(__doc__, tuple(CONFIGS))
    torch.set_num_threads(2)
    if args.prepare:
        return prepare(args)
    meter, config = Meter(), configuration(args)
    made: list[Counted] = []
    original = workflow.SFTDataCollatorWith4DAttentionMask

    def collator(*given: Any, **named: Any) -> Counted:
        made.append(Counted(original(*given, **named), keep=4))
        return made[-1]

    workflow.SFTDataCollatorWith4DAttentionMask = collator
    run_exp(settings(args, config), callbacks=[meter])
    write_result(args, config, meter, made[-1].tokens, made[-1].seen)


if __name__ == "__main__":
    main()
