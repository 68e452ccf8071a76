"""What may a recipe's YAML contain? A JSON schema, with which editors complete keys and underline mistakes.

python -m dsrecipes.config.json_schema > recipes/schema.json

The schema is generated from the fields of the configuration, and a test compares the file with them. It describes YAML's own
types. The parser accepts more spellings (numbers in quotes, `no_packing`), because YAML, flags and Python pass through
one parser; and it refuses more, because only the parser knows all layers (`load_in_4bit` needs `lora_r`, which a flag may
give).
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import typing
from collections.abc import Iterator
from enum import Enum
from typing import Any

from dsrecipes.config.checks import ABOVE_ZERO, NOT_NEGATIVE, SAMPLING, SEEDS
from dsrecipes.config.flags import FIXED
from dsrecipes.config.help import known_flags
from dsrecipes.config.layers import PROFILES
from dsrecipes.config.schema import DataConfig
from dsrecipes.config.sources import SPLITS
from dsrecipes.config.train_config import CONFIG_CLASSES

Json = dict[str, Any]

_TYPES = {int: "integer", float: "number", str: "string", bool: "boolean", list: "array", dict: "object", type(None): "null"}
_RANGES: dict[str, Json] = {
    **{name: {"minimum": 0} for name in (*NOT_NEGATIVE, *SEEDS, "lora_r")},
    **{name: {"exclusiveMinimum": 0} for name in (*ABOVE_ZERO, "lora_alpha")},
    "max_length": {"minimum": 2},
    "max_steps": {"minimum": -1, "not": {"const": 0}},
    "lora_dropout": {"minimum": 0, "exclusiveMaximum": 1},
    "validation_split": {"minimum": 0, "exclusiveMaximum": 1},
    "train_sampling_strategy": {"enum": [*SAMPLING, None]},
}
"""The range checks that concern one key; a test asks the parser to refuse what these refuse."""
_ABOUT: dict[str, Json] = {
    "about": {"type": "string", "description": "What it is, in a line of `dsrecipes list`."},
    "machine": {"type": "string", "description": "The hardware that it was written for, for `dsrecipes list`."},
    "recipe": {"type": "string", "description": "Recipe that this variant belongs to: a name or a .py file."},
    "profile": {"enum": list(PROFILES), "description": "auto runs the starter profile where there is no GPU."},
}
"""Keys that are not flags, except `starter`."""


def schema() -> Json:
    """The whole schema (draft 7, which editors support best)."""
    fields = dict(_fields())
    references = {name: {"$ref": f"#/definitions/{name}"} for name in fields}
    # The parser reads `no_packing: true` as `packing: false`.
    switches = [name for name, field in fields.items() if field.get("type") == ["boolean", "null"]]
    values: Json = {
        "type": "object",
        "properties": references,
        "patternProperties": {f"^no_({'|'.join(switches)})$": {"type": "boolean"}},
        "additionalProperties": False,
    }
    starter = values | {"type": ["object", "null"], "description": "Values of the small offline profile."}
    return values | {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "dsrecipes: a recipe's configuration or a variant of it",
        "properties": _ABOUT | references | {"starter": starter},
        "definitions": fields | {"source": _source()},
    }


def _fields() -> Iterator[tuple[str, Json]]:
    flags = known_flags()
    for config_class in CONFIG_CLASSES:
        hints = typing.get_type_hints(config_class)
        for field in dataclasses.fields(config_class):
            # TrainingArguments computes these; no YAML can set them.
            if not field.init:
                continue
            about = re.sub(r"\s+", " ", flags[field.name].about).strip()
            # Listed, so that an editor shows why the flag has one value instead of calling it unknown.
            if field.name in FIXED:
                value, reason = FIXED[field.name]
                values = [value, None] if value is not None else [None, False]
                yield field.name, {"enum": values, "description": f"Has this one value here: {reason}.", "deprecated": True}
            else:
                yield field.name, _described(field, _of_type(field.name, hints[field.name]), about)


def _described(field: dataclasses.Field[Any], kind: Json, about: str) -> Json:
    result = kind | _RANGES.get(field.name, {})
    if isinstance(field.default, str | int | float) and not isinstance(field.default, Enum):
        result["default"] = field.default
    return result | ({"description": about} if about else {})


def _of_type(name: str, hint: Any) -> Json:
    """The schema of a field of this type; null removes the key of a lower layer, so it is allowed everywhere."""
    if name in ("dataset", "eval_dataset"):
        entry: Json = {"anyOf": [{"type": "string"}, {"$ref": "#/definitions/source"}]}
        return {"anyOf": [*entry["anyOf"], {"type": "array", "items": entry}, {"type": "null"}]}
    # Lists of NAME=VALUE, which YAML may write as a mapping.
    if name in ("columns", "class_weights", "optim_args"):
        return {"type": ["string", "array", "object", "null"]}
    options = typing.get_args(hint) or (hint,)
    if typing.get_origin(hint) in (list, dict):
        options = (hint,)
    choices = [
        choice.value for option in options if isinstance(option, type) and issubclass(option, Enum) for choice in option
    ]
    if typing.get_origin(hint) is typing.Literal:
        choices = list(options)
    if choices and not any(typing.get_origin(option) is list for option in options):
        return {"enum": [*choices, None]}
    kinds = {_TYPES.get(typing.get_origin(option) or option, "string") for option in options}
    if "array" in kinds:
        # One element needs no list.
        kinds.add("string")
    result: Json = {"type": [*sorted(kinds - {"null"}), "null"]}
    if "array" in kinds:
        result["items"] = {"type": ["string", "number"]}
    return result


def _source() -> Json:
    """A mapping in `dataset` or `eval_dataset`."""
    text, whole = {"type": "string"}, {"type": "integer", "exclusiveMinimum": 0}
    styles = list(typing.get_args(typing.get_type_hints(DataConfig)["prompt_style"]))
    return {
        "type": "object",
        "required": ["path"],
        "properties": {
            "path": text | {"minLength": 1, "description": "Hub id, file or folder; `starter:NAME` is bundled."},
            "name": text | {"pattern": r"^[\w.-]+$", "description": "Name in the header, the log and the report."},
            "split": {"enum": list(SPLITS), "description": "The rows of this split alone."},
            "rows": whole | {"description": "Rows an epoch."},
            "weight": {
                "type": "number",
                "exclusiveMinimum": 0,
                "description": "Share of the rows, relative to other weights.",
            },
            "prompt_style": {"enum": styles, "description": "Instead of the run's."},
            "columns": {"type": ["string", "array", "object"], "description": "Instead of the run's."},
            "max_length": {"type": "integer", "minimum": 2, "description": "Instead of the run's; not longer."},
            "dataset_config": text | {"description": "Instead of the run's."},
        },
        "additionalProperties": False,
        "not": {"required": ["rows", "weight"]},
    }


if __name__ == "__main__":
    json.dump(schema(), sys.stdout, indent=1, ensure_ascii=False)
    print()
