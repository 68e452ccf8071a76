"""Flags as a mapping, and how the values of a run are layered."""

import pytest
from support.tiny import TWO_METHODS

from dsrecipes.config.layers import layer, parse_flags
from dsrecipes.errors import UserError
from dsrecipes.io.devices import accelerators


def test_flags_become_a_mapping():
    argv = "--a 1 --b-c=2 --on --subjects STEM physics --lr -1 --empty= --a 3".split()
    expected = {"a": "3", "b_c": "2", "on": "true", "subjects": ["STEM", "physics"], "lr": "-1", "empty": ""}
    assert parse_flags(argv) == expected
    for stray in (["gpt2"], ["--a=1", "2"], ["-a", "1"]):
        with pytest.raises(UserError, match="DSR033"):
            parse_flags(stray)


def test_later_layers_win_and_null_removes(tmp_path):
    recipe, config = tmp_path / "mine.py", tmp_path / "more.yaml"
    recipe.write_text(TWO_METHODS)
    recipe.with_suffix(".yaml").write_text("seed: 1\nsave_steps: 2\nmax_length: 8\neval_steps: 9\nstarter:\n  seed: 3\n")
    config.write_text(f"recipe: {recipe}\nsave_steps: 4\neval_steps: null\n")
    layers = layer({"config": str(config), "max_length": 5, "profile": "starter"})
    assert layers.merged() == {
        "seed": ("3", "profile"), "save_steps": ("4", str(config)), "max_length": (5, "flag"),
    }  # fmt: skip
    assert layers.removed() == {"eval_steps"}
    assert layer({"recipe": str(recipe), "profile": "full"}).merged()["seed"] == ("1", "recipe")


def test_a_yaml_has_a_starter_section_and_names_the_same_recipe(tmp_path):
    recipe, config = tmp_path / "mine.py", tmp_path / "more.yaml"
    recipe.write_text(TWO_METHODS)
    config.write_text(
        f"recipe: {recipe}\nseed: 1\nmodel_name_or_path: big\nmodel_revision: v2\nstarter:\n  model_name_or_path: small\n"
    )
    flags = {"config": str(config), "seed": 2}
    assert layer({**flags, "profile": "starter"}).merged() == {
        "model_name_or_path": ("small", f"{config}, starter"), "seed": (2, "flag"),
    }  # fmt: skip
    assert layer({**flags, "profile": "full"}).merged()["model_name_or_path"] == ("big", str(config))
    assert layer({**flags, "recipe": str(recipe)}).recipe == layer(flags).recipe
    with pytest.raises(UserError, match=f"gpt2_clm.*{config}.*{recipe}.*DSR036"):
        layer({**flags, "recipe": "gpt2_clm"})
    config.write_text("starter: 1\n")
    with pytest.raises(UserError, match=f"{config}.*DSR037"):
        layer({**flags, "recipe": "gpt2_clm"})


def test_profiles(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert accelerators() == 0
    assert (layer({"recipe": "gpt2_clm"}).profile, layer({"recipe": "gpt2_clm"}).why_profile) == (
        "starter",
        "no accelerator",
    )
    assert layer({"recipe": "gpt2_clm", "profile": "full"}).profile == "full"
    assert layer({"recipe": "gpt2_clm", "use_cpu": "true"}).why_profile == "--use_cpu"
    assert layer({"config": "gpt2_medium_32gb"}).profile == "full"
    assert layer({"config": "gpt2_medium_32gb", "profile": "starter"}).profile == "starter"
    with pytest.raises(UserError, match="--profile big.*auto, full, starter.*DSR034"):
        layer({"recipe": "gpt2_clm", "profile": "big"})
    with pytest.raises(UserError, match="gpt2_clm.*DSR035"):
        layer({})


def test_another_model_or_data_set_forgets_what_was_said_of_the_first():
    kept = layer({"recipe": "gpt2_clm", "profile": "full"}).merged()
    assert kept["dataset_config"][0] == "wikitext-2-raw-v1"
    assert "dataset_config" not in layer({"recipe": "gpt2_clm", "profile": "full", "dataset": "my.txt"}).merged()
    assert "from_scratch" in layer({"recipe": "gpt2_clm", "profile": "starter"}).merged()
    assert "from_scratch" not in layer({"recipe": "gpt2_clm", "profile": "starter", "model_name_or_path": "m"}).merged()
