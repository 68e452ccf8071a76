"""LoRA on every kind of linear layer, alone and over a 4-bit base."""

import pytest
import torch
from peft import PeftModel
from tiny import tiny_gpt2, tiny_llama
from transformers import AutoModelForCausalLM

from dsrecipes.config import ModelConfig
from dsrecipes.errors import UserError
from dsrecipes.model.load import count_parameters, load_config, load_model
from dsrecipes.trainer import is_causal_lm

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
    with pytest.raises(UserError, match=r"--lora_target_modules \['no_proj'\]"):
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
