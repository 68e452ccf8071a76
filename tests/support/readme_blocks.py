"""The README's code blocks: files to write, commands to run."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from support.tiny import ROOT  # isort: skip

ENGLISH, CHINESE = ROOT / "README.md", ROOT / "docs" / "README.zh-TW.md"
_BLOCK = re.compile(
    r"(?:^`(?P<file>[\w./-]+)`:?\uff1a?\n\n)?^```(?P<language>\w+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)


@dataclass(frozen=True)
class Block:
    """A fenced block, and the file name on the line above it where there is one."""

    language: str
    text: str
    file: str | None


def blocks(readme: Path = ENGLISH) -> list[Block]:
    """All fenced blocks in order."""
    return [Block(m["language"], m["text"], m["file"]) for m in _BLOCK.finditer(readme.read_text(encoding="utf-8"))]


def commands(readme: Path = ENGLISH) -> list[str]:
    """The lines of the sh blocks, without comments."""
    lines = [line for block in blocks(readme) if block.language == "sh" for line in block.text.splitlines()]
    return [command for line in lines if (command := shlex.join(shlex.split(line, comments=True)))]


def write_files(folder: Path) -> None:
    """The files that the README shows."""
    for block in blocks():
        if block.file:
            path = folder / block.file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text, encoding="utf-8")


def launcher_lines() -> list[str]:
    """The lines that start ranks of dsrecipes.run on one machine, and `dsrecipes train --procs 2`."""
    lines = [line for line in commands() if "dsrecipes.run" in line or line == "dsrecipes train gpt2_clm --procs 2"]
    return [line for line in lines if "--nnodes" not in line]
