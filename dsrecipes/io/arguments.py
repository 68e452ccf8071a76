"""How do the commands on finished runs read their flags?"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NoReturn

from dsrecipes.errors import UserError


class CommandParser(argparse.ArgumentParser):
    """argparse whose errors are UserErrors, without abbreviations.

    An abbreviated flag would change its meaning as soon as another flag with the same beginning is added.
    """

    def __init__(self, command: str, about: str) -> None:
        """Name the command as it is typed after `dsrecipes`, and say what it does."""
        super().__init__(prog=f"dsrecipes {command}", description=about, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raise the message as a UserError instead of printing the usage and exiting (UserError)."""
        raise UserError("DSR006", f"{message}; `{self.prog} --help` lists the flags")


def check_out(path: Path | None) -> None:
    """Refuse an --out that exists or has no folder, before hours of computing are spent (UserError)."""
    if path and path.exists():
        raise UserError("DSR007", f"--out {path}: the file exists; name another one")
    if path and not path.parent.is_dir():
        raise UserError("DSR007", f"--out {path}: there is no folder {path.parent}")


def above_zero(word: str) -> int:
    """Parse a flag's value that must be a whole number of at least 1."""
    if not word.isdigit() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word} (give a whole number of at least 1)")
    return int(word)
