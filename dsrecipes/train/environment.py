"""What does a run take from the process and the machine, and how is it given back when the run ends?"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from types import TracebackType

from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from dsrecipes.data.stream import Stream
from dsrecipes.launch.environment import DEVICE_KEYS, RANK_KEYS
from dsrecipes.launch.watchdog import Watchdog
from dsrecipes.train.run_folder import ClaimedFolder


class RunEnvironment(AbstractContextManager["RunEnvironment"]):
    """Restores environment variables, releases the folder's lock, ends the watchdog and the stream's thread.

    However a run ends, a later run in the same process, or a process started from a notebook, must meet none of this:
    transformers finds ZeRO-3 through a global, accelerate leaves a variable behind, and so do we.
    """

    def __init__(self) -> None:
        """Take nothing yet: each of these is None until the run takes it."""
        self.folder: ClaimedFolder | None = None
        self.stream: Stream | None = None
        self.watchdog: Watchdog | None = None
        self._variables: dict[str, str | None] = {}

    def __enter__(self) -> RunEnvironment:
        self._variables = {key: os.environ.get(key) for key in (*RANK_KEYS, *DEVICE_KEYS)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # first of all: closing a stream or waiting for a lock must not look like a rank that hangs
        if self.watchdog is not None:
            self.watchdog.end(failed=error is not None)
        if self.stream is not None:
            self.stream.close()
        if self.folder is not None:
            # last of what writes into the folder
            self.folder.release()
        # else the next model of this process is built for ZeRO-3, with empty weights
        unset_hf_deepspeed_config()
        os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
        for key, value in self._variables.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value
