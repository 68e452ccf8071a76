"""Which messages there are: title, cause and cure by id, in English and Chinese.

One YAML file a layer (`config.yaml`), so that two layers never edit the same one. `dsrecipes explain` prints the entries,
and the documentation lists them.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import yaml

from dsrecipes.errors import nearest

RANGES = {
    "io": (1, 29),
    "config": (30, 99),
    "data": (100, 199),
    "model": (200, 249),
    "zero": (250, 299),
    "launch": (300, 329),
    "runs": (330, 349),
    "train": (350, 429),
    "inference": (430, 469),
    "evaluation": (470, 529),
    "publish": (530, 559),
    "reporting": (560, 579),
    "recipes": (580, 619),
    "run": (620, 639),
    "cli": (640, 649),
}
"""Layer -> first and last number of its ids; the file of a layer has its name."""
_ENTRY = re.compile(r"^(DSR\d{3}):", re.MULTILINE)


@dataclass(frozen=True)
class Text:
    """An explanation in one language."""

    title: str
    cause: str
    cure: str


@dataclass(frozen=True)
class Message:
    """What `dsrecipes explain` knows about one id."""

    code: str
    en: Text
    zh: Text


def code_of(number: int) -> str:
    """The id with this number: `DSR042` for 42."""
    return f"DSR{number:03}"


def layer_of(number: int) -> str | None:
    """The layer whose range holds a number; None for a number that no layer has."""
    return next((layer for layer, (first, last) in RANGES.items() if first <= number <= last), None)


def load_layer(layer: str) -> dict[str, Message]:
    """Read and check the messages of one layer, in the order of their ids; empty where the layer has no file.

    Raises:
        ValueError: an entry is incomplete, appears twice, or lies outside the layer's range. This is our own mistake, not
            the user's, so it is not a UserError; tests/test_messages.py loads every file.
    """
    path = Path(__file__).with_name(f"{layer}.yaml")
    if not path.is_file():
        return {}
    text = path.read_text(encoding="utf-8")
    repeated = [code for code, count in Counter(_ENTRY.findall(text)).items() if count > 1]
    if repeated:  # YAML would silently keep the last one
        raise ValueError(f"{path}: {', '.join(repeated)} appears twice")
    # The C parser is ten times as fast as the Python one: the list of all ids prints at once.
    entries = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)) or {}
    return {code: _message(f"{path}: {code}", code, layer, entries[code]) for code in sorted(entries)}


def load_all() -> dict[str, Message]:
    """Read and check the messages of all layers, by id (ValueError: see load_layer)."""
    return {code: message for layer in RANGES for code, message in load_layer(layer).items()}


def _message(where: str, code: str, layer: str, entry: object) -> Message:
    first, last = RANGES[layer]
    if not re.fullmatch(r"DSR\d{3}", code) or not first <= int(code[3:]) <= last:
        raise ValueError(f"{where}: the ids of {layer} are {code_of(first)} to {code_of(last)}")
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: expected title, cause, cure and zh")
    english = {key: value for key, value in entry.items() if key != "zh"}
    return Message(code, _text(where, english), _text(f"{where}, zh", entry.get("zh")))


def _text(where: str, fields: object) -> Text:
    names = list(Text.__dataclass_fields__)
    keys = list(fields) if isinstance(fields, dict) else []
    if not isinstance(fields, dict) or set(keys) != set(names):
        hints = "".join(nearest(str(key), names) for key in keys if key not in names)
        raise ValueError(f"{where}: expected {', '.join(names)}, found {', '.join(map(str, keys)) or fields}{hints}")
    for name, value in fields.items():
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{where}: {name} must be text, found {value!r}")
    if fields["title"].endswith((".", "。")) or "\n" in fields["title"].strip():
        raise ValueError(f"{where}: the title must be one line without a full stop")
    return Text(**{name: " ".join(fields[name].split()) for name in names})
