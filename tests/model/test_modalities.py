"""Parts for images and sound: what text never reaches is found, in whatever model."""

import pytest
import torch
import transformers
from support.tiny import tiny_bert, tiny_llama
from transformers import AutoConfig, AutoModel

from dsrecipes.model.modalities import parameters_below, unreached_by_text, unreached_note
from dsrecipes.model.task import averages_own_loss, is_causal_lm, loading_class

TEXT = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "head_dim": 8, "pad_token_id": 0,
}  # fmt: skip
TOWER = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14, "depth": 1, "embed_dim": 32, "num_heads": 2, "d_model": 32, "encoder_layers": 1,
    "encoder_ffn_dim": 32, "encoder_attention_heads": 2,
}  # fmt: skip
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
FAMILIES = {
    "Gemma3ForConditionalGeneration": ("gemma3", {"model_type": "gemma3_text"}, {}, 2),
    "Qwen2VLForConditionalGeneration": ("qwen2_vl", MROPE, {"hidden_size": 32}, 1),
    "Qwen2_5_VLForConditionalGeneration": ("qwen2_5_vl", MROPE, {"out_hidden_size": 32}, 1),
    "LlavaNextForConditionalGeneration": ("llava_next", {"model_type": "llama"}, {"model_type": "clip_vision_model"}, 3),
    "SmolVLMForConditionalGeneration": ("smolvlm", {"model_type": "llama"}, {}, 2),
    "MllamaForConditionalGeneration": ("mllama", ROPE | {"cross_attention_layers": [1], "num_hidden_layers": 3}, {}, 3),
    "VoxtralForConditionalGeneration": ("voxtral", {"model_type": "llama"}, {"model_type": "voxtral_encoder"}, 2),
}  # fmt: skip


def tiny(name):
    family, text, tower, _ = FAMILIES[name]
    senses = "audio_config" if family == "voxtral" else "vision_config"
    config = AutoConfig.for_model(family)
    text, tower = TEXT | text, TOWER | tower
    known = {part: getattr(config, part).to_dict().keys() | {"model_type"} for part in ("text_config", senses)}
    parts = {
        "text_config": {key: value for key, value in text.items() if key in known["text_config"]},
        senses: {key: value for key, value in tower.items() if key in known[senses]},
    }
    config = AutoConfig.for_model(family, **parts, architectures=[name])
    torch.manual_seed(0)
    return getattr(transformers, name)._from_config(config, attn_implementation="eager")


@pytest.mark.parametrize("name", FAMILIES)
def test_the_parts_found_are_those_that_get_no_gradient_from_text(name):
    model = tiny(name)
    assert is_causal_lm(model) and averages_own_loss(model) == (name != "Gemma3ForConditionalGeneration")
    assert loading_class("AutoModelForCausalLM", model.config).__name__ == (
        "AutoModelForCausalLM" if name.startswith("Gemma3") else "AutoModelForMultimodalLM"
    )
    model(input_ids=torch.randint(1, 60, (2, 9)), use_cache=False).logits.float().logsumexp(-1).sum().backward()
    still = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    parts = unreached_by_text(model)
    below = {id(parameter) for parameter in parameters_below(model, parts)}
    assert {key for key, parameter in model.named_parameters() if id(parameter) in below} == still != set()
    assert len(parts) == FAMILIES[name][3]
    assert unreached_note(model) is None, "they are still trained"
    for parameter in parameters_below(model, parts):
        parameter.requires_grad_(False)
    assert f"{sum(p.numel() for p in parameters_below(model, parts)):,} parameters are frozen" in unreached_note(model)


def test_models_of_text_alone_have_none():
    for folder in (tiny_llama(), tiny_bert()):
        assert unreached_by_text(AutoModel.from_pretrained(folder)) == []
