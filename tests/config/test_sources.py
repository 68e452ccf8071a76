"""What --dataset and --eval_dataset may be, and what is wrong with the rest."""

import re

import pytest
import yaml

from dsrecipes import UserError
from dsrecipes.config.layers import layer, parse_flags
from dsrecipes.config.parse import build_config


def data(dataset, **values):
    """The data settings of a run on `dataset`."""
    return build_config(layer({"recipe": "alpaca_llama_sft", "dataset": dataset, "max_length": 64, **values})).data


def test_one_plain_data_set_is_no_mixture():
    for given in ("a.json", ["a.json"], '["a.json"]'):
        settings = data(given)
        assert (settings.dataset, settings.is_mixture) == ("a.json", False)
        assert settings.of_source(settings.sources[0]) is settings


def test_yaml_and_command_line_mean_the_same(tmp_path):
    entries = ["a.json", {"path": "b/", "weight": 2.5, "max_length": 32}, {"path": "org/name", "rows": 30, "split": "test"}]
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"recipe": "alpaca_llama_sft", "dataset": entries, "eval_dataset": ["c.json", "d.json"]}))
    words = [
        "a.json",
        '{"path": "b/", "weight": 2.5, "max_length": 32}',
        '{"path": "org/name", "rows": 30, "split": "test"}',
    ]
    line = parse_flags(["--dataset", *words, "--eval_dataset", "c.json", "d.json"])
    of_yaml = build_config(layer({"config": str(path)})).data
    of_line = build_config(layer({"recipe": "alpaca_llama_sft", **line})).data
    assert of_yaml.sources == of_line.sources and of_yaml.eval_sources == of_line.eval_sources
    assert [(s.name, s.share, s.split) for s in of_line.sources] == [
        ("a", "", None), ("b", "weight 2.5", None), ("name", "rows 30", "test"),
    ]  # fmt: skip
    assert of_line.of_source(of_line.sources[1]).max_length == 32
    assert [s.name for s in of_line.eval_sources] == ["c", "d"] and of_line.is_mixture


def test_files_that_are_called_the_same_get_longer_names():
    names = [source.name for source in data(["x/train.json", "y/train.jsonl.gz", "starter:data/instructions.json"]).sources]
    assert names == ["x_train", "y_train", "instructions"]
    named = data([{"path": "a.json", "split": "train"}, {"path": "a.json", "split": "test", "name": "held"}])
    assert [source.name for source in named.sources] == ["a", "held"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([{"path": "a", "weight": 0}, "b"], "--dataset, entry 1 (a): weight is 0: expected a number above 0"),
        ([{"path": "a", "weight": "nan"}], "expected a number above 0"),
        ("[]", "DSR046"),
        ([{"path": "a", "rows": 2.5}], "rows is 2.5: expected a whole number above 0"),
        ([{"path": "a", "rows": True}], "rows is True"),
        ([{"path": "a", "rows": 5, "weight": 1}], "[DSR060]"),
        ([{"path": "a", "weights": 1}], "unknown key 'weights' (did you mean weight?)"),
        ([{"weight": 1}], "[DSR060]"),
        ([{"path": "a", "split": "dev"}], "split is 'dev': choose from train, validation, test"),
        ([{"path": "a", "max_length": 65}], "a: its max_length 65 is above the run's, 64"),
        ([{"path": "a", "max_length": 1}], "a: max_length is 1"),
        ([{"path": "a", "columns": "x"}], "a: columns x: give each of the recipe's names once"),
        ([{"path": "a", "prompt_style": "chatml"}], "prompt_style is 'chatml': choose from alpaca, chat"),
        ([{"path": "a", "name": "a b"}], "[DSR061]"),
        (["a.json", "a.json"], "2 sources have the name 'a'"),
        ('{"path": "a", "path": "b"}', "[DSR005]"),
        ('{"path": "a"', "--dataset"),
    ],
)
def test_nonsense_is_refused(given, message):
    with pytest.raises(UserError, match=re.escape(message)):
        data(given)


def test_shares_are_not_for_validation_rows():
    with pytest.raises(UserError, match=r"--eval_dataset \(b\).*DSR060"):
        data("a", eval_dataset={"path": "b", "weight": 1})
