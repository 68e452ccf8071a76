"""How does a shell complete `dsrecipes`? With a script that shtab makes of the commands' flags.

source <(dsrecipes completion bash)
dsrecipes completion zsh > ~/.zfunc/_dsrecipes

Importing the commands would import torch, which takes seconds in every new shell. So their flags are read from the source code
of their modules, and those of `train` from the JSON schema of the recipes.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib.util
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dsrecipes.config.find import recipe_names, schema_path, variant_names, zero_names
from dsrecipes.config.layers import PROFILES
from dsrecipes.errors import UserError, nearest
from dsrecipes.messages import load_all

SHELLS = ("bash", "zsh")
_FILES = {"bash": "_shtab_compgen_files", "zsh": "_files"}
_FOLDERS = {"bash": "_shtab_compgen_dirs", "zsh": "_files -/"}
# shtab completes a value as a file name where the function's name contains `_dir` or `_file`
_BASH_FUNCTION = """\
_dsrecipes_%s() {
  compgen -W "%s" -- "$1"
  compgen -f -X '!%s' -- "$1"
  compgen -d -- "$1"
}
"""
_NAMES: dict[str, tuple[Callable[[], list[str]], str]] = {
    "run_dirs": (lambda: ["last"], ""),
    "recipe_files": (recipe_names, "*.py"),
    "config_files": (variant_names, "*.yaml"),
    "deepspeed_files": (lambda: [*zero_names(), "none"], "*.json"),
}
"""Kind of value -> the names that are offered, and the pattern of the files that are offered along with folders."""
_FILE_FLAGS = ("dataset", "eval_dataset", "prompts", "rubric", "out", "judge")
_FOLDER_FLAGS = ("output_dir", "to", "model_name_or_path", "resume_from_checkpoint", "checkpoint", "against")


def _named(kind: str) -> dict[str, str]:
    """Return, by shell, how it completes a kind of value that has names of its own."""
    words, files = _NAMES[kind]
    pattern = f"-g '{files}'" if files else "-/"
    return {"bash": f"_dsrecipes_{kind}", "zsh": f"{{compadd {' '.join(words())}; _files {pattern}}}"}


def script(shell: str, modules: Mapping[str, str]) -> str:
    """Build the completion script of a shell.

    Args:
        shell: one of SHELLS.
        modules: command -> the module that defines its flags.
    """
    import shtab

    parser = argparse.ArgumentParser("dsrecipes")
    parser.add_argument("--version", action="store_true", help="print the version")
    commands_parser = parser.add_subparsers()
    commands_parser.add_parser("list", help="recipes and variants")
    commands_parser.add_parser("completion", help="this script").add_argument("shell", choices=SHELLS)
    explain = commands_parser.add_parser("explain", help="cause and cure of messages")
    explain.add_argument("ids", nargs="*", choices=list(load_all()))
    for flag, options in _flags_in("dsrecipes.explain"):
        explain.add_argument(flag, **options)
    for name in ("train", "show"):
        _add_recipe_flags(commands_parser.add_parser(name, help=f"{name} a recipe"), name)
    for name, module in modules.items():
        command = commands_parser.add_parser(name, help=f"{name} a run")
        _complete(command.add_argument("run", nargs="*"), _named("run_dirs"))
        for flag, options in dict(_flags_in(module)).items():
            _complete(command.add_argument(flag, **options), _paths(flag))
    functions = [_BASH_FUNCTION % (name, " ".join(words()), files) for name, (words, files) in _NAMES.items()]
    return shtab.complete(parser, shell, preamble="\n".join(functions) if shell == "bash" else "")


def main(argv: list[str], modules: Mapping[str, str]) -> int:
    """Print the script for the shell that the command line names."""
    if len(argv) != 1 or argv[0] not in SHELLS:
        word = f"{argv[0]!r}{nearest(argv[0], SHELLS)}" if argv else "no shell"
        raise UserError(
            "DSR643", f"completion: {word}: give one of {', '.join(SHELLS)}, as in `source <(dsrecipes completion bash)`"
        )
    print(script(argv[0], modules))
    return 0


def _add_recipe_flags(parser: argparse.ArgumentParser, command: str) -> None:
    """Add the recipe, the keys of a YAML as flags, and the flags that no YAML has."""
    _complete(parser.add_argument("recipe", nargs="?"), _named("recipe_files"))
    config = parser.add_argument("--config", help="YAML of flags, or a shipped variant")
    _complete(config, _named("config_files"))
    parser.add_argument("--profile", choices=PROFILES)
    parser.add_argument("--procs", help="ranks")
    if command == "train":
        parser.add_argument("--max_restarts", help="restarts after a rank was killed or hung")
    else:
        parser.add_argument("--all", action="store_true", help="the defaults too")
    for name, field in json.loads(schema_path().read_text("utf-8"))["definitions"].items():
        if name == "source" or field.get("deprecated"):
            continue
        # argparse formats help texts with %
        about = field.get("description", "").replace("%", "%%")
        flag = parser.add_argument(f"--{name}", choices=_choices(field) or None, help=about)
        _complete(flag, _named("deepspeed_files") if name == "deepspeed" else _paths(name))


def _choices(field: Mapping[str, Any]) -> tuple[str, ...]:
    if "boolean" in field.get("type", ()):
        return ("true", "false")
    return tuple(str(choice) for choice in field.get("enum", ()) if choice is not None)


def _paths(flag: str) -> Mapping[str, str] | None:
    name = flag.lstrip("-")
    if name in _FILE_FLAGS:
        return _FILES
    return _FOLDERS if name in _FOLDER_FLAGS else None


def _complete(action: argparse.Action, complete: Mapping[str, str] | None) -> None:
    if complete:
        action.complete = complete  # type: ignore[attr-defined]  # where shtab looks for it


def _flags_in(module: str, function: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each flag that a module, or one function of it, adds to a parser, directly or by calling an `add_*` function."""
    source = importlib.util.find_spec(module)
    assert source is not None and source.origin
    tree = ast.parse(Path(source.origin).read_text("utf-8"))
    imports = {
        name.name: str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for name in node.names
    }
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    for call in ast.walk(functions[function] if function else tree):
        if not isinstance(call, ast.Call):
            continue
        name = ast.unparse(call.func).rpartition(".")[2]
        first = call.args[0] if call.args else None
        flag = first.value if isinstance(first, ast.Constant) else None
        if name in ("add", "add_argument") and isinstance(flag, str) and flag.startswith("--"):
            yield flag, _options(call)
        elif name.startswith("add_") and name in imports:
            yield from _flags_in(imports[name], name)


def _options(call: ast.Call) -> dict[str, Any]:
    """Return the arguments of an `add_argument` call that matter to a shell and are written as literals."""
    options = {}
    for keyword in call.keywords:
        if keyword.arg in ("action", "choices", "help", "nargs"):
            with contextlib.suppress(ValueError):  # an expression
                options[keyword.arg] = ast.literal_eval(keyword.value)
    return options
