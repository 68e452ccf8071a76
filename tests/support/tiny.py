"""Tiny models and tokenizers, made once a session, and what a command line that fails says."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from dsrecipes.base import RecipeBase
    from dsrecipes.train.state import Run, RunResult

ROOT = Path(__file__).resolve().parents[2]
STARTER = ROOT / "dsrecipes" / "starter"
SHARED = ROOT.parent / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the real data of ../shared/data are not here")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
TWO_METHODS = """
from dsrecipes import RecipeBase

class Mine(RecipeBase):
    @staticmethod
    def format_row(row): return {"text": row["text"]}
    @staticmethod
    def encode(records, tokenizer, options): return {"input_ids": [[1, 2]], "labels": [[1, 2]]}
"""
"""A recipe as short as can be."""
_KEPT = tempfile.TemporaryDirectory(prefix="dsrecipes-tests-")


@functools.cache
def tiny_gpt2() -> str:
    """A folder with a GPT-2 of 2 layers, 32 wide, without dropout, and the starter tokenizer."""
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, set_seed

    set_seed(0)
    config = GPT2Config(
        vocab_size=2048, n_layer=2, n_head=2, n_embd=32, n_positions=256, bos_token_id=0, eos_token_id=0,
        attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
    )  # fmt: skip
    return _saved("gpt2", GPT2LMHeadModel(config), AutoTokenizer.from_pretrained(STARTER / "gpt2"))


@functools.cache
def tiny_llama() -> str:
    """A folder with a grouped-query Llama of 2 layers; its tokenizer leads with bos, has no pad and has a chat template."""
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    set_seed(0)
    tokenizer = llama_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, bos_token_id=1, eos_token_id=2, tie_word_embeddings=True,
    )  # fmt: skip
    return _saved("llama", LlamaForCausalLM(config), tokenizer)


@functools.cache
def tiny_moe(family: str) -> str:
    """A folder with a mixture of four experts whose configuration has the router loss on."""
    from transformers import AutoConfig, AutoModelForCausalLM, set_seed

    set_seed(0)
    tokenizer = llama_tokenizer()
    config = AutoConfig.for_model(
        family, vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, moe_intermediate_size=16, head_dim=8,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, num_experts=4,
        num_local_experts=4, num_experts_per_tok=2, output_router_logits=True, router_aux_loss_coef=0.1, bos_token_id=1,
        eos_token_id=2, sliding_window=None,
    )  # fmt: skip
    return _saved(family, AutoModelForCausalLM.from_config(config), tokenizer)


@functools.cache
def tiny_gemma3() -> str:
    """A folder with a Gemma 3 that has a part for images."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, set_seed

    set_seed(0)
    tokenizer = llama_tokenizer()
    text = {
        "vocab_size": len(tokenizer) + 8, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "sliding_window": 512,
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
        "patch_size": 14,
    }  # fmt: skip
    ids = {"image_token_index": 600, "boi_token_index": 601, "eoi_token_index": 602}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, **ids)
    return _saved("gemma3", Gemma3ForConditionalGeneration(config), tokenizer)


@functools.cache
def llama_tokenizer():
    """A byte-level BPE with Llama's habits: <s> before every text, </s> never added, no pad token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokens = Tokenizer(models.BPE())
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokens.train([str(STARTER / "data" / "prose.txt")], trainer)
    tokens.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@functools.cache
def tiny_bert() -> str:
    """A folder with a multiple-choice BERT of 2 layers and the starter tokenizer."""
    from transformers import AutoTokenizer, BertConfig, BertForMultipleChoice, set_seed

    set_seed(0)
    config = BertConfig(
        vocab_size=2161, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=128, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return _saved("bert", BertForMultipleChoice(config), AutoTokenizer.from_pretrained(STARTER / "bert"))


def _saved(name: str, model, tokenizer) -> str:
    folder = Path(_KEPT.name) / name
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def arrow_file(columns: dict[str, list]) -> Path:
    """A file of columns as data.prepare writes them."""
    from dsrecipes.data.columns import ColumnWriter, record_batch

    path = Path(tempfile.mkdtemp(dir=_KEPT.name), "rows.arrow")
    with ColumnWriter(path) as writer:
        writer.write(record_batch(columns))
    return path


def sequences(capacity: int | None = 14, end: int = 2):
    """Five rows whose prompts of three tokens are not trained on; of 14 tokens one sequence holds the two shortest."""
    from dsrecipes.data.sequences import Sequences

    ids = [[5 + (i * j) % 50 for j in range(1, 6 + 2 * i)] + [end] for i in range(5)]
    return Sequences(arrow_file({"input_ids": ids, "labels": [[-100] * 3 + row[3:] for row in ids]}), capacity)


def sample_of(model, collate: Callable, exact: bool = True, batch: int = 1):
    """Examples together and apart, with the forward pass that a trainer would give."""
    import torch

    from dsrecipes.data.audit import packed_sample
    from dsrecipes.data.collate import TOKEN_COUNTS

    def forward(batch):
        model.eval()
        with torch.no_grad():
            counted = {name: each for name, each in batch.items() if name != TOKEN_COUNTS}
            out = model(**counted, use_cache=False, num_items_in_batch=torch.ones(()))
        return out.loss, out.logits

    return packed_sample(sequences(), batch, collate=collate, forward=forward, exact=exact)


def write_rows(path: Path, rows: list[dict]) -> str:
    """Rows as a .jsonl or .json file; returns its path."""
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) if path.suffix == ".jsonl" else f"[{','.join(lines)}]", encoding="utf-8")
    return str(path)


def instructions(count: int) -> list[dict]:
    """Alpaca rows of very different lengths."""
    return [
        {"instruction": f"Count to {n}.", "input": "", "output": " ".join(map(str, range(1, n * n % 23 + 2)))}
        for n in range(1, count + 1)
    ]


@contextlib.contextmanager
def small_disk(path: Path, options: str = "size=1m") -> Iterator[Path]:
    """A file system of 1 MB at `path`; skips where this may not be mounted."""
    path.mkdir()
    if (
        os.name != "posix"
        or subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", path], capture_output=True).returncode
    ):
        pytest.skip("mounting a small disk needs root")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", path], check=True)


def refusal(main: Callable[[list[str]], int], argv: list[str], capfd: pytest.CaptureFixture[str]) -> str:
    """The one message that a wrong command line ends with, at exit code 2."""
    capfd.readouterr()
    logging.disable()  # handlers hold the stderr of an earlier test
    try:
        code = main([str(word) for word in argv])
    finally:
        logging.disable(logging.NOTSET)
    lines = [line for line in capfd.readouterr().err.splitlines() if line.strip()]
    assert code == 2, lines
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


def run_recipe(recipe: RecipeBase) -> tuple[Run, RunResult]:
    """recipe.run(), and the state of the run, which tells what was prepared and trained."""
    from dsrecipes.train.training import Training

    training = Training(recipe)
    result = training.run()
    assert training.started is not None
    return training.started, result
