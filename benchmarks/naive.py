"""Plain PyTorch loops, as tutorials write them and as well as they can be written; started by bench.py.

.venv/bin/python benchmarks/naive.py --name packed-selected --model .bench/model --data .bench/rows/FOLDER --out /tmp/o
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import numpy as np
import torch
from inputs import EOS_ID, read_tokens
from meter import LENGTH, RATE, TOKENS, Meter, arguments, write_result
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, PreTrainedModel

from dsrecipes.data.pack import pack

IGNORE = -100
Row = dict[str, list[int]]
CONFIGS: dict[str, dict[str, object]] = {
    "pad-to-max": {"per_device_train_batch_size": 4, "width": LENGTH},
    "pad-to-longest": {"per_device_train_batch_size": 4},
    "packed": {"per_device_train_batch_size": 4, "packing": True},
    "packed-selected": {"per_device_train_batch_size": 4, "packing": True, "select": True},
    "packed-by-example": {"per_device_train_batch_size": 4, "packing": True, "select": True, "attention": "by_example"},
}
"""`width`: tokens of every row; `select`: logits only where a label is; `attention`: sdpa where it is not named."""


def by_example(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    *,
    position_ids: torch.Tensor,
    scaling: float,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """Causal attention of each packed example by itself; query is (batch, heads, length, size)."""
    batch, heads, length, size = query.shape
    starts = (position_ids.flatten() == 0).nonzero().flatten()
    lengths = torch.diff(starts, append=torch.tensor([batch * length])).tolist()
    parts = [states.transpose(1, 2).flatten(0, 1).split(lengths) for states in (query, key, value)]
    outputs = [
        scaled_dot_product_attention(
            *(states.transpose(0, 1)[None] for states in part), is_causal=True, scale=scaling, enable_gqa=True
        ).transpose(1, 2)
        for part in zip(*parts, strict=True)
    ]
    return torch.cat(outputs, 1).view(batch, length, heads, size), None


AttentionInterface.register("by_example", by_example)
AttentionMaskInterface.register("by_example", lambda *args, **kwargs: None)


def padded(items: list[list[Row]], width: int | None) -> dict[str, torch.Tensor]:
    """Sequences of one or several rows to (sequences, width) tensors; every row's position ids begin at 0."""
    width = width or max(sum(len(row["input_ids"]) for row in item) for item in items)
    ids = torch.full((len(items), width), EOS_ID)
    positions, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORE)
    for line, item in enumerate(items):
        start = 0
        for row in item:
            end = start + len(row["input_ids"])
            ids[line, start:end] = torch.tensor(row["input_ids"])
            labels[line, start:end] = torch.tensor(row["labels"])
            positions[line, start:end] = torch.arange(end - start)
            start = end
        positions[line, start:] = torch.arange(width - start)
    return {"input_ids": ids, "position_ids": positions, "labels": labels}


def steps(rows: list[Row], args: argparse.Namespace, packing: bool) -> Iterator[list[list[Row]]]:
    """The sequences of each step: packed ones drawn at random, rows in the file's order."""
    if packing:
        bins = pack([len(row["input_ids"]) for row in rows], LENGTH)
        order, count = np.random.default_rng(0).permutation(len(bins)), TOKENS // LENGTH
        items = [[rows[i] for i in bins[index]] for index in order]
    else:
        items, count = [[row] for row in rows], args.rows_per_step
    for step in range(args.steps):
        yield items[step * count : (step + 1) * count]


def loss_of(model: PreTrainedModel, batch: dict[str, torch.Tensor], packing: bool, select: bool) -> torch.Tensor:
    """Summed loss over the labels of a micro batch."""
    labels = batch.pop("labels")[:, 1:]
    if not packing:  # as tutorials do: a mask of the text; the position ids are the same for every row
        batch["attention_mask"] = (torch.arange(len(batch["position_ids"][0])) == batch.pop("position_ids")).long()
    wanted = torch.nn.functional.pad(labels != IGNORE, (0, 1))
    logits = model(**batch, logits_to_keep=wanted if select else 0, use_cache=False).logits
    if select:
        return cross_entropy(logits.flatten(0, -2), labels[labels != IGNORE], reduction="sum")
    return cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten(), reduction="sum")


def main() -> None:
    """Train, and write the result and the weights."""
    args = arguments(__doc__, tuple(CONFIGS))
    config = CONFIGS[args.name] | args.set
    micro, packing, select = (
        int(config["per_device_train_batch_size"]),
        bool(config.get("packing")),
        bool(config.get("select")),
    )
    torch.set_num_threads(2)
    model = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=torch.float32, attn_implementation=config.get("attention", "sdpa")
    )
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0, fused=True)
    rows = read_tokens(args.data / "tokens.jsonl")
    meter, tokens = Meter(), []
    meter.take()
    for items in steps(rows, args, packing):
        wanted = sum(label != IGNORE for item in items for row in item for label in row["labels"])
        total = 0.0
        for start in range(0, len(items), micro):
            loss = loss_of(model, padded(items[start : start + micro], config.get("width")), packing, select) / wanted
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        meter.take()
        meter.losses.append(total)
        tokens.append(sum(len(row["input_ids"]) for item in items for row in item))
    write_result(args, config, meter, tokens)
    if not args.no_save:
        model.save_pretrained(args.out / "model")


if __name__ == "__main__":
    main()
