"""LoRA on every kind of linear layer, alone and over a 4-bit base."""

import contextlib
import functools
import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from support.tiny import instructions, run_recipe, tiny_gemma3, tiny_gpt2, tiny_llama, write_rows
from transformers import AutoModelForCausalLM

from dsrecipes import load_recipe
from dsrecipes.config.schema import ModelConfig
from dsrecipes.errors import UserError
from dsrecipes.inference.finished import open_run
from dsrecipes.model.configuration import load_config
from dsrecipes.model.load import load_model
from dsrecipes.model.lora_targets import check_targets
from dsrecipes.model.task import count_parameters
from dsrecipes.publish.verify import load_saved
from dsrecipes.train.trainer import is_causal_lm

CAUSAL = "AutoModelForCausalLM"


def loaded(name, dtype=torch.float32, deepspeed=False, **values):
    options = ModelConfig(model_name_or_path=name, lora_r=4, **values)
    return load_model(options, load_config(options, CAUSAL), CAUSAL, dtype, 1, deepspeed)


@pytest.mark.parametrize(
    ("tiny", "layers"),
    [(tiny_gpt2, {"c_attn", "c_proj", "c_fc"}), (tiny_llama, {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"})],
)  # fmt: skip
def test_all_linear_layers_but_the_head_get_an_adapter(tiny, layers):
    model = loaded(tiny())
    adapted = {name.split(".lora_A")[0].rsplit(".", 1)[-1] for name, _ in model.named_parameters() if "lora_A" in name}
    assert adapted == layers and is_causal_lm(model)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if "lora_" in n
    }
    trained, frozen = count_parameters(model)
    plain = AutoModelForCausalLM.from_pretrained(tiny())
    assert frozen == sum(p.numel() for p in plain.parameters()) and 0 < trained < frozen
    ids = torch.arange(12).view(1, 12)
    with torch.no_grad():  # B starts at zero: the adapter changes nothing yet
        assert torch.allclose(model.eval()(ids).logits, plain.eval()(ids).logits, atol=1e-6)


def test_named_layers_and_a_name_that_is_none():
    model = loaded(tiny_llama(), lora_target_modules=["q_proj"])
    assert all("q_proj" in name for name, p in model.named_parameters() if p.requires_grad)
    with pytest.raises(UserError, match=r"--lora_target_modules \['no_proj'\].*DSR217"):
        loaded(tiny_llama(), lora_target_modules=["no_proj"])


@pytest.mark.parametrize(("deepspeed", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_who_keeps_the_fp32_copies_decides_the_adapters_dtype(deepspeed, dtype):
    model = loaded(tiny_llama(), torch.bfloat16, deepspeed)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {dtype}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_a_4_bit_base_is_counted_whole_and_its_adapter_loads_again(tmp_path):
    model = loaded(tiny_llama(), load_in_4bit=True)
    whole = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(tiny_llama()).parameters())
    assert count_parameters(model)[1] == whole
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    ids = torch.arange(12).view(1, 12)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(loaded(tiny_llama(), load_in_4bit=True).unload(), tmp_path)
    with torch.no_grad():
        assert torch.allclose(model.eval()(ids).logits, again.eval()(ids).logits, atol=1e-5)


def packs(model):
    """4-bit layers of a model, and those of them that would repack their weight for a CPU with AVX-512 BF16."""
    layers = [
        module for module in model.modules() if type(module).__name__ == "Linear4bit" and hasattr(module, "quant_state")
    ]
    return len(layers), [layer for layer in layers if getattr(layer, "support_avx512bf16_for_cpu", False)]


def test_4_bit_weights_are_never_repacked_whatever_the_cpu_and_the_way_of_loading(tmp_path, monkeypatch):
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    whole = loaded(tiny_llama(), load_in_4bit=True).unload()
    whole.save_pretrained(tmp_path / "prequantized")
    recipe = load_recipe(
        "qlora_zero3", profile="starter", model_name_or_path=tiny_llama(), prompt_style="alpaca", max_length=128, max_steps=1,
        dataset=write_rows(tmp_path / "rows.jsonl", instructions(8)), deepspeed="none", output_dir=str(tmp_path / "run"), verify_model=False,
    )  # fmt: skip
    run, _ = run_recipe(recipe)
    finished = open_run(str(tmp_path / "run"))
    ways = {
        "load_model": loaded(tiny_llama(), load_in_4bit=True), "trained": run.model, "finished": finished.load(),
        "base": finished.load(base=True), "prequantized": loaded(str(tmp_path / "prequantized")),
        "verified": load_saved(finished, {"dtype": "float32", "auto_class": CAUSAL}),
    }  # fmt: skip
    for way, model in ways.items():
        layers, repacked = packs(model)
        assert layers and not repacked, way
        with torch.no_grad():  # what the attribute is about: on another CPU the kernel would be missing
            model.eval()(torch.arange(12).view(1, 12))
    assert not logging.getLogger("bitsandbytes.backends.cpu.ops").isEnabledFor(logging.WARNING)


@pytest.mark.parametrize(
    ("targets", "part"),
    [
        (["q_porj"], r"q_porj: no layer of LlamaForCausalLM .* \(did you mean q_proj\?\)"),
        (["q_proj,v_porj"], "v_porj: no layer"),
        (["mlp"], "mlp: no layer"),
        ([r"layers\.9\..*"], r"no layer of LlamaForCausalLM .* there are down_proj"),
        (["q_proj", r".*\.v_proj"], None),
        ([r".*layers\.1\..*\.(q|v)_proj"], None),
        (["layers.1.self_attn.q_proj,layers.0.mlp.up_proj"], None),
        (["q_proj,lm_head"], "lm_head: it matches lm_head, whose weight is both"),
        (["embed_tokens"], "embed_tokens: it matches model.embed_tokens, whose weight is both"),
        ([".*"], r"\.\*: it matches model too, a LlamaModel, which cannot"),
        ([".*self_attn.*"], r"it matches model\.layers\.0\.self_attn too, a LlamaAttention"),
        (["all-linear"], None),
    ],
)
def test_targets_are_checked_before_weights_are_loaded(targets, part):
    options = ModelConfig(model_name_or_path=tiny_llama(), lora_r=4, lora_target_modules=targets)
    config = load_config(options, CAUSAL)
    if part is None:
        check_targets(options, config, CAUSAL)
        return
    with pytest.raises(UserError, match=f"{part}.*DSR217"):
        check_targets(options, config, CAUSAL)


def test_a_layer_for_images_is_no_target_and_a_pattern_chooses_among_the_others():
    options = ModelConfig(model_name_or_path=tiny_gemma3(), lora_r=4, lora_target_modules=["fc1"])
    with pytest.raises(UserError, match="fc1: no layer of Gemma3ForConditionalGeneration.*DSR217"):
        check_targets(options, load_config(options, CAUSAL), CAUSAL)
    for targets, count in (([], 14), (["q_proj"], 2), ([r".*\.1\..*\.(q|up)_proj"], 2)):
        model = loaded(tiny_gemma3(), lora_target_modules=targets)
        adapted = [name for name, _ in model.named_parameters() if "lora_A" in name]
        assert len(adapted) == count and not [name for name in adapted if "vision" in name]


@functools.cache
def an_adapter() -> Path:
    """A folder with an adapter of the tiny Llama, as peft saves it."""
    folder = Path(tiny_llama()).with_name("adapter")
    model = AutoModelForCausalLM.from_pretrained(tiny_llama())
    get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])).save_pretrained(folder)
    return folder


def without_first(tensors):
    return dict(sorted(tensors.items())[1:])


def without_prefix(tensors):
    return {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}


def with_another(tensors):
    return tensors | {"base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight": torch.ones(4, 32)}


def with_a_base_weight(tensors):
    return tensors | {"base_model.model.lm_head.base_layer.weight": torch.ones(600, 32)}


MISFITS = {
    "fits": ({}, None, None),
    "a tensor missing": ({}, without_first, r"1 tensor missing from .*adapter_model\.safetensors \(base_model.*lora_A\.weight"),
    "no prefix": ({}, without_prefix, r"does not fit its base model .*: by adapter_config.json, 8 tensors missing"),
    "an extra tensor": ({}, with_another, r"1 tensor of other layers in .*layers\.9"),
    "a weight of the base": ({}, with_a_base_weight, r"holds a weight of the base model .*lm_head"),
    "fewer targets": ({"target_modules": ["q_proj"]}, None, "4 tensors of other layers"),
    "more targets": ({"target_modules": ["q_proj", "v_proj", "k_proj"]}, None, "4 tensors missing from .*k_proj"),
    "a target of another model": ({"target_modules": ["c_attn"]}, None, r"^the adapter .* does not fit its base .*target_modules c_attn"),
    "DoRA": ({"use_dora": True}, None, "4 tensors missing .*lora_magnitude_vector"),
    "some layers": ({"layers_to_transform": [0]}, None, r"4 tensors of other layers in .*layers\.1"),
    "another rank": ({"r": 8}, None, r"size mismatch for .*lora_A.*\[4, 32\].*\[8, 32\]"),
    "a whole module": ({"modules_to_save": ["lm_head"]}, None, "lacks the tensor .*lm_head"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISFITS)
def test_an_adapter_that_does_not_fit_is_refused_before_weights_are_loaded(case, tmp_path):
    changes, change, part = MISFITS[case]
    folder = shutil.copytree(an_adapter(), tmp_path / "adapter")
    values = json.loads((folder / "adapter_config.json").read_text()) | changes
    (folder / "adapter_config.json").write_text(json.dumps(values))
    if change:
        save_file(change(load_file(folder / "adapter_model.safetensors")), folder / "adapter_model.safetensors")
    options = ModelConfig(model_name_or_path=str(folder), lora_r=values["r"], lora_target_modules=values["target_modules"])
    config = load_config(options, CAUSAL)
    with pytest.raises(UserError, match=part) if part else contextlib.nullcontext():
        check_targets(options, config, CAUSAL)


def test_an_adapter_of_an_untied_head_is_saved_without_the_head(tmp_path):
    config = load_config(ModelConfig(model_name_or_path=tiny_llama()), CAUSAL)
    config.tie_word_embeddings = False
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "untied")
    options = {"lora_target_modules": ["q_proj", "lm_head", "embed_tokens"]}
    check_targets(ModelConfig(model_name_or_path=str(tmp_path / "untied"), lora_r=4, **options), config, CAUSAL)
    model = loaded(str(tmp_path / "untied"), **options)
    model.save_pretrained(tmp_path / "adapter")
    names = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(names) == 8 and all("lora_" in name for name in names)
    again = ModelConfig(model_name_or_path=str(tmp_path / "adapter"), lora_r=4, **options)
    check_targets(again, load_config(again, CAUSAL), CAUSAL)
    load_model(again, load_config(again, CAUSAL), CAUSAL, torch.float32, 1, False).save_pretrained(tmp_path / "again")
    assert load_file(tmp_path / "again" / "adapter_model.safetensors").keys() == names.keys()
