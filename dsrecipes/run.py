"""What does every rank run? `python -m dsrecipes.run --recipe gpt2_clm [flags]`.

Also under a launcher: torchrun --nproc_per_node 2 -m dsrecipes.run --recipe gpt2_clm, or srun python -m dsrecipes.run ...
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from dsrecipes.config.help import asks_for_help, help_text
from dsrecipes.config.layers import Layers, layer, parse_flags
from dsrecipes.errors import EXIT_CODE, RESUME_CODE, RunStopped, UserError
from dsrecipes.io.caches import check_docstrings, redirect_caches
from dsrecipes.io.console import Console
from dsrecipes.launch.imports import quick_imports, unneeded_packages
from dsrecipes.launch.signals import restore_child_signal
from dsrecipes.launch.task_ranks import adopt_ranks
from dsrecipes.launch.watchdog import end_with_launcher

if TYPE_CHECKING:
    from dsrecipes.train.training import Training

_RESUME = "; --output_dir {} --resume_from_checkpoint auto resumes from the last checkpoint"
_PATIENCE = 15
"""Seconds that rank 0 has to report a fault of all ranks: the launcher ends all ranks when the first one ends."""
_BUSY_SHARE = 0.2
"""Share of a core that other processes use when the machine counts as busy."""


def main(argv: list[str] | None = None) -> int:
    """Run one rank.

    Returns:
        0; 2 with one message for what the user can fix; 75 for a run that was stopped and can resume; 130 after Ctrl-C.
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        if asks_for_help(argv):
            print(help_text(argv))
            return 0
        check_docstrings()
        adopt_ranks(os.environ)
        # before the libraries are imported, which read then where their caches are
        cache_note = redirect_caches()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_CODE
    # after --help, which must answer at once
    _prepare_process()
    rank = int(os.environ.get("RANK", "0"))
    console, layers, training = Console(main=rank == 0), None, None
    try:
        layers = layer(parse_flags(argv))
        console = _open_console(layers, rank, cache_note)
        training = _load(layers, console)
        training.run()
    except UserError as error:
        # first of all: while the console captures, a message would go into log.txt
        console.release()
        if layers is not None and layers.is_on("verbose"):
            traceback.print_exc()
        _report(f"error: {error}", rank)
        return EXIT_CODE
    except RunStopped as stopped:
        console.release()
        if rank == 0:
            print(stopped, flush=True)
        return RESUME_CODE
    except KeyboardInterrupt:
        console.release()
        if rank == 0:
            folder = training.folder if training else None
            print("\ninterrupted" + (_RESUME.format(folder.path) if folder else ""), file=sys.stderr)
        return 130
    except BaseException:
        console.release()
        raise
    finally:
        _leave_process_group_at_exit()
    console.release()
    return 0


def _prepare_process() -> None:
    """Set what must be set before torch is imported, and end this process with its launcher."""
    if os.environ.get("WORLD_SIZE", "1") == "1" and _others_are_busy():
        # Read when torch is loaded. OpenMP threads that spin while they wait for each other are a fifth faster on an idle
        # machine, and starve next to another busy process: two steps of qlora_zero3 took 180 s, and 32 s with sleeping threads.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    end_with_launcher()
    # until the training begins there is nothing to save; Python allows handlers only in the main thread
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(RESUME_CODE))
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        restore_child_signal()


def _others_are_busy() -> bool:
    """Whether other processes used more than a fifth of one core in the last tenth of a second (Linux; elsewhere: no)."""
    try:
        before = Path("/proc/stat").read_text().split("\n", 1)[0].split()
        time.sleep(0.1)
        after = Path("/proc/stat").read_text().split("\n", 1)[0].split()
    except OSError:
        return False
    ticks = [int(new) - int(old) for old, new in zip(before[1:], after[1:], strict=True)]
    # proc(5): user nice system idle iowait irq softirq steal; guest, which follows, is a part of user
    idle, total = ticks[3] + ticks[4], sum(ticks[:8])
    return total > 0 and (total - idle) / total * (os.cpu_count() or 1) > _BUSY_SHARE


def _open_console(layers: Layers, rank: int, cache_note: str | None) -> Console:
    """Introduce the run before the imports, which take ten seconds; without --verbose, hide what libraries print."""
    verbose = layers.is_on("verbose")
    if verbose:
        # not DETAIL: with it torch 2.13's DDP on gloo ends in a segmentation fault
        os.environ.setdefault("TORCH_DISTRIBUTED_DEBUG", "INFO")
    else:
        # libraries warn of things that a user of a recipe cannot change
        warnings.filterwarnings("ignore")
        # unset, tokenizers warns in every forked process
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    console = Console(main=rank == 0, capture=not verbose, rank_logs=rank if verbose else None)
    console.say(layers.first_line())
    if cache_note:
        console.say(f"{'cache':<10}{cache_note}")
    return console


def _load(layers: Layers, console: Console) -> Training:
    """Import recipe and training, which import torch, without packages that this run does not need."""
    with quick_imports(unneeded_packages(layers)):
        from dsrecipes.recipe_class import recipe_class
        from dsrecipes.train.training import Training

    return Training(recipe_class(layers.recipe)(layers, console))


def _report(message: str, rank: int) -> None:
    """Print an error on rank 0; another rank that still runs after a while has an error that rank 0 does not have."""
    if rank:
        time.sleep(_PATIENCE)
        message = f"rank {rank}: {message}"
    print(message, file=sys.stderr, flush=True)


def _leave_process_group_at_exit() -> None:
    """End the process group when this process ends.

    Not at once: DeepSpeed keeps its groups for good, and a later run in this process needs them.
    """
    if "torch" in sys.modules:
        from dsrecipes.zero.process import end_process_group

        atexit.register(end_process_group)


if __name__ == "__main__":
    sys.exit(main())
