"""LoRA targets as users write them, and adapter folders given as models: what wins, what is refused."""

import json

import pytest

from dsrecipes.config.adapter import adapter_folder, base_model, lora_targets, take_settings
from dsrecipes.config.layers import layer
from dsrecipes.config.parse import build_config
from dsrecipes.errors import UserError
from dsrecipes.model.weights_source import local_model


def adapter(folder, **changes):
    folder.mkdir(exist_ok=True)
    values = {
        "peft_type": "LORA", "base_model_name_or_path": "/models/base", "r": 4, "lora_alpha": 8, "lora_dropout": 0.1,
        "target_modules": ["v_proj", "q_proj"],
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(values | changes))
    (folder / "adapter_model.safetensors").write_bytes(b"")
    return str(folder)


@pytest.mark.parametrize(
    ("given", "targets"),
    [
        ([], "all-linear"),
        (["all-linear"], "all-linear"),
        (["q_proj,v_proj"], ["q_proj", "v_proj"]),
        (["q_proj", "v_proj"], ["q_proj", "v_proj"]),
        (["q_proj, layers.0.mlp.up_proj"], ["q_proj", "layers.0.mlp.up_proj"]),
        (['["q_proj", "v_proj"]'], ["q_proj", "v_proj"]),
        ([r".*\.(q|v)_proj"], r".*\.(q|v)_proj"),
        ([r".*layers\.\d{1,2}\.self_attn.q_proj"], r".*layers\.\d{1,2}\.self_attn.q_proj"),
        (["[a-z.]*0[.]self_attn.q_proj"], "[a-z.]*0[.]self_attn.q_proj"),
        (["o_proj", r".*\.(q|v)_proj"], r"(?:.*\.)?o_proj|(?:.*\.(q|v)_proj)"),
    ],
)
def test_targets_are_names_or_one_pattern(given, targets):
    assert lora_targets(given) == targets


@pytest.mark.parametrize(
    ("given", "part"), [(["all-linear", "q_proj"], "give it alone"), (["a("], "not a regular expression")]
)
def test_targets_that_mean_nothing(given, part):
    with pytest.raises(UserError, match=rf"--lora_target_modules.*{part}.*DSR055"):
        lora_targets(given)


def test_the_adapters_own_settings_replace_a_recipes(tmp_path):
    folder = adapter(tmp_path / "a")
    notes = []
    merged = {"model_name_or_path": (folder, "flag"), "lora_r": (16, "recipe"), "lora_dropout": (0.2, "flag")}
    take_settings(merged, {key: origin for key, (_, origin) in merged.items() if origin == "flag"}, notes)
    origin = str(tmp_path / "a" / "adapter_config.json")
    assert merged["lora_r"] == (4, origin) and merged["lora_alpha"] == (8, origin)
    assert merged["lora_target_modules"] == (["v_proj", "q_proj"], origin) and merged["lora_dropout"] == (0.2, "flag")
    assert notes == [
        f"training continues from the adapter {folder} of /models/base; its own settings override the recipe's lora_r 16"
    ]
    config = build_config(layer({"recipe": "qlora_zero3", "profile": "full", "model_name_or_path": folder}))
    assert (config.model.lora_r, config.model.lora_alpha, config.model.load_in_4bit) == (4, 8, True)
    assert config.notes[0].startswith(f"training continues from the adapter {folder}")
    again = {
        "model_name_or_path": (folder, "a.yaml"),
        "lora_r": ("4", "a.yaml"),
        "lora_target_modules": ("q_proj,v_proj", "a"),
    }
    take_settings(again, dict.fromkeys(again, "a.yaml"), [])
    assert again["lora_r"] == ("4", "a.yaml")


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ({"lora_r": "8"}, r"--lora_r 8 \(flag\), but the adapter .* has 4: drop the flag"),
        ({"lora_r": 0}, "dsrecipes export.*DSR058"),
        ({"lora_alpha": "16"}, "--lora_alpha 16"),
        ({"lora_target_modules": "all-linear"}, r"--lora_target_modules all-linear .* has q_proj,v_proj"),
        ({"from_scratch": "true"}, "--from_scratch.*DSR058"),
    ],
)
def test_what_contradicts_an_adapter_is_refused(tmp_path, given, part):
    flags = {"recipe": "alpaca_llama_sft", "profile": "starter", "model_name_or_path": adapter(tmp_path / "a")} | given
    with pytest.raises(UserError, match=part):
        build_config(layer(flags))


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"peft_type": "PREFIX_TUNING"}, "PREFIX_TUNING.*DSR057"),
        ({"base_model_name_or_path": None}, "base_model_name_or_path.*DSR056"),
        ({"r": "4"}, "DSR056"),
        ({"r": 0}, "DSR056"),
        ({"r": True}, "DSR056"),
    ],
)
def test_adapters_that_cannot_be_continued(tmp_path, changes, part):
    with pytest.raises(UserError, match=part):
        base_model(adapter(tmp_path / "a", **changes))


def test_a_model_folder_is_no_adapter(tmp_path):
    folder = adapter(tmp_path / "a")
    assert adapter_folder(folder) == tmp_path / "a" and base_model(folder) == "/models/base"
    (tmp_path / "a" / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"adapter_model\.safetensors.*DSR056"):
        base_model(folder)
    (tmp_path / "a" / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"holds a model \(config.json\) and a LoRA adapter \(adapter_config.json\)"):
        local_model(folder)
    assert adapter_folder(folder) is None and adapter_folder("org/name") is None and adapter_folder(None) is None
