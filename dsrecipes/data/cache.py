"""When are prepared rows taken from the cache? What the cache key covers, and who writes an entry.

Entries are found by content and not by time stamps: a stale entry would train on other rows than the user's.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock
from transformers import PreTrainedTokenizerBase

from dsrecipes.data.row import Row, fingerprint
from dsrecipes.errors import UserError

CACHE_VERSION = 1
"""Part of every cache key. Raise it with each change to dsrecipes/data/ that changes the prepared files of some rows:
their tokens, labels, weights, order, reasons for dropping, notes, the layout of the files or the fields of stats.json.
A change of names, messages or comments must not raise it, for that makes every user prepare all data sets again."""
_PATIENCE = 20
"""Seconds that other ranks wait for the first rank of their host to take the lock."""


def cache_key(recipe: type, splits: dict[str, Iterable[Row]], tokenizer: PreTrainedTokenizerBase, *settings: Any) -> str:
    """Hash all that prepared rows depend on: rows, tokenizer, settings, the recipe's code and CACHE_VERSION."""
    parts = [
        f"version {CACHE_VERSION}",
        *map(module_source, _own_modules(recipe)),
        *(f"{name}={fingerprint(rows)}" for name, rows in splits.items()),
        describe_tokenizer(tokenizer),
        repr(settings),
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def describe_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return everything of a tokenizer that changes ids, as text.

    Truncation and padding are left out: they are a leftover of the last call, and each call sets them again.
    """
    # the content and not the name or path: a tokenizer at the same path may have been changed
    if tokenizer.is_fast:
        backend = tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        vocabulary = backend.to_str()
    else:
        vocabulary = json.dumps(tokenizer.get_vocab(), sort_keys=True)
    special_tokens = json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str)
    return "\0".join([vocabulary, special_tokens, str(tokenizer.chat_template)])


def module_source(name: str) -> str:
    """Return the code of an imported module.

    Raises:
        UserError: it has none: `__main__` of a notebook or of `python -`.
    """
    try:
        return inspect.getsource(sys.modules[name])
    except (OSError, TypeError) as error:
        raise UserError(
            "DSR185",
            f"the recipe's code is in {name}, which has no file to read it from: save the class as a .py file and import it",
        ) from error


def _own_modules(recipe: type) -> list[str]:
    """List the recipe's modules and what they import besides installed packages: the user's code that may change tokens.

    A shipped recipe counts as the user's code, because users edit recipes/ in a checkout.
    """
    names = [cls.__module__ for cls in recipe.__mro__ if cls.__module__ not in ("abc", "builtins", "dsrecipes.base")]
    for name in names:  # grows during the loop: imports of imports count too
        for value in vars(sys.modules[name]).values():
            imported = value.__name__ if inspect.ismodule(value) else getattr(value, "__module__", None)
            if imported not in names and _is_own(imported):
                names.append(str(imported))
    return sorted(set(names))


def _is_own(module: str | None) -> bool:
    """Return whether a module belongs neither to dsrecipes nor to an installed package."""
    file = getattr(sys.modules.get(module or ""), "__file__", None) or ""
    installed = file.startswith((sys.prefix, sys.base_prefix)) or "site-packages" in file
    return file.endswith(".py") and not installed and not str(module).startswith("dsrecipes.")


@contextmanager
def writing(folder: Path) -> Iterator[bool]:
    """Hold the lock of a cache entry; yields whether it still has to be written.

    All ranks prepare at the same time: the first one writes, and the others find the entry when they get the lock.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    _let_first_rank_begin(folder)
    with FileLock(f"{folder}.lock"):
        yield not is_written(folder)


def is_written(folder: Path) -> bool:
    """Return whether a cache entry is complete: its stats.json is written last."""
    return (folder / "stats.json").is_file()


def _let_first_rank_begin(folder: Path) -> None:
    """Let the first rank of a host take the lock, because it is the one that shows the progress bar."""
    deadline = time.monotonic() + _PATIENCE
    # bounded, because the first rank may be gone, or hold the lock of another data set
    while int(os.environ.get("LOCAL_RANK", 0)) and time.monotonic() < deadline:
        if folder.is_dir() or Path(f"{folder}.lock").exists():
            return
        time.sleep(0.1)
