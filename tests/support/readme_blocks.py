"""The code blocks of the README and of docs/: files to write, commands to run."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from support.tiny import ROOT  # isort: skip

LANGUAGES = ("en", "zh-TW")
_READMES = {"en": ROOT / "README.md", "zh-TW": ROOT / "docs" / "README.zh-TW.md"}
_BLOCK = re.compile(
    r"(?:^`(?P<file>[\w./-]+)`:?\uff1a?\n\n)?^```(?P<language>\w+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)
_TOCTREE = re.compile(r"^```\{toctree\}\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block, and the file name on the line above it where there is one."""

    language: str
    text: str
    file: str | None


def toctree(language: str) -> list[str]:
    """The pages that a language's index lists, in reading order."""
    index = (ROOT / "docs" / language / "index.md").read_text(encoding="utf-8")
    lines = [line for tree in _TOCTREE.finditer(index) for line in tree["text"].splitlines()]
    return [line for line in lines if line and not line.startswith(":")]


def pages(language: str = "en") -> list[Path]:
    """The README and the pages that are written by hand, in reading order; reference/ is generated."""
    folder = ROOT / "docs" / language
    listed = [folder / f"{name}.md" for name in toctree(language) if not name.startswith("reference/")]
    return [_READMES[language], folder / "index.md", *listed]


def blocks(language: str = "en") -> list[Block]:
    """All fenced blocks of a language's pages in order."""
    return [block for page in pages(language) for block in blocks_of(page)]


def blocks_of(page: Path) -> list[Block]:
    """The fenced blocks of one page in order."""
    return [Block(m["language"], m["text"], m["file"]) for m in _BLOCK.finditer(page.read_text(encoding="utf-8"))]


def commands() -> list[str]:
    """The different lines of the sh blocks, without comments, in order."""
    lines = [line for block in blocks() if block.language == "sh" for line in block.text.splitlines()]
    words = [shlex.split(line, comments=True) for line in lines]
    return list(dict.fromkeys(shlex.join(line) for line in words if line))


def write_files(folder: Path) -> None:
    """The files that the pages show."""
    for block in blocks():
        if block.file:
            path = folder / block.file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text, encoding="utf-8")


def launcher_lines() -> list[str]:
    """The lines that start ranks of dsrecipes.run on one machine, and `dsrecipes train --procs 2`."""
    lines = [line for line in commands() if "dsrecipes.run" in line or line == "dsrecipes train gpt2_clm --procs 2"]
    return [line for line in lines if "--nnodes" not in line]
