"""Generate the reference pages from the code: flags, commands, YAML keys, ZeRO files, messages and the public API.

A page of docs/*/reference/ is written by hand but for lines such as `<!-- generated: flags -->`, which this Sphinx extension
replaces when the page is read. So a reference cannot be older than the code that it describes.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from pygments.lexers.special import TextLexer
from sphinx.pycode import ModuleAnalyzer

import dsrecipes
from dsrecipes import cli
from dsrecipes.config.find import find_zero, schema_path, zero_names
from dsrecipes.config.flags import FIXED, REMOVED
from dsrecipes.config.help import known_flags
from dsrecipes.config.layers import ALIASES
from dsrecipes.data.formats import documented
from dsrecipes.messages import RANGES, load_layer
from dsrecipes.zero.lint import key_table

if TYPE_CHECKING:
    from sphinx.application import Sphinx

_MARKER = re.compile(r"^<!-- generated: (\w+) -->$", re.MULTILINE)
_CHINESE = {
    "model": "模型",
    "data": "資料",
    "LoRA and 4 bits": "LoRA 與 4 位元",
    "optimization": "最佳化",
    "engine": "引擎",
    "evaluation and saving": "評估與儲存",
    "logging": "記錄",
    "resume and robustness": "接續訓練與穩健性",
    "everything else of transformers.TrainingArguments": "transformers.TrainingArguments 的其他旗標",
    "flag": "旗標",
    "default": "預設值",
    "what it does": "作用",
    "its one value": "唯一的值",
    "why, and what to use instead": "原因，以及替代作法",
    "use instead": "替代作法",
    "key": "鍵",
    "value": "值",
    "top level": "最上層",
    "renamed keys": "改名的鍵",
    "removed keys": "已移除的鍵",
    "keys without effect": "沒有作用的鍵",
    "keys in the wrong place": "放錯位置的鍵",
    "old name": "舊名",
    "new name": "新名",
    "what to do": "該怎麼做",
    "what is meant": "應使用的鍵",
    "why": "原因",
    "cause: ": "原因：",
    "cure: ": "處理：",
    "the others are ignored by DeepSpeed, and reported here": "其他的鍵 DeepSpeed 會忽略，這裡會提出警告",
    "the others are refused": "其他的鍵會被拒絕",
    "an entry of `dataset`": "`dataset` 的一項",
    "keys that are not flags": "不是旗標的鍵",
    "keys that are flags": "也是旗標的鍵",
    "format": "格式",
    "columns of the prompt": "提示的欄位",
    "columns of the answer": "回答的欄位",
}
"""Headings and columns of the Chinese pages; descriptions that the program prints are English on both."""


class Words:
    """The words of one language."""

    def __init__(self, language: str) -> None:
        """`language` as Sphinx calls it: en or zh_TW."""
        self.is_chinese = language == "zh_TW"

    def __call__(self, text: str) -> str:
        """A heading or a column's name in this language."""
        return _CHINESE[text] if self.is_chinese else text

    def heading(self, text: str) -> str:
        """The same with a capital letter."""
        text = self(text)
        return text[:1].upper() + text[1:]


def escape(text: Any) -> str:
    """Escape a text for a cell of a Markdown table; code in backticks stays as it is."""
    parts = re.split(r"(`[^`]*`)", " ".join(str(text).split()))
    escaped = [
        re.sub(r"([\\*_<>\[\]{}$~^#])", r"\\\1", part) if index % 2 == 0 else part for index, part in enumerate(parts)
    ]
    return "".join(escaped).replace("|", "\\|")


def code(value: Any) -> str:
    """A value in backticks, as it is written in YAML."""
    if value is None or value in ("", [], ()):
        return ""
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return f"`{text}`".replace("|", "\\|")


def table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    columns = list(columns)
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def flags(words: Words) -> Iterator[str]:
    """The flags of `dsrecipes train` by group, those with one value, and those that transformers has removed."""
    groups: dict[str, list[tuple[str, str, str]]] = {}
    known = known_flags()
    # ours before those of transformers
    for name in (key for key in json.loads(schema_path().read_text("utf-8"))["definitions"] if key in known):
        if name not in FIXED and name not in ALIASES:
            flag = known[name]
            groups.setdefault(flag.group, []).append((f"`--{name}`", code(flag.default), escape(flag.about)))
    order = list(_CHINESE)
    for group in sorted(groups, key=order.index):
        yield f"## {words.heading(group)}\n"
        yield table(map(words, ("flag", "default", "what it does")), groups[group])


def fixed_flags(words: Words) -> Iterator[str]:
    """Flags of TrainingArguments that have one value here."""
    rows = [(f"`--{name}`", code(value), escape(why)) for name, (value, why) in FIXED.items()]
    yield table(map(words, ("flag", "its one value", "why, and what to use instead")), rows)


def removed_flags(words: Words) -> Iterator[str]:
    """Flags that transformers had, and old names."""
    rows = [(f"`--{name}`", escape(instead)) for name, instead in REMOVED.items()]
    rows += [(f"`--{name}`", f"`--{instead}`") for name, instead in ALIASES.items()]
    yield table(map(words, ("flag", "use instead")), sorted(rows))


def commands(_: Words) -> Iterator[str]:
    """The help of every command, as it is printed."""
    for command in ("", *cli.COMMANDS):
        yield f"## `dsrecipes {command}".rstrip() + "`\n"
        yield f"```text\n{_help(command)}\n```\n"


@functools.cache
def _help(command: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        cli.main([command, "--help"] if command else ["--help"])
    return out.getvalue().rstrip()


def yaml_keys(words: Words) -> Iterator[str]:
    """Each key of a recipe's YAML with its type, from the JSON schema; flags.md describes those that are flags."""
    schema = json.loads(schema_path().read_text("utf-8"))
    own = {key: field for key, field in schema["properties"].items() if "$ref" not in field}
    source = schema["definitions"].pop("source")["properties"]
    for heading, fields in (("keys that are not flags", own), ("an entry of `dataset`", source)):
        yield f"## {words.heading(heading)}\n"
        rows = [(f"`{key}`", _values(field), escape(field.get("description", ""))) for key, field in fields.items()]
        yield table(map(words, ("key", "value", "what it does")), rows)
    flags = {key: field for key, field in schema["definitions"].items() if not field.get("deprecated")}
    yield f"## {words.heading('keys that are flags')}\n"
    rows = [(f"`{key}`", _values(field), code(field.get("default"))) for key, field in flags.items()]
    yield table(map(words, ("key", "value", "default")), rows)


def _values(field: Mapping[str, Any]) -> str:
    """The values of a key: those that it can choose from, or a type and its range."""
    if "enum" in field:
        return ", ".join(code(value) for value in field["enum"] if value is not None)
    kinds = field.get("type", ["string", "object", "array"])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    limits = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    ranges = [f"{sign} {field[name]}" for name, sign in limits.items() if name in field]
    return ", ".join([" / ".join(kind for kind in kinds if kind != "null"), *ranges])


def zero_files(_: Words) -> Iterator[str]:
    """The shipped ZeRO JSON files."""
    for name in zero_names():
        path = find_zero(name)
        assert path is not None
        yield f"### {name}\n"
        yield f"```json\n{path.read_text('utf-8').strip()}\n```\n"


def zero_keys(words: Words) -> Iterator[str]:
    """What DeepSpeed reads of a ZeRO JSON, from the table that the check of the file uses."""
    keys = key_table(None)
    for section, names in keys["sections"].items():
        rest = (
            "the others are refused"
            if section in keys["strict"]
            else "the others are ignored by DeepSpeed, and reported here"
        )
        yield f"### {f'`{section}`' if section else words.heading('top level')}\n"
        yield f"{', '.join(f'`{name}`' for name in names)} ({words(rest)})\n"
    for heading, part, columns in (
        ("renamed keys", "renamed", ("old name", "new name")),
        ("removed keys", "removed", ("key", "what to do")),
        ("keys in the wrong place", "elsewhere", ("key", "what is meant")),
        ("keys without effect", "unused", ("key", "why")),
    ):
        yield f"### {words.heading(heading)}\n"
        yield table(map(words, columns), [(f"`{key}`", escape(value)) for key, value in keys[part].items()])


def messages(words: Words) -> Iterator[str]:
    """Every message with an id, by layer: what it is, its cause and its cure."""
    for layer in RANGES:
        entries = load_layer(layer)
        if entries:
            yield f"## {layer}\n"
        for identifier, message in entries.items():
            text = message.zh if words.is_chinese else message.en
            yield f"### {identifier}\n"
            yield f"**{escape(text.title)}**\n"
            yield f"{words.heading('cause: ')}{escape(text.cause)}\n\n{words.heading('cure: ')}{escape(text.cure)}\n"


def api(_: Words) -> Iterator[str]:
    """The public names, with signature and docstring (autodoc)."""
    for name in dsrecipes.__all__:
        value = getattr(dsrecipes, name)
        if inspect.isclass(value):
            lines = [f".. autoclass:: dsrecipes.{name}", "   :members:"]
        elif inspect.isroutine(value):
            lines = [f".. autofunction:: dsrecipes.{name}"]
        else:  # a type's alias, whose own docstring is that of dict or Callable
            module = f"dsrecipes.{dsrecipes._EXPORTS[name]}"
            about = ModuleAnalyzer.for_module(module).find_attr_docs().get(("", name), [])
            lines = [f".. py:data:: dsrecipes.{name}", "", f"   ``{value}``", "", *(f"   {line}" for line in about)]
        yield "\n".join(("```{eval-rst}", *lines, "```", ""))


def row_formats(words: Words) -> Iterator[str]:
    """The formats of rows, with the names that their columns may have."""
    yield table((words("format"), words("columns of the prompt"), words("columns of the answer")), documented())


GENERATORS: dict[str, Callable[[Words], Iterator[str]]] = {
    function.__name__: function
    for function in (
        flags,
        fixed_flags,
        removed_flags,
        commands,
        yaml_keys,
        zero_files,
        zero_keys,
        messages,
        api,
        row_formats,
    )
}


def _fill(app: Sphinx, _page: str, source: list[str]) -> None:
    words = Words(app.config.language)
    source[0] = _MARKER.sub(lambda match: "\n".join(GENERATORS[match[1]](words)), source[0])


def setup(app: Sphinx) -> dict[str, bool]:
    """Sphinx calls this."""
    app.add_lexer("csv", TextLexer)  # Pygments has none
    app.connect("source-read", _fill)
    return {"parallel_read_safe": True}
