"""What can a person type? The commands: dsrecipes train | list | show, and those on a finished run.

dsrecipes train gpt2_clm --max_steps 10
dsrecipes show alpaca_llama_sft --lora_r 8
"""

from __future__ import annotations

import errno
import importlib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dsrecipes.completion import main as completion
from dsrecipes.config import find
from dsrecipes.config.batch import batch_of, ranks_of
from dsrecipes.config.flags import refuse_unknown, refuse_unsuited
from dsrecipes.config.help import asks_for_help, help_text, known_flags
from dsrecipes.config.layers import Layers, layer, parse_flags
from dsrecipes.errors import EXIT_CODE, UserError, coded, plural, printable
from dsrecipes.explain import main as explain
from dsrecipes.io import text
from dsrecipes.io.caches import check_docstrings, redirect_caches
from dsrecipes.launch.launcher import launch
from dsrecipes.launch.task_ranks import refuse_tasks

_READER_ENDED = 141
"""A shell's exit code of a command whose reader ended: 128 + SIGPIPE."""
_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_NAME_WIDTH = 23
"""Columns of a name in `dsrecipes list`."""
_LIST_HELP = """\
usage: dsrecipes list

List the recipes and their variants.
"""
_SHOW_HELP = """\
usage: dsrecipes show RECIPE [--flag value ...] [--all]

Print the resolved configuration and where each value comes from.
  --all      the defaults, too
  --procs N  ranks to derive the batch for (default: one per GPU)
`dsrecipes train RECIPE --help` lists the other flags.
"""
_COMPLETION_HELP = """\
usage: dsrecipes completion bash|zsh

Print a script that completes commands, flags and recipes.
  bash   source <(dsrecipes completion bash)
  zsh    dsrecipes completion zsh > a folder of $fpath/_dsrecipes
"""


@dataclass(frozen=True)
class Command:
    """One command: its arguments, what it does, and what runs it."""

    arguments: str
    about: str
    run: Callable[[list[str]], int] | str
    """A function, or the module of a command on a finished run, which has a `main` and is imported when it is called."""
    help: str = ""
    """The text of --help; empty for a command that prints its own."""


def train(argv: list[str]) -> int:
    """Start as many ranks as there are accelerators, or --procs N, and return their exit code."""
    # This command starts the ranks itself; a notebook may have set variables of its own.
    for key in _RANK_VARIABLES:
        os.environ.pop(key, None)
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
    # Wrong names, and a batch that these ranks cannot divide, are reported before torch is imported.
    layers = layer(parse_flags(argv))
    ranks = ranks_of(procs, layers)
    batch_of(layers, ranks)
    if ranks > 1 or int(restarts):
        return launch(ranks, argv, int(restarts))
    from dsrecipes.run import main

    return main(argv)


def list_recipes(argv: list[str]) -> int:
    """Print the recipes (what, size of machine, model, data), then the variants of each."""
    for name in find.recipe_names():
        path = find.find_recipe(name).yaml
        assert path is not None
        values = text.read_yaml(path)
        print(f"{name:<{_NAME_WIDTH}}{values.get('about', '')} ({values.get('machine', '')})")
        print(f"{'':<{_NAME_WIDTH}}{values.get('model_name_or_path', '')} · {values.get('dataset', '')}")
    print("\nWithout a GPU each runs a small offline profile.")
    print("\nvariants (dsrecipes train --config NAME)")
    variants = {name: text.read_yaml(find.find_config(name)) for name in find.variant_names()}
    for recipe in find.recipe_names():
        own = {name: values for name, values in variants.items() if values.get("recipe") == recipe}
        if own:
            print(f"of {recipe}:")
        for name, values in own.items():
            print(f"  {name:<{_NAME_WIDTH}}{values.get('about', '')}")
    return 0


def show(argv: list[str]) -> int:
    """Print the resolved configuration with the origin of each value; --all adds the defaults (and imports transformers)."""
    with_defaults = "--all" in argv
    argv = _with_recipe([word for word in argv if word != "--all"])
    procs = _take(argv, "procs")
    layers = layer(parse_flags(argv))
    merged = layers.merged()
    refuse_unknown(merged, known_flags())
    refuse_unsuited(merged)
    origins = {key: origin for key, (_, origin) in merged.items()}
    values = _with_defaults(layers) if with_defaults else {key: value for key, (value, _) in merged.items()}
    ranks = ranks_of(procs, layers)
    for key, number in batch_of(layers, ranks).items():
        if str(values.get(key)) != str(number):
            values[key], origins[key] = number, f"derived for {plural(ranks, 'rank')}"
    _print_values(layers, values, origins)
    return 0


def _with_defaults(layers: Layers) -> dict[str, Any]:
    """Every value of a run, checked."""
    from dsrecipes.config.parse import build_config

    config = build_config(layers)
    return {**vars(config.model), **vars(config.data), **config.train, **layers.zero_json().values}


def _print_values(layers: Layers, values: Mapping[str, Any], origins: Mapping[str, str]) -> None:
    """Print values as YAML with their origins as comments."""
    print(f"# {layers.recipe.name}, profile {layers.profile} ({layers.why_profile})")
    for note in layers.notes():
        print(f"# {note}")
    width = max(map(len, values), default=0) + 2
    for key, value in values.items():
        origin = origins.get(key, "default")
        if origin == "profile":
            origin = f"profile {layers.profile}"
        print(f"{key + ':':<{width}}{printable(_as_yaml(value)):<34} # {origin}")


def _as_yaml(value: Any) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _take(argv: list[str], name: str) -> str | None:
    """Remove `--name VALUE` or `--name=VALUE` from argv and return VALUE (UserError: it is the last word, without a value)."""
    for index, word in enumerate(argv):
        if word == f"--{name}":
            if index + 1 == len(argv):
                raise UserError("DSR045", f"--{name}: the value is missing; give a number, such as --{name} 2")
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


_GROUPS: dict[str, dict[str, Command]] = {
    "train": {
        "train": Command("RECIPE [flags]", "train on one rank per GPU, or --procs N", train),
        "list": Command("", "the recipes and their variants", list_recipes, _LIST_HELP),
        "show": Command("RECIPE [flags]", "the resolved configuration, with origins", show, _SHOW_HELP),
    },
    "use a finished run (RUN: its folder, or `last` for the newest)": {
        "chat": Command("RUN", "talk to the model", "inference.chat"),
        "generate": Command("RUN --prompts FILE", "answers to all rows of a file", "inference.generate"),
        "evaluate": Command("RUN", "loss, accuracy or answers on held-out rows", "evaluation.evaluate"),
        "compare": Command("RUN [RUN ...]", "before and after, or several runs, by item", "evaluation.compare"),
        "judge": Command("RUN --judge FOLDER|URL", "an LLM grades answers against others", "evaluation.judge"),
        "verify": Command("RUN", "is the saved model what was trained?", "publish.verify"),
        "export": Command("RUN --to DIR", "one folder that plain transformers loads", "publish.export"),
        "report": Command("RUN [RUN ...]", "one HTML page about one run or several", "reporting.report"),
        "reshape": Command("RUN", "a checkpoint for any ranks and ZeRO stage", "publish.reshape"),
    },
    "help": {
        "explain": Command("[ID ...]", "cause and cure of a message, such as DSR042", explain),
        "completion": Command(
            "bash|zsh",
            "a script for completion in the shell",
            lambda argv: completion(argv, run_modules()),
            _COMPLETION_HELP,
        ),
    },
}
"""Heading -> command -> what it is; the usage text is made from this table."""
COMMANDS = {name: command for commands in _GROUPS.values() for name, command in commands.items()}


def run_modules() -> dict[str, str]:
    """Command on a finished run -> its module."""
    return {name: f"dsrecipes.{command.run}" for name, command in COMMANDS.items() if isinstance(command.run, str)}


def _usage() -> str:
    """The text of `dsrecipes --help`."""
    lines = ["usage: dsrecipes COMMAND [arguments]", "       dsrecipes COMMAND --help"]
    for heading, commands in _GROUPS.items():
        lines += ["", heading]
        lines += [f"  {name + ' ' + command.arguments:<32}{command.about}" for name, command in commands.items()]
    return "\n".join([*lines, f"  {'--version':<32}the version", ""])


def _version() -> str:
    # Imported here: it takes a tenth of a second, which only --version needs.
    from importlib import metadata

    try:
        return metadata.version("dsrecipes")
    except metadata.PackageNotFoundError:
        return "not installed"


def _use(module: str, argv: list[str]) -> int:
    """Run a command on a finished run; stderr gets our messages, not those of libraries."""
    warnings.filterwarnings("ignore")
    # lastResort prints the warnings of loggers without a handler.
    if logging.lastResort:
        logging.lastResort.setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    check_docstrings()
    cache_note = redirect_caches()
    if cache_note:
        print(cache_note, file=sys.stderr)
    try:
        # Imported by name when it is called: the modules of all commands would slow each of them down.
        return importlib.import_module(f"dsrecipes.{module}").main(argv)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130


def _dispatch(argv: list[str]) -> int:
    """Run the command that the first word names (UserError: there is no such command)."""
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage(), end="")
        return 0 if argv else EXIT_CODE
    name, *rest = argv
    if name == "--version":
        print(f"dsrecipes {_version()}")
        return 0
    command = COMMANDS.get(name)
    if command is None:
        hint = find.nearest(name, COMMANDS)
        raise UserError("DSR641", f"unknown command {name!r}{hint}; the commands are {', '.join(COMMANDS)}")
    if command.help and asks_for_help(rest):
        print(command.help, end="")
        return 0
    return _use(command.run, rest) if isinstance(command.run, str) else command.run(rest)


def main(argv: list[str] | None = None) -> int:
    """Entry point of the `dsrecipes` command: 0, the exit code of a run, or 2 after one message on stderr."""
    if sys.stdout is None:  # closed, as by `>&-`
        sys.stdout = open(os.devnull, "w")
    try:
        code = _dispatch(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return code
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_CODE
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.ENOSPC):
            raise
        # Python flushes stdout at exit; a second error there would replace the exit code.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        # The reader of the output has ended, as `head` does.
        if error.errno == errno.EPIPE:
            return _READER_ENDED
        print(coded("DSR644", f"error: the output cannot be written: {error.strerror}"), file=sys.stderr)
        return EXIT_CODE


if __name__ == "__main__":
    sys.exit(main())
