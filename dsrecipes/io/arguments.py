"""The argument parser of the commands on finished runs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NoReturn

from dsrecipes.errors import UserError


class CommandParser(argparse.ArgumentParser):
    """argparse whose errors are UserErrors, without abbreviations."""

    def __init__(self, command: str, about: str) -> None:
        """`command` as it is typed after `dsrecipes`."""
        super().__init__(prog=f"dsrecipes {command}", description=about, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raise what is wrong, and where the flags are told."""
        raise UserError(f"{message}; `{self.prog} --help` lists the flags")


def check_out(path: Path | None) -> None:
    """Refuse an --out that exists or has no folder, before anything is computed (UserError)."""
    if path and (path.exists() or not path.parent.is_dir()):
        raise UserError(f"--out {path}: " + ("it exists; name another file" if path.exists() else "no such folder"))


def above_zero(word: str) -> int:
    """A flag's value: a whole number of at least 1."""
    if not word.isdigit() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word} (give a whole number of at least 1)")
    return int(word)
