"""Which file does a user's path mean, and where are the starter files and the cache?"""

from __future__ import annotations

import os
from pathlib import Path

from dsrecipes.errors import UserError

STARTER = "starter:"
"""Prefix of names that mean a file or folder in dsrecipes/starter."""


def user_path(name: str | Path) -> Path:
    """Return a path as the user gave it, with `~` expanded; it need not exist.

    Raises:
        UserError: no file can have this name, or permission is denied.
    """
    # stat, because it raises for every name that no file can have, and Path.exists would only return False
    try:
        path = Path(name).expanduser()
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise UserError("DSR001", f"{name}: cannot be opened ({error.strerror})") from None
    except (RuntimeError, ValueError) as error:  # ~name of an unknown user; a NUL; what the file system cannot encode
        raise UserError("DSR001", f"{str(name)!r}: not the name of a file or folder ({error})") from None
    return path


def flag_path(flag: str, name: str) -> Path:
    """Return the path that a flag gives; like user_path, with the flag in the message."""
    try:
        return user_path(name)
    except UserError as error:
        raise UserError(error.code, f"--{flag} {error.message}") from None


def starter_path(name: str) -> str:
    """Return the path of the bundled file for `starter:data/prose.txt`; other names stay unchanged (UserError: no such file)."""
    if not name.startswith(STARTER):
        return name
    path = Path(__file__).parents[1] / "starter" / name.removeprefix(STARTER)
    if not os.path.exists(path):  # unlike Path.exists, False for a name that no file can have
        raise UserError("DSR002", f"{name}: no such bundled file or folder ({path})")
    return str(path)


def cache_root() -> Path:
    """Return DSRECIPES_CACHE, else dsrecipes/ below XDG_CACHE_HOME or ~/.cache."""
    # read at each call, because redirect_caches may change the environment after this module is imported
    own = os.environ.get("DSRECIPES_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dsrecipes"
