"""What every rank runs: python -m dsrecipes.run --recipe gpt2_clm [flags].

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

from dsrecipes.config.help import asks_for_help, help_text
from dsrecipes.config.layers import layer, parse_flags
from dsrecipes.errors import EXIT_CODE, RESUME_CODE, RunStopped, UserError
from dsrecipes.io.caches import check_docstrings, redirect_caches
from dsrecipes.io.console import Console
from dsrecipes.launch.imports import quick_imports, unneeded_packages
from dsrecipes.launch.signals import restore_child_signal
from dsrecipes.launch.task_ranks import adopt_ranks
from dsrecipes.launch.watchdog import end_with_launcher

_GO_ON = "; --output_dir {} --resume_from_checkpoint auto goes on from the last checkpoint"
_PATIENCE = 15
"""Seconds that rank 0 has to tell what ails every rank: the launcher ends all ranks with the first that ends."""


def _others_are_busy() -> bool:
    """Whether other processes took more than a fifth of one core in the last tenth of a second (Linux; else no)."""
    try:
        before = Path("/proc/stat").read_text().split("\n", 1)[0].split()
        time.sleep(0.1)
        after = Path("/proc/stat").read_text().split("\n", 1)[0].split()
    except OSError:
        return False
    busy = [int(new) - int(old) for old, new in zip(before[1:], after[1:], strict=True)]
    idle, total = busy[3] + busy[4], sum(busy[:8])  # proc(5): user nice system idle iowait irq softirq steal
    return total > 0 and (total - idle) / total * (os.cpu_count() or 1) > 0.2


def _tell(message: str, rank: int) -> None:
    if rank:
        time.sleep(_PATIENCE)
        message = f"rank {rank}: {message}"  # still here: rank 0 does not have this error
    print(message, file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    """Run one rank; returns 0, or 2 with one message on rank 0 for what the user can mend."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        if asks_for_help(argv):
            print(help_text(argv))
            return 0
        check_docstrings()
        adopt_ranks(os.environ)
        cache_note = redirect_caches()  # before the libraries read where theirs are
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_CODE
    if os.environ.get("WORLD_SIZE", "1") == "1" and _others_are_busy():
        # Read when torch is loaded. OpenMP threads that wait for each other awake are a fifth faster on an idle machine,
        # and starve beside another busy process: two steps of qlora_zero3 took 180 s so, and 32 s asleep.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    end_with_launcher()
    if threading.current_thread() is threading.main_thread():  # until the training begins there is nothing to save
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(RESUME_CODE))
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        restore_child_signal()
    rank = int(os.environ.get("RANK", "0"))
    console, verbose, training = Console(main=rank == 0), False, None
    try:
        layers = layer(parse_flags(argv))
        verbose = layers.is_on("verbose")
        if verbose:
            # not DETAIL: with it torch 2.13's DDP on gloo ends in a segmentation fault
            os.environ.setdefault("TORCH_DISTRIBUTED_DEBUG", "INFO")
        else:
            warnings.filterwarnings("ignore")
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        console = Console(main=rank == 0, capture=not verbose, rank_logs=rank if verbose else None)
        console.say(layers.first_line())  # before the imports, which take ten seconds
        if cache_note:
            console.say(f"{'cache':<10}{cache_note}")
        with quick_imports(unneeded_packages(layers)):
            from dsrecipes.base import recipe_class
            from dsrecipes.train.training import Training

        training = Training(recipe_class(layers.recipe)(layers, console))
        training.run()
    except UserError as error:
        console.release()
        if verbose:
            traceback.print_exc()
        _tell(f"error: {error}", rank)
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
            print("\ninterrupted" + (_GO_ON.format(folder.path) if folder else ""), file=sys.stderr)
        return 130
    except BaseException:
        console.release()
        raise
    finally:
        if "torch" in sys.modules:
            from dsrecipes.zero.process import end_process_group

            # not here: DeepSpeed keeps its groups for good, and a later run in this process needs them
            atexit.register(end_process_group)
    console.release()
    return 0


if __name__ == "__main__":
    sys.exit(main())
