"""Can the libraries work on this machine? Writable caches and docstrings, checked before anything heavy is imported."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import MutableMapping
from pathlib import Path

from dsrecipes.errors import UserError

_AT_HOME = {"TRITON_CACHE_DIR": "triton", "MPLCONFIGDIR": "matplotlib", "TORCHINDUCTOR_CACHE_DIR": "torchinductor"}
"""Variable -> folder of a cache that a library puts into the home directory, or into one named after the user.

In a container the user may have no name and no home directory.
"""


def check_docstrings() -> None:
    """Refuse Python without docstrings (UserError): transformers parses them while loading a model, and then blames the model."""
    if sys.flags.optimize > 1:
        raise UserError(
            "DSR009",
            "python -OO (or PYTHONOPTIMIZE=2) removes docstrings, which transformers reads when it loads a model: start Python "
            "without it; -O is fine",
        )


def redirect_caches(env: MutableMapping[str, str] = os.environ) -> str | None:
    """Move our cache and those of the libraries to another folder where the home directory is not writable.

    Returns:
        One line for the header where a temporary folder had to be used, else None.

    Raises:
        UserError: DSRECIPES_CACHE, which the user set, cannot be written, or no temporary folder can.
    """
    own = env.get("DSRECIPES_CACHE")
    if own and not _writable(Path(own)):
        raise UserError("DSR008", f"DSRECIPES_CACHE={own} cannot be written: set it to a writable folder")
    home = _home()
    # set in the environment before any library is imported, because they read these variables at import
    usual = Path(env["XDG_CACHE_HOME"]) if env.get("XDG_CACHE_HOME") else home and home / ".cache"
    note = None
    if usual is not None and _writable(usual):
        folder = usual
    else:
        folder = Path(own) if own else _temporary()
        _keep_hub(env, usual)
        env["XDG_CACHE_HOME"] = str(folder)
        if not own:
            note = f"{usual or 'home directory'} cannot be written; using {folder} (set DSRECIPES_CACHE to choose another)"
    if home is None or not _writable(home):
        for key, name in _AT_HOME.items():
            env.setdefault(key, str(folder / name))
    return note


def _home() -> Path | None:
    try:
        return Path.home()
    except RuntimeError:  # no HOME, and a user that the system does not know, as in containers
        return None


def _writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK | os.X_OK)  # False on a read-only file system for root too


def _temporary() -> Path:
    """Create a folder for this user in the temporary directory, the same for all ranks of the machine and for later runs.

    Its name is predictable, so a folder that another user created is refused: cached tokens are trusted.
    """
    try:
        folder = Path(tempfile.gettempdir(), f"dsrecipes-{os.getuid()}")
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.lstat().st_uid == os.getuid() and not folder.is_symlink():
            return folder
        reason = f"{folder} belongs to another user"
    except OSError as error:
        reason = str(error)
    raise UserError(
        "DSR008",
        f"no cache can be written, neither below the home directory nor in a temporary one ({reason}): set DSRECIPES_CACHE",
    )


def _keep_hub(env: MutableMapping[str, str], usual: Path | None) -> None:
    """Keep reading the models and the token of a read-only home directory."""
    existing = usual / "huggingface" if usual else None
    if existing is None or "HF_HOME" in env:
        return
    if (existing / "hub").is_dir():
        env.setdefault("HF_HUB_CACHE", str(existing / "hub"))
    if (existing / "token").is_file():
        env.setdefault("HF_TOKEN_PATH", str(existing / "token"))
