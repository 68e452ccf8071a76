"""alpaca_llama_sft and qlora_zero3: prompts, what is trained on, and whole runs in one process."""

import json

import pytest
import torch
from dsrecipes.recipes.alpaca_llama_sft import AlpacaLlamaSft
from peft import PeftModel
from support.tiny import (
    SHARED,
    STARTER,
    instructions,
    llama_tokenizer,
    needs_shared,
    run_recipe,
    tiny_gpt2,
    tiny_llama,
    write_rows,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from dsrecipes import load_recipe
from dsrecipes.config.encoding import EncodeOptions
from dsrecipes.data.encode import IGNORE
from dsrecipes.runs.folder import RunFolder
from dsrecipes.runs.log import read_log

STANFORD = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a response "
    "that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:"
)
STANFORD_ALONE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nAdd.\n\n### Response:"
)
CHAT = [
    {"role": "user", "content": "One?"}, {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "Two?"}, {"role": "assistant", "content": "No."},
]  # fmt: skip


def encoded(row, tokenizer, style="alpaca"):
    batch = AlpacaLlamaSft.encode([AlpacaLlamaSft.format_row(row)], tokenizer, EncodeOptions(512, style))
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    prompt = tokenizer.decode([token for token, label in zip(ids, labels, strict=True) if label == IGNORE])
    return prompt, tokenizer.decode([label for label in labels if label != IGNORE])


@pytest.mark.parametrize(
    ("given", "prompt"),
    [
        ("1 2", STANFORD),
        ("", STANFORD_ALONE),
        (None, STANFORD_ALONE),
        ("<noinput>", STANFORD_ALONE),
        ("NoInput ", STANFORD_ALONE),
        ('"< noinput', STANFORD_ALONE),
    ],
)
def test_stanfords_two_templates(given, prompt):
    row = {"instruction": "Add.", "input": given, "output": "3"}
    assert encoded(row, llama_tokenizer()) == (f"<s>{prompt}", "3</s>")
    assert encoded(row, AutoTokenizer.from_pretrained(STARTER / "gpt2")) == (prompt, "3<|endoftext|>")


def test_chat_rows_in_both_styles():
    tokenizer = llama_tokenizer()
    prompt, answers = encoded({"messages": CHAT}, tokenizer, "chat")
    assert answers == "Yes.</s>No.</s>" and prompt == "<s>[user]One?\n[assistant]\n[user]Two?\n[assistant]"
    assert encoded({"instruction": "Add.", "input": "1 2", "output": "3"}, tokenizer, "chat") == (
        "<s>[user]Add.\n\n1 2\n[assistant]",
        "3</s>",
    )
    sharegpt = {"conversations": [{"from": "human", "value": "Add."}, {"from": "gpt", "value": "3"}]}
    assert encoded(sharegpt, tokenizer) == (f"<s>{STANFORD_ALONE}", "3</s>")
    system = [{"role": "system", "content": "Be brief."}]
    prompt, answers = encoded({"messages": system + CHAT}, tokenizer)
    asked = [STANFORD_ALONE.replace("Add.", f"Be brief.\n\n{text}") for text in ("One?", "Two?")]
    assert answers == "Yes.</s>No.</s>" and prompt == f"<s>{''.join(asked)}"


def test_weights_of_turns_and_rows():
    """An answer of weight 0 stays in the prompt; the weights of row and turn are multiplied."""
    tokenizer = llama_tokenizer()
    for style in ("alpaca", "chat"):
        turns = [CHAT[0], CHAT[1] | {"weight": 0}, CHAT[2], CHAT[3] | {"weight": 3}]
        options = EncodeOptions(512, style)
        batch = AlpacaLlamaSft.encode([{"messages": turns, "weight": 0.5}, {"messages": CHAT}], tokenizer, options)
        labels, weights = batch["labels"][0], batch["weights"][0]
        assert tokenizer.decode([label for label in labels if label != IGNORE]) == "No.</s>"
        assert "Yes.</s>" in tokenizer.decode(batch["input_ids"][0])
        assert {weight for weight, label in zip(weights, labels, strict=True) if label != IGNORE} == {1.5}
        assert batch["weights"][1] == []
        alpaca = {"instruction": "Add.", "input": "", "output": "3", "weight": 2.0}
        batch = AlpacaLlamaSft.encode([alpaca], tokenizer, options)
        assert {w for w, label in zip(batch["weights"][0], batch["labels"][0], strict=True) if label != IGNORE} == {2.0}
        with pytest.raises(ValueError, match="the weight of the row must be .* found -1"):
            AlpacaLlamaSft.encode([alpaca | {"weight": -1}], tokenizer, options)


def test_stanfords_templates_refuse_tools():
    calls = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]
    for chat in ({"messages": CHAT, "tools": [{"name": "add"}]}, {"messages": [CHAT[0], CHAT[1] | {"tool_calls": calls}]}):
        with pytest.raises(ValueError, match="no form for tools; give --prompt_style chat"):
            AlpacaLlamaSft.encode([chat], llama_tokenizer(), EncodeOptions(512, "alpaca"))


@needs_shared
def test_every_real_row_is_taken_or_refused_for_a_reason():
    empty = {"alpaca/alpaca_5k.json": 4, "demos/alpaca_zh_demo.json": 0, "demos/identity.json": 0}
    for name, count in empty.items():
        rows = json.loads((SHARED / name).read_text("utf-8"))
        records = [AlpacaLlamaSft.format_row(row) for row in rows if row["output"].strip()]
        assert len(rows) - len(records) == count
        assert not [record["input"] for record in records if "noinput" in record["input"].lower()[:12]]


def run(recipe, tmp_path, **changes):
    rows = write_rows(tmp_path / "rows.json", instructions(40))
    values = {
        "profile": "starter", "use_cpu": True, "model_name_or_path": tiny_llama(), "dataset": rows, "prompt_style": "chat",
        "max_length": 256, "validation_split": 0.2, "global_batch_size": 4, "per_device_train_batch_size": 2, "max_steps": 2,
        "lora_r": 4, "logging_steps": 1, "eval_steps": 2, "save_steps": 2, "warmup_steps": 0, "deepspeed": "none",
        "output_dir": str(tmp_path / "run"), "verify_model": False,
    }  # fmt: skip
    return run_recipe(load_recipe(recipe, **values | changes))


def answers_alike(model, plain):
    ids = torch.arange(3, 19).view(1, 16)
    with torch.no_grad():
        return torch.allclose(model.eval()(ids, use_cache=False).logits.float(), plain.eval()(ids).logits.float(), atol=1e-5)


@pytest.mark.parametrize(
    ("recipe", "changes"),
    [
        ("alpaca_llama_sft", {"deepspeed": "none"}),
        ("alpaca_llama_sft", {"deepspeed": "zero2", "prompt_style": "alpaca", "lora_r": 0, "packing": False}),
        ("alpaca_llama_sft", {"deepspeed": "none", "lora_r": 0, "activation_checkpointing": True}),
        ("qlora_zero3", {"deepspeed": "zero3"}),
        (
            "qlora_zero3",
            {"deepspeed": "none", "load_in_4bit": False, "model_name_or_path": tiny_gpt2, "prompt_style": "alpaca"},
        ),
    ],
    ids=["lora", "full", "checkpointing", "qlora", "gpt2"],
)
def test_a_run_in_one_process(recipe, changes, tmp_path):
    changes = {key: value() if callable(value) else value for key, value in changes.items()}
    finished, result = run(recipe, tmp_path, **changes)
    folder = RunFolder(result.path)
    assert result.step == 2 and result.metrics["eval_loss"] > 0 and folder.curve.is_file()
    lines = [line for line in read_log(folder.log) if "loss" in line]
    assert len(lines) == 2 and all(line["tokens_per_second"] > 0 and line["grad_norm"] > 0 for line in lines)
    prepared = finished.prepared
    assert sum(prepared.rows.splits[name].stats.kept for name in ("train", "validation")) == 40
    packs = changes.get("packing", True)
    assert (len(prepared.sequences["train"]) < 20) == packs
    AutoTokenizer.from_pretrained(folder.model)
    if prepared.config.model.lora_r == 0:
        assert answers_alike(finished.model, AutoModelForCausalLM.from_pretrained(folder.model))
    else:
        assert (folder.model / "adapter_model.safetensors").is_file() and not (folder.model / "model.safetensors").exists()
        if not prepared.config.model.load_in_4bit:
            base = AutoModelForCausalLM.from_pretrained(prepared.config.model.model_name_or_path)
            assert answers_alike(finished.model, PeftModel.from_pretrained(base, folder.model))


def test_packing_gives_the_evaluation_loss_of_single_rows(tmp_path):
    found = []
    for packing in (True, False):
        _, result = run(
            "alpaca_llama_sft", tmp_path, packing=packing, learning_rate=0.0, max_steps=1, eval_steps=1, output_dir=str(tmp_path / f"{packing}")
        )  # fmt: skip
        found.append(result.metrics["eval_loss"])
    assert found[0] == pytest.approx(found[1], abs=1e-5)
