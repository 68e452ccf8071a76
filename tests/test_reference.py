"""The generated reference names every flag, key, ZeRO setting, message and public name; `make docs` builds the pages."""

from __future__ import annotations

import importlib.util
import re
from types import ModuleType

import pytest
from support.tiny import ROOT

import dsrecipes
from dsrecipes.config.find import zero_names
from dsrecipes.config.flags import FIXED, REMOVED
from dsrecipes.config.help import known_flags
from dsrecipes.messages import load_all
from dsrecipes.zero.lint import key_table

LANGUAGES = {"en": "en", "zh-TW": "zh_TW"}


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reference", ROOT / "docs" / "reference.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def page(reference: ModuleType, language: str, name: str) -> str:
    """A reference page as Sphinx reads it, without the help of the commands."""
    text = (ROOT / "docs" / language / "reference" / f"{name}.md").read_text("utf-8")
    words = reference.Words(LANGUAGES[language])
    generators = reference.GENERATORS | {"commands": lambda _: iter(())}
    filled = reference._MARKER.sub(lambda match: "\n".join(generators[match[1]](words)), text)
    assert "<!-- generated" not in filled
    return filled


def test_a_marker_on_each_page_and_each_generator_on_a_page(reference: ModuleType):
    for language in LANGUAGES:
        pages = [path.read_text("utf-8") for path in (ROOT / "docs" / language).rglob("*.md")]
        used = [name for text in pages for name in reference._MARKER.findall(text)]
        assert sorted(used) == sorted(reference.GENERATORS)


@pytest.mark.parametrize("language", LANGUAGES)
def test_everything_is_named(reference: ModuleType, language: str):
    flags = page(reference, language, "flags")
    rows = re.findall(r"^\| `--(\w+)` ", flags, flags=re.MULTILINE)
    assert sorted(rows) == sorted(known_flags().keys() | REMOVED.keys())
    keys = set(re.findall(r"^\| `(\w+)` ", page(reference, language, "yaml"), flags=re.MULTILINE))
    assert known_flags().keys() - FIXED.keys() < keys and {"about", "starter", "profile", "path", "weight"} < keys
    zero, table = page(reference, language, "zero"), key_table(None)
    assert all(f"### {name}\n" in zero for name in zero_names())
    assert all(f"`{key}`" in zero for section in table["sections"].values() for key in section)
    assert all(f"| `{key}` |" in zero for part in ("renamed", "removed", "elsewhere", "unused") for key in table[part])
    assert all(f":: dsrecipes.{name}\n" in page(reference, language, "api") for name in dsrecipes.__all__)


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_message_has_an_anchor(reference: ModuleType, language: str):
    text = page(reference, language, "messages")
    assert re.findall(r"^### (\w+)$", text, flags=re.MULTILINE) == list(load_all())


def test_what_markdown_would_take_for_markup_is_escaped(reference: ModuleType):
    assert reference.escape("a|b *_offload <x> `c_d|e` {f}") == r"a\|b \*\_offload \<x\> `c_d\|e` \{f\}"


def test_a_chinese_page_has_the_generators_of_the_english_one(reference: ModuleType):
    for path in (ROOT / "docs" / "en" / "reference").glob("*.md"):
        other = ROOT / "docs" / "zh-TW" / "reference" / path.name
        assert reference._MARKER.findall(path.read_text("utf-8")) == reference._MARKER.findall(other.read_text("utf-8"))
        levels = [
            [len(level) for level in re.findall(r"^(#+) ", file.read_text("utf-8"), flags=re.MULTILINE)]
            for file in (path, other)
        ]
        assert levels[0] == levels[1]
