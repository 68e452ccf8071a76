"""The model and the rows of the benchmark, the same for all contestants, and the loss of a model on held-out rows.

python benchmarks/bench.py step        makes them on first use, in .bench/
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
from meter import LENGTH, TOKENS

EOS_ID = 2
"""SmolLM2's <|im_end|>; the last token of every row."""
HELD_OUT = 64
"""Rows that nobody trains on."""
_STEPS = 64
"""Steps whose rows are chosen to have 2,048 tokens."""
_VERSION = "1"
"""Change it with what make_rows writes."""


def make_model(folder: Path, vocabulary: int = 49152) -> Path:
    """A Llama of 31 M parameters with SmolLM2's tokenizer (and vocabulary, if no other is asked for), seed 0."""
    if (folder / "config.json").is_file():
        return folder
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from dsrecipes.model.bundled import BUNDLED_MODEL
    from dsrecipes.model.weights_source import local_model

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=384, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=True, bos_token_id=1,
        eos_token_id=EOS_ID, pad_token_id=EOS_ID,
    )  # fmt: skip
    AutoTokenizer.from_pretrained(local_model(BUNDLED_MODEL)).save_pretrained(folder)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def read_rows(files: list[Path]) -> list[dict[str, Any]]:
    """Alpaca rows of JSON files, plain or gzipped."""
    rows = []
    for file in files:
        with gzip.open(file, "rt") if file.suffix == ".gz" else file.open(encoding="utf-8") as source:
            rows += json.load(source)
    return rows


def make_rows(files: list[Path], model: Path, root: Path, *, all_rows: bool = False) -> Path:
    """Write the rows in each contestant's own form, all of them the same text and the same tokens.

    Left out and counted: rows without an answer, and, unless `all_rows`, those longer than 512 tokens and those that
    come out otherwise where prompt and answer are tokenized as one text, as TRL does.

    Returns:
        A folder with alpaca.json (ours), tokens.jsonl (naive), trl.jsonl, lf/, held_out.jsonl and info.json.
    """
    from dsrecipes.recipes.alpaca_llama_sft import AlpacaLlamaSft, _segments
    from transformers import AutoTokenizer

    from dsrecipes.config.encoding import EncodeOptions

    key = hashlib.sha256(b"\0".join([*(file.read_bytes() for file in files), str(all_rows).encode(), _VERSION.encode()]))
    folder = root / key.hexdigest()[:12]
    if (folder / "info.json").is_file():
        return folder
    tokenizer = AutoTokenizer.from_pretrained(model)
    dropped = {"without an answer": 0, f"longer than {LENGTH} tokens": 0, "tokens across the answer's beginning": 0}
    rows: list[dict[str, Any]] = []
    for row in read_rows(files):
        try:
            record = AlpacaLlamaSft.format_row(row)
        except ValueError:
            dropped["without an answer"] += 1
            continue
        (prompt, _), (answer, _) = _segments(record)
        rows.append({"row": row, "prompt": prompt, "completion": answer, "record": record})
    encoded = AlpacaLlamaSft.encode([row["record"] for row in rows], tokenizer, EncodeOptions(LENGTH, "alpaca"))
    joint = tokenizer([row["prompt"] + row["completion"] + tokenizer.eos_token for row in rows])["input_ids"]
    kept = []
    for row, ids, labels, whole in zip(rows, encoded["input_ids"], encoded["labels"], joint, strict=True):
        if not all_rows and len(ids) > LENGTH:
            dropped[f"longer than {LENGTH} tokens"] += 1
        elif not all_rows and ids != whole:
            dropped["tokens across the answer's beginning"] += 1
        else:
            kept.append(row | {"input_ids": ids, "labels": labels})
    held = []
    rows_per_step = 0
    if not all_rows:
        random.Random(0).shuffle(kept)
        held, kept = kept[:HELD_OUT], kept[HELD_OUT:]
        mean = sum(len(row["input_ids"]) for row in kept) / len(kept)
        rows_per_step = 2 * max(1, round(TOKENS / mean / 2))
        kept = in_equal_steps(kept, rows_per_step)
    info = {"files": [file.name for file in files], "rows": len(kept), "rows_per_step": rows_per_step, "dropped": dropped}
    _write(folder, kept, held, tokenizer.eos_token, info)
    return folder


def in_equal_steps(rows: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Order the rows so that each `count` of them in turn have 2,048 tokens together, the first 64 steps.

    Rows are taken as they come; up to three are then exchanged for those further on that mend the sum.
    """
    lengths = np.array([len(row["input_ids"]) for row in rows])
    order = np.arange(len(rows))
    for start in range(0, min(_STEPS * count, len(rows) - count - 1), count):
        end = start + count
        for _ in range(3):
            step, near = lengths[order[start:end]], lengths[order[end : end + 400]]
            off = np.abs(TOKENS - step.sum() + step[:, None] - near[None])
            mine, other = np.unravel_index(off.argmin(), off.shape)
            order[[start + mine, end + other]] = order[[end + other, start + mine]]
    return [rows[i] for i in order]


def _write(folder: Path, kept: list[dict], held: list[dict], eos: str, info: dict[str, Any]) -> None:
    (folder / "lf").mkdir(parents=True, exist_ok=True)

    def lines(rows: list[dict], *keys: str) -> str:
        return "".join(json.dumps({key: row[key] for key in keys}) + "\n" for row in rows)

    (folder / "alpaca.json").write_text(json.dumps([row["row"] for row in kept]))
    (folder / "tokens.jsonl").write_text(lines(kept, "input_ids", "labels"))
    (folder / "held_out.jsonl").write_text(lines(held, "input_ids", "labels"))
    (folder / "trl.jsonl").write_text(lines(kept, "prompt", "completion"))  # adds the eos itself
    own = [{"instruction": row["prompt"], "input": "", "output": row["completion"] + eos} for row in kept]
    (folder / "lf" / "rows.json").write_text(json.dumps(own))
    (folder / "lf" / "dataset_info.json").write_text(json.dumps({"bench": {"file_name": "rows.json"}}))
    (folder / "info.json").write_text(json.dumps(info))


def read_tokens(file: Path) -> list[dict[str, list[int]]]:
    """Rows of input_ids and labels."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def arithmetic_limit(folder: Path) -> float:
    """Useful tokens a second of a machine that does nothing but this model's matrix products, at the rate measured now.

    6 operations for each weight of the layers and each token, and for each weight of the head and each token that has a
    label (forward and both halves of the backward pass); the rate is that of products of 2,048 x 2,048 matrices, fp32.
    """
    import torch

    rows = read_tokens(folder / "tokens.jsonl")
    share = sum(label != -100 for row in rows for label in row["labels"]) / sum(len(row["labels"]) for row in rows)
    layer = 384 * 384 * 2 + 2 * 384 * 128 + 3 * 384 * 1024
    torch.set_num_threads(2)
    a, b = torch.rand(2048, 2048), torch.rand(2048, 2048)
    seconds = []
    for _ in range(12):
        began = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - began)
    return 2 * 2048**3 / sorted(seconds)[6] / (6 * (8 * layer + share * 384 * 49152))


def matching(seen: list[dict[str, list[int]]], folder: Path) -> float | None:
    """Part of a contestant's first rows that are token by token, label by label rows of ours; None without any.

    A packed sequence is cut behind each label that is an eos; what is left behind the last is padding.
    """
    ours = {(tuple(row["input_ids"]), tuple(row["labels"])) for row in read_tokens(folder / "tokens.jsonl")}
    found = []
    for row in seen:
        start = 0
        for end in [i + 1 for i, label in enumerate(row["labels"]) if label == EOS_ID]:
            found.append((tuple(row["input_ids"][start:end]), tuple(row["labels"][start:end])) in ours)
            start = end
    return sum(found) / len(found) if found else None


def held_out_loss(model: Path, folder: Path, rows: int = HELD_OUT) -> float:
    """Loss per supervised token on held-out rows, one at a time and without padding."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(2)
    net = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    total = count = 0.0
    with torch.no_grad():
        for row in read_tokens(folder / "held_out.jsonl")[:rows]:
            labels = torch.tensor(row["labels"])[1:]
            logits = net(torch.tensor([row["input_ids"]])).logits[0, :-1]
            total += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
            count += (labels != -100).sum().item()
    return total / count if count else math.nan
