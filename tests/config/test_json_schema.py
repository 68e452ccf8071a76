"""recipes/schema.json: it is what the configuration's fields give, shipped YAML validates, and mistakes do not."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from support.tiny import ROOT

from dsrecipes import UserError
from dsrecipes.config.json_schema import schema
from dsrecipes.config.layers import layer
from dsrecipes.config.parse import build_config

SCHEMA = json.loads((ROOT / "recipes" / "schema.json").read_text("utf-8"))
VALIDATOR = jsonschema.Draft7Validator(SCHEMA)


class Yaml12(yaml.SafeLoader):
    """YAML 1.2, which editors read: `no` is text, and 2e-5 is a number."""


Yaml12.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":bool", ":float", ":int", ":timestamp"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for tag, pattern, first in (
    ("bool", "true|false", "tf"),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789"),
):
    Yaml12.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(rf"^(?:{pattern})$"), list(first))


def errors(text: str) -> list[str]:
    return [error.message for error in VALIDATOR.iter_errors(yaml.load(text, Yaml12))]


def parse(text: str, folder: Path) -> None:
    path = folder / "mine.yaml"
    path.write_text(f"recipe: seq_classification\n{text}\n")
    build_config(layer({"config": str(path)}))


def test_the_file_is_what_the_fields_give():
    jsonschema.Draft7Validator.check_schema(SCHEMA)
    assert schema() == SCHEMA, "run `make schema`"


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_yaml_validates_and_names_the_schema(path: Path):
    text = path.read_text("utf-8")
    assert errors(text) == []
    assert "# yaml-language-server: $schema=schema.json\n" in text


@pytest.mark.parametrize(
    "text",
    [
        "dataset: [chat.json, {path: org/name, split: test, weight: 2, columns: {prompt: question}}]",
        "eval_dataset: {path: held-out.jsonl, name: mine}\nlearning_rate: 2e-5\nmax_steps: -1",
        "warmup_steps: null\nlora_target_modules: [q_proj, v_proj]\nclass_weights: {neg: 1, pos: 5}",
        "eval_strategy: no\ndeepspeed: none\nreport_to: none\nno_packing: true\nuse_cache: false\nprofile: full",
        "lr_scheduler_kwargs: {num_cycles: 2}\noptim: sgd\noptim_args: {momentum: 0.9}\nseed: 0\ntime_limit: 3h50m",
    ],
)
def test_what_the_parser_accepts_validates(text: str, tmp_path: Path):
    assert errors(text) == []
    parse(text, tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "learning_rat: 1",
        "learning_rate: fast",
        "learning_rate: -1.0e-4",
        "lora_r: 8.5",
        "lora_r: -1",
        "lora_alpha: 0",
        "lora_dropout: 1",
        "load_in_4bit: maybe",
        "bnb_4bit_quant_type: nf5",
        "prompt_style: alpacca",
        "max_length: 1",
        "max_length: [512, 1024]",
        "validation_split: 2",
        "max_steps: 0",
        "num_train_epochs: 0",
        "per_device_train_batch_size: 0",
        "seed: -1",
        "lr_scheduler_type: cosin",
        "eval_strategy: step",
        "optim: adamm",
        "use_cache: true",
        "push_to_hub: true",
        "warmup_ratio: 0.1",
        "train_sampling_strategy: group_by_length",
        "dataset: {split: train}",
        "dataset: {path: a.json, weigth: 2}",
        "dataset: [a.json, {path: b.json, rows: 10, weight: 2}]",
        "dataset: {path: a.json, split: dev}",
        "profile: big",
    ],
)
def test_a_mistake_validates_neither_here_nor_in_the_parser(text: str, tmp_path: Path):
    assert errors(text)
    with pytest.raises(UserError):
        parse(text, tmp_path)


def test_a_mistake_in_the_starter_section_does_not_validate():
    values: dict[str, Any] = {"starter": {"max_steps": 0}}
    assert list(VALIDATOR.iter_errors(values)) and not list(VALIDATOR.iter_errors({"starter": {"max_steps": 1}}))
