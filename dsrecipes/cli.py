"""What a person types: dsrecipes train | list | show, and what is done with a finished run.

dsrecipes train gpt2_clm --max_steps 10
dsrecipes show alpaca_llama_sft --lora_r 8
"""

from __future__ import annotations

import errno
import importlib
import importlib.metadata
import logging
import os
import sys
import textwrap
import warnings
from collections.abc import Callable
from functools import partial

from dsrecipes.completion import main as completion
from dsrecipes.config import find
from dsrecipes.config.batch import batch_of, ranks_of
from dsrecipes.config.flags import refuse_unknown, refuse_unsuited
from dsrecipes.config.help import asks_for_help, help_text, known_flags
from dsrecipes.config.layers import layer, parse_flags
from dsrecipes.errors import EXIT_CODE, UserError, plural, printable
from dsrecipes.explain import main as explain
from dsrecipes.io import text
from dsrecipes.io.caches import check_docstrings, redirect_caches
from dsrecipes.launch.launcher import launch
from dsrecipes.launch.task_ranks import refuse_tasks

_USAGE = """\
usage: dsrecipes COMMAND ...

  train RECIPE [--procs N] [flags]   train on N ranks (default: one for each GPU); `train RECIPE --help` lists the flags
        [--max_restarts N]           after a failure start again from the last checkpoint, N times at most
  list                               the recipes and their variants
  show RECIPE [flags] [--all]        the resolved configuration and where each value comes from
  explain [ID ...]                   cause and cure of messages by the ids at their ends, such as DSR042
  completion bash|zsh                a script that completes commands and flags: source <(dsrecipes completion bash)
  --version                          the version

with RUN, a run folder or `last` (the newest finished one); `COMMAND --help` lists the flags:
  chat RUN                           talk to the model
  generate RUN --prompts FILE        answers to all rows of a file
  evaluate RUN                       loss, accuracy or answers on rows that it did not train on
  compare RUN [RUN ...]              before and after the run, or several runs, item by item
  judge RUN --judge FOLDER|URL       an LLM grades its answers against others
  verify RUN                         is the saved model what was trained?
  export RUN --to DIR                one folder that plain transformers loads, adapters merged
  report RUN [RUN ...]               one HTML file about a run, or several side by side
  reshape RUN                        a checkpoint in one folder, for any number of ranks and any ZeRO stage
"""
_HELP = {
    "list": "usage: dsrecipes list\n\nThe recipes and their variants.\n",
    "completion": """\
usage: dsrecipes completion bash|zsh

Print a script that completes commands, flags and recipes.
  bash   source <(dsrecipes completion bash)
  zsh    dsrecipes completion zsh > a folder of $fpath/_dsrecipes
""",
    "show": """\
usage: dsrecipes show RECIPE [--flag value ...] [--all]

The resolved configuration and where each value comes from.
  --all      the defaults too
  --procs N  ranks to derive the batch for (default: one for each GPU)
`dsrecipes train RECIPE --help` lists the other flags.
""",
}
"""Command -> its help; the other commands print their own."""


def _take(argv: list[str], name: str) -> str | None:
    """Remove `--name VALUE` or `--name=VALUE` from argv and return VALUE."""
    for index, word in enumerate(argv):
        if word == f"--{name}" and index + 1 < len(argv):
            value = argv[index + 1]
            del argv[index : index + 2]
            return value
        if word.startswith(f"--{name}="):
            del argv[index]
            return word.partition("=")[2]
    return None


def _with_recipe(argv: list[str]) -> list[str]:
    """`RECIPE flags` as `--recipe RECIPE flags`."""
    return ["--recipe", *argv] if argv and not argv[0].startswith("-") else argv


def train(argv: list[str]) -> int:
    """Start as many ranks as there are accelerators, or --procs N, and pass their exit code on."""
    for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(key, None)  # this command starts the ranks itself; a notebook's own may be about
    if asks_for_help(argv):
        print(help_text(argv))
        return 0
    refuse_tasks(os.environ)
    procs, restarts = _take(argv, "procs"), _take(argv, "max_restarts") or "0"
    argv = _with_recipe(argv)
    if not (restarts.isdecimal() and len(restarts) < 6):
        raise UserError(
            "DSR642", f"--max_restarts {restarts}: expected the number of restarts after a failure, a whole number from 0"
        )
    layers = layer(parse_flags(argv))  # a wrong name is reported before anything heavy is imported
    ranks = ranks_of(procs, layers)
    batch_of(layers, ranks)  # refuses a batch that these ranks cannot share
    if ranks > 1 or int(restarts):
        return launch(ranks, argv, int(restarts))
    from dsrecipes.run import main

    return main(argv)


def list_recipes(argv: list[str]) -> int:
    """A line a recipe: what, model, data, size of machine; then the variants."""
    for name in find.recipe_names():
        recipe = find.find_recipe(name)
        assert recipe.yaml is not None
        values = text.read_yaml(recipe.yaml)
        told = (values.get(key, "") for key in ("about", "model_name_or_path", "dataset", "machine"))
        print(f"{name:<18}{' · '.join(map(str, told))}")
    print("\nwithout a GPU each runs a small offline profile")
    print("\nvariants (dsrecipes train --config NAME)")
    for name in find.variant_names():
        values = text.read_yaml(find.find_config(name))
        print(f"{name:<30}{values.get('recipe')}: {values.get('about', '')}")
    return 0


def show(argv: list[str]) -> int:
    """The resolved configuration with the origin of each value; --all adds the defaults (and imports transformers)."""
    everything = "--all" in argv
    argv = _with_recipe([word for word in argv if word != "--all"])
    procs = _take(argv, "procs")
    layers = layer(parse_flags(argv))
    merged = layers.merged()
    refuse_unknown(merged, known_flags())
    refuse_unsuited(merged)
    origins = {key: origin for key, (_, origin) in merged.items()}
    values = {key: value for key, (value, _) in merged.items()}
    if everything:
        from dsrecipes.config.parse import build_config

        config = build_config(layers)
        values = {**vars(config.model), **vars(config.data), **config.train, **layers.zero_json().values}
    ranks = ranks_of(procs, layers)
    for key, number in batch_of(layers, ranks).items():
        if str(values.get(key)) != str(number):
            values[key], origins[key] = number, f"derived for {plural(ranks, 'rank')}"
    print(f"# {layers.recipe.name}, profile {layers.profile} ({layers.why_profile})")
    for note in layers.notes():
        print(f"# {note}")
    width = max(map(len, values), default=0)
    for key, value in values.items():
        shown = "null" if value is None else str(value).lower() if isinstance(value, bool) else value
        origin = origins.get(key, "default")
        print(
            f"{key + ':':<{width + 2}}{printable(str(shown)):<34} # {origin if origin != 'profile' else 'profile ' + layers.profile}"
        )
    return 0


def _version() -> str:
    try:
        return importlib.metadata.version("dsrecipes")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


_READER_ENDED = 141
"""A shell's exit code of a command whose reader ended: 128 + SIGPIPE."""
_COMMANDS = {
    "chat": "inference.chat",
    "generate": "inference.generate",
    "evaluate": "evaluation.evaluate",
    "compare": "evaluation.compare",
    "judge": "evaluation.judge",
    "verify": "publish.verify",
    "export": "publish.export",
    "report": "reporting.report",
    "reshape": "publish.reshape",
}
"""The commands on finished runs, and the module of each, which has a `main`."""


def _use(command: str, argv: list[str]) -> int:
    """A command on a finished run, imported when it is called; stderr has our messages alone, not those of libraries."""
    warnings.filterwarnings("ignore")
    if logging.lastResort:  # prints the warnings of loggers without a handler
        logging.lastResort.setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    check_docstrings()
    cache_note = redirect_caches()
    if cache_note:
        print(cache_note, file=sys.stderr)
    try:
        return importlib.import_module(f"dsrecipes.{_COMMANDS[command]}").main(argv)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130


def main(argv: list[str] | None = None) -> int:
    """Entry point of the `dsrecipes` command."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if sys.stdout is None:  # closed, as by `>&-`
        sys.stdout = open(os.devnull, "w")
    commands: dict[str, Callable[[list[str]], int]] = {
        "train": train,
        "list": list_recipes,
        "show": show,
        "explain": explain,
    }
    commands |= {name: partial(_use, name) for name in _COMMANDS}
    commands["completion"] = partial(completion, modules={name: f"dsrecipes.{module}" for name, module in _COMMANDS.items()})
    try:
        if not argv or argv[0] in ("-h", "--help"):
            print(textwrap.dedent(_USAGE), end="", flush=True)
            return 0 if argv else EXIT_CODE
        if argv[0] == "--version":
            print(f"dsrecipes {_version()}", flush=True)
            return 0
        if argv[0] not in commands:
            raise UserError(
                "DSR641",
                f"unknown command {argv[0]!r}{find.nearest(argv[0], commands)}; the commands are {', '.join(commands)}",
            )
        if argv[0] in _HELP and asks_for_help(argv[1:]):
            print(_HELP[argv[0]], end="", flush=True)
            return 0
        code = commands[argv[0]](argv[1:])
        sys.stdout.flush()
        return code
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_CODE
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.ENOSPC):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if error.errno == errno.EPIPE:  # the reader of the output has ended, as `head` does
            return _READER_ENDED
        print(f"error: the output cannot be written: {error.strerror}", file=sys.stderr)
        return EXIT_CODE


if __name__ == "__main__":
    sys.exit(main())
