"""Names and paths of recipes, YAMLs and ZeRO JSONs."""

import pytest
from support.tiny import STARTER, TWO_METHODS

from dsrecipes.config.find import find_config, find_recipe, find_zero, recipe_names, variant_names, zero_names
from dsrecipes.errors import UserError
from dsrecipes.io.paths import starter_path
from dsrecipes.io.text import read_yaml


def test_names_are_the_files():
    assert recipe_names() == ["alpaca_llama_sft", "bert_tmmlu_qa", "gpt2_clm", "qlora_zero3", "seq_classification"]
    assert zero_names() == [
        "zero0",
        "zero1",
        "zero1_offload",
        "zero2",
        "zero2_offload",
        "zero3",
        "zero3_nvme",
        "zero3_offload",
    ]
    assert {"gpt2_medium_32gb", "alpaca_llama3", "alpaca_qwen", "alpaca_24gb"} <= set(variant_names())
    assert {"qlora_llama", "qlora_mistral", "qlora_qwen", "seq_classification_zh"} <= set(variant_names())


def test_a_recipe_is_a_name_a_file_or_a_module(tmp_path, monkeypatch):
    for name in recipe_names():
        files = find_recipe(name)
        assert (files.name, files.module) == (name, f"dsrecipes.recipes.{name}") and files.yaml.stem == name
    (tmp_path / "package_of_mine").mkdir()
    own = tmp_path / "package_of_mine" / "mine.py"
    own.write_text(TWO_METHODS)
    assert find_recipe(str(own)).module == own and find_recipe(str(own)).yaml is None
    own.with_suffix(".yaml").write_text("max_length: 8\n")
    assert find_recipe(str(own)).yaml == own.with_suffix(".yaml")
    monkeypatch.syspath_prepend(str(tmp_path))
    files = find_recipe("package_of_mine.mine")
    assert (files.name, files.module, files.yaml) == ("mine", "package_of_mine.mine", own.with_suffix(".yaml"))
    assert files.load().Mine.format_row({"text": "a"}) == {"text": "a"}


@pytest.mark.parametrize(
    ("find", "name", "parts"),
    [
        (find_recipe, "gpt2_cml", ["gpt2_cml", "did you mean gpt2_clm?", "bert_tmmlu_qa", "path/to/mine.py", "DSR030"]),
        (find_recipe, "nowhere/mine.py", ["nowhere/mine.py", "DSR030"]),
        (find_recipe, "no_such_package.mine", ["no_such_package.mine", "gpt2_clm", "DSR030"]),
        (find_config, "alpaca_lama3", ["alpaca_lama3", "did you mean alpaca_llama3?", "gpt2_medium_32gb", "DSR031"]),
        (find_zero, "zero4", ["--deepspeed zero4", "did you mean zero", "zero3_nvme", "none", "DSR032"]),
        (starter_path, "starter:data/nothing.txt", ["starter:data/nothing.txt", "DSR002"]),
    ],
)
def test_an_unknown_name_lists_the_known_ones(find, name, parts):
    with pytest.raises(UserError) as error:
        find(name)
    assert all(part in str(error.value) for part in parts), error.value


def test_short_names_and_paths_of_configurations(tmp_path):
    own = tmp_path / "mine.json"
    own.write_text("{}")
    assert find_zero(str(own)) == own and find_zero("none") is None
    assert [find_zero(name).stem for name in zero_names()] == zero_names()
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("recipe: gpt2_clm\n")
    assert find_config(str(run)) == find_config(str(run / "config.yaml")) == run / "config.yaml"
    assert starter_path("starter:gpt2") == str(STARTER / "gpt2") and starter_path("gpt2") == "gpt2"


@pytest.mark.parametrize(
    ("raw", "parts"),
    [
        (b"max_steps: 1\nlearning_rate: [1,\n", ["line 3", "column"]),
        (b"a: 1\nb: 2\na: 3\n", ["line 3", "'a'", "DSR004"]),
        (b"starter:\n  a: 1\n  a: 2\n", ["line 3", "'a'", "DSR004"]),
        (b"? [1, 2]\n: 3\n", ["line 1"]),
        (b"- a\n- b\n", ["DSR004"]),
        (b"3: 4\n", ["DSR004"]),
        (b"a: 1\nb: caf\xe9\n", ["line 2", "0xe9", "DSR003"]),
        (b"a: !!python/object/apply:os.system ['true']\n", ["line 1", "constructor", "DSR004"]),
        (b"a: 1\x00\n", ["unacceptable character"]),
    ],
)
def test_a_malformed_yaml_says_where(tmp_path, raw, parts):
    path = tmp_path / "x.yaml"
    path.write_bytes(raw)
    with pytest.raises(UserError) as error:
        read_yaml(path)
    assert all(part in str(error.value) for part in [str(path), *parts]), error.value
    assert "\n" not in str(error.value)


def test_yaml_edges(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_bytes(b"\xef\xbb\xbfmax-steps: 3\nname: null\n")
    assert read_yaml(path) == {"max_steps": "3", "name": None}
    path.write_text("# nothing but a comment\n")
    assert read_yaml(path) == {}
