"""What every rank runs: python -m dsrecipes.run --recipe gpt2_clm [flags].

Also under a launcher: torchrun --nproc_per_node 2 -m dsrecipes.run --recipe gpt2_clm
"""

from __future__ import annotations

import os
import sys
import traceback
import warnings

from dsrecipes.errors import EXIT_CODE, UserError
from dsrecipes.find import layer, parse_flags
from dsrecipes.runs.console import Console


def main(argv: list[str] | None = None) -> int:
    """Run one rank; returns 0, or 2 with one message on rank 0 for what the user can mend."""
    argv = sys.argv[1:] if argv is None else argv
    if "--help" in argv or "-h" in argv:
        from dsrecipes.config import parser

        parser().print_help()
        return 0
    flags_verbose = "--verbose" in argv and argv[(argv.index("--verbose") + 1) : (argv.index("--verbose") + 2)] not in (
        ["false"],
        ["0"],
    )
    verbose = flags_verbose or "--verbose=true" in argv
    if verbose:
        os.environ.setdefault("TORCH_DISTRIBUTED_DEBUG", "DETAIL")
    else:
        warnings.filterwarnings("ignore")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    rank = int(os.environ.get("RANK", "0"))
    console = Console(main=rank == 0, capture=not verbose)
    try:
        layers = layer(parse_flags(argv))
        from dsrecipes.base import recipe_class

        recipe_class(layers.recipe)(layers, console).run()
    except UserError as error:
        console.release()
        if verbose:
            traceback.print_exc()
        if rank == 0:
            print(f"error: {error}", file=sys.stderr)
        return EXIT_CODE
    except KeyboardInterrupt:
        console.release()
        if rank == 0:
            print("interrupted; the same command with --resume_from_checkpoint auto goes on", file=sys.stderr)
        return 130
    except BaseException:
        console.release()
        raise
    finally:
        if "torch" in sys.modules:
            from dsrecipes.zero.runtime import end_process_group

            end_process_group()
    console.release()
    return 0


if __name__ == "__main__":
    sys.exit(main())
