"""Where the user's paths, the starter files and the cache are."""

from __future__ import annotations

import os
from pathlib import Path

from dsrecipes.errors import UserError

STARTER = "starter:"
"""Prefix of names that mean a file or folder bundled in dsrecipes/starter."""


def user_path(name: str | Path) -> Path:
    """A path as a user gave it, `~` resolved; nothing need be there.

    Raises:
        UserError: no file can have this name, or it may not be looked at.
    """
    try:
        path = Path(name).expanduser()
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise UserError(f"{name}: cannot be opened ({error.strerror})") from None
    except (RuntimeError, ValueError) as error:  # ~name of nobody; a NUL, or what no file system can encode
        raise UserError(f"{str(name)!r}: not the name of a file or folder ({error})") from None
    return path


def flag_path(flag: str, name: str) -> Path:
    """The path that a flag gives; like user_path, with the flag in the message."""
    try:
        return user_path(name)
    except UserError as error:
        raise UserError(f"--{flag} {error}") from None


def starter_path(name: str) -> str:
    """`starter:data/prose.txt` as the path of the bundled file; any other name as it is."""
    if not name.startswith(STARTER):
        return name
    path = Path(__file__).parents[1] / "starter" / name.removeprefix(STARTER)
    if not os.path.exists(path):  # false, too, for a name that no file can have
        raise UserError(f"{name}: no such bundled file or folder ({path})")
    return str(path)


def cache_root() -> Path:
    """DSRECIPES_CACHE, else dsrecipes/ below XDG_CACHE_HOME or ~/.cache."""
    own = os.environ.get("DSRECIPES_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dsrecipes"
