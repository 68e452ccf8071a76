"""Small models and data for tests on real ranks: the bundled ones made smaller, and stories260K where it is there."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support.rank_pool import Ranks

STARTER = Path(__file__).parents[2] / "dsrecipes" / "starter"
STORIES = Path(__file__).parents[3] / "shared" / "data" / "models" / "stories260K"
STAGES = ("none", "zero0", "zero1", "zero2", "zero3")
LORA = {"lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.1}
RUN = {
    "max_steps": 10, "global_batch_size": 4, "per_device_train_batch_size": 1, "per_device_eval_batch_size": 3,
    "learning_rate": 1e-3, "warmup_steps": 2, "logging_steps": 1, "eval_strategy": "steps", "eval_steps": 5,
    "save_steps": 5, "profile": "starter", "deepspeed": "none",
    "verify_model": False, "hang_timeout": 300,
}  # fmt: skip
"""What all small runs share: on two ranks micro 1 x accumulation 2."""


@dataclass
class Small:
    """Small models and data in `folder`, and runs of the recipes on them by name."""

    folder: Path
    recipes: dict[str, tuple[str, dict[str, Any]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Make models and data."""
        llama = (two_layers if STORIES.is_dir() else random_llama)(self.folder / "llama")
        text = {"dataset": str(prose(self.folder / "prose.txt")), "validation_split": 0.2, "max_length": 64}
        asked = {"dataset": str(questions(self.folder / "questions")), "max_length": 48}
        rows = {"dataset": str(instructions(self.folder / "instructions.json")), "max_length": 400}
        chat = rows | {"model_name_or_path": str(llama), "prompt_style": "alpaca", "validation_split": 0.2}
        self.recipes = {
            "gpt2": ("gpt2_clm", text | fresh(gpt2(self.folder / "gpt2", dropout=0.1))),
            "gpt2 without dropout": ("gpt2_clm", text | fresh(gpt2(self.folder / "gpt2-still", dropout=0.0))),
            "bert": ("bert_tmmlu_qa", asked | fresh(bert(self.folder / "bert", dropout=0.1))),
            "bert without dropout": ("bert_tmmlu_qa", asked | fresh(bert(self.folder / "bert-still", dropout=0.0))),
            "alpaca": ("alpaca_llama_sft", chat | {"lora_r": 0}),
            "alpaca unpacked": ("alpaca_llama_sft", chat | {"lora_r": 0, "packing": False}),
            "lora": ("alpaca_llama_sft", chat | LORA),
            "qlora": ("qlora_zero3", chat | LORA | {"load_in_4bit": True}),
        }

    def values(self, name: str, **changed: Any) -> dict[str, Any]:
        """{"recipe", "values"} of a run for a pool's case."""
        recipe, values = self.recipes[name]
        return {"recipe": recipe, "values": RUN | values | changed}


@dataclass
class Runs:
    """Ten steps of every recipe at every stage on two ranks, each done once, when first asked for."""

    ranks: Ranks
    small: Small
    folder: Path
    done: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)

    def get(self, name: str, stage: str) -> dict[str, Any]:
        """What tests/support/rank_cases.py:train_and_probe returns on rank 0."""
        if (name, stage) not in self.done:
            case = self.small.values(name, deepspeed=stage, output_dir=str(self.folder / f"{name}-{stage}"))
            self.done[name, stage] = self.ranks.run("train_and_probe", **case)[0]
        return self.done[name, stage]


def _model(folder: Path, tokenizer: str, **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(STARTER / tokenizer / name, folder)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def fresh(folder: Path) -> dict[str, Any]:
    """Flags for random weights of a folder's configuration."""
    return {"model_name_or_path": str(folder), "from_scratch": True}


def gpt2(folder: Path, dropout: float) -> Path:
    """A GPT-2 of two layers, configuration and tokenizer alone."""
    return _model(
        folder, "gpt2", architectures=["GPT2LMHeadModel"], model_type="gpt2", n_layer=2, n_head=4, n_embd=64,
        n_positions=128, vocab_size=2048, bos_token_id=0, eos_token_id=0, attn_pdrop=dropout, embd_pdrop=dropout,
        resid_pdrop=dropout,
    )  # fmt: skip


def bert(folder: Path, dropout: float) -> Path:
    """A BERT of two layers for multiple choice, configuration and tokenizer alone."""
    return _model(
        folder, "bert", architectures=["BertForMultipleChoice"], model_type="bert", hidden_size=64, num_hidden_layers=2,
        num_attention_heads=4, intermediate_size=128, max_position_embeddings=64, vocab_size=2161, pad_token_id=0,
        hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
    )  # fmt: skip


def two_layers(folder: Path) -> Path:
    """The first two of the five layers of stories260K; at ZeRO-3 the time of a step goes with the number of modules."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(STORIES, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    weights = load_file(STORIES / "model.safetensors")
    left_out = tuple(f"model.layers.{layer}." for layer in range(2, config["num_hidden_layers"]))
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith(left_out)}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def random_llama(folder: Path) -> Path:
    """A Llama of two layers with random weights, for where stories260K is not."""
    import torch
    from support.tiny import llama_tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    # weights of 0.02 make gradient norms depend on the order of sums by more than tests of equal runs allow
    config = LlamaConfig(
        vocab_size=600, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, bos_token_id=1, eos_token_id=2, tie_word_embeddings=True,
        initializer_range=0.1,
    )  # fmt: skip
    llama_tokenizer().save_pretrained(folder)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def prose(path: Path) -> Path:
    """The first paragraphs of the bundled prose, each a row of its own so that some can be held out."""
    paragraphs = (STARTER / "data" / "prose.txt").read_text(encoding="utf-8").split("\n\n")
    rows = [json.dumps({"text": each}) for each in paragraphs if each.strip()][:24]
    path = path.with_suffix(".jsonl")
    path.write_text("\n".join(rows), encoding="utf-8")
    return path


def instructions(path: Path) -> Path:
    """Some short instructions of the bundled ones; several fit into a packed sequence of 400 tokens."""
    rows = json.loads((STARTER / "data" / "instructions.json").read_text(encoding="utf-8"))
    short = [row for row in rows if sum(map(len, row.values())) < 260 and "".join(row.values()).isascii()]
    path.write_text(json.dumps(short[:21]), encoding="utf-8")
    return path


def questions(folder: Path) -> Path:
    """The questions of the first six bundled subjects."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted((STARTER / "data" / "tmmlu").glob("*.csv"))[:18]:
        shutil.copy(path, folder)
    return folder
