"""`dsrecipes train --help`: the most used flags with the values that would run; `--help all` lists all of them.

Read from the source of the dataclasses, because importing them takes ten seconds.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from dsrecipes.config.batch import batch_of, ranks_of
from dsrecipes.config.find import recipe_names
from dsrecipes.config.flags import FIXED
from dsrecipes.config.layers import ALIASES, Layers, layer, parse_flags
from dsrecipes.errors import printable

_WIDTH, _COLUMN = 100, 52
_HEAD = """\
usage: dsrecipes train RECIPE [--flag value ...]
       LAUNCHER -m dsrecipes.run --recipe RECIPE [--flag value ...]
"""
_OWN = {"config": None, "profile": "auto", "procs": None, "max_restarts": "0"}
"""Flags of the command itself, and their defaults."""
_SHORT: dict[str, dict[str, tuple[str, str]]] = {
    "start": {
        "config": ("FILE|NAME", "YAML of flags, or a shipped variant"),
        "profile": ("", "auto, full or starter (small, offline)"),
        "procs": ("N", "ranks that dsrecipes train starts"),
        "max_restarts": ("N", "restarts after a rank was killed or hung"),
        "dry_run": ("", "check everything up to the first step"),
    },
    "model": {
        "model_name_or_path": ("MODEL", "hub id or folder"),
        "lora_r": ("", "LoRA rank; 0 trains all weights"),
        "load_in_4bit": ("", "4-bit base weights (needs --lora_r)"),
    },
    "data": {
        "dataset": ("DATA", "hub id, file or folder; several are mixed"),
        "eval_dataset": ("DATA", "validation rows; also --validation_split"),
        "max_length": ("", "longest sequence, in tokens"),
        "packing": ("", "several examples in one sequence"),
    },
    "optimization": {
        "num_train_epochs": ("", "passes over the data"),
        "max_steps": ("", "optimizer steps; above 0 overrides epochs"),
        "global_batch_size": ("N", "sequences a step over all ranks"),
        "per_device_train_batch_size": ("", "sequences a rank computes at once"),
        "learning_rate": ("", "peak learning rate"),
        "warmup_steps": ("", "steps up to the peak"),
        "seed": ("", "of data order, dropout, new weights"),
    },
    "engine": {
        "deepspeed": ("", "zero0 to zero3, *_offload, a JSON, or none"),
        "bf16": ("true|false", "unset: on if the GPU supports it"),
        "activation_checkpointing": ("true|false", "less memory, a third slower"),
    },
    "evaluation, saving, resume": {
        "eval_steps": ("N", "steps between evaluations"),
        "save_steps": ("", "steps between checkpoints"),
        "output_dir": ("DIR", "run folder; default runs/RECIPE/TIME"),
        "resume_from_checkpoint": ("auto|stepN|DIR", "auto: the newest, if there is one"),
    },
}
"""Group -> flag -> (placeholder of a value that is not set, what the flag does)."""
_SHORT_ABOUT = {name: about for flags in _SHORT.values() for name, (_, about) in flags.items()}
_GROUPS = {
    "start": "",
    "model": "",
    "data": "Dataloader",
    "LoRA and 4 bits": "",
    "optimization": "Training Duration and Batch Size|Learning Rate & Scheduler|Optimizer|Regularization & Training Stability|"
    "Mixed Precision|Activation Checkpointing",
    "engine": "Compilation|Kernels|Additional Optimizations|Hardware|Accelerate|DDP|DeepSpeed",
    "evaluation and saving": "Output|Evaluation|Metrics|Checkpointing & Saving|Best Model Tracking",
    "logging": "Logging & Monitoring|Log Levels|Experiment Tracking",
    "resume and robustness": "Resuming Training|Reproducibility",
    "everything else of transformers.TrainingArguments": "",
}
"""Group -> headings in the source of TrainingArguments that belong to it."""
_OF_RUN = {
    "engine": ("require_deepspeed",),
    "optimization": ("global_batch_size",),
    "evaluation and saving": ("early_stopping_patience",),
    "logging": ("verbose",),
    "resume and robustness": ("resume_from_checkpoint",),
}
"""Group -> fields without a heading; the others that TrainConfig adds belong to resume and robustness."""


@dataclass(frozen=True)
class Flag:
    """A field of one of the dataclasses, as its source defines it."""

    group: str
    default: Any
    about: str


@cache
def known_flags() -> dict[str, Flag]:
    """Every field of the dataclasses: the keys that a YAML or a command line may have."""
    theirs = importlib.util.find_spec("transformers")
    assert theirs is not None and theirs.origin
    flags: dict[str, Flag] = {}
    for path in (Path(theirs.origin).with_name("training_args.py"), Path(__file__).with_name("schema.py")):
        text = path.read_text("utf-8")
        headings = {number: line for number, line in enumerate(text.splitlines(), 1) if line.startswith("    # --- ")}
        for node in _classes(text):
            for field in node.body:
                if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                    name, heading = field.target.id, _last_before(headings, field.lineno)
                    group = flags[name].group if name in flags else _group(node.name, name, heading)
                    default, about = _default_and_about(field.value)
                    short = node.name == "TrainingArguments" and _SHORT_ABOUT.get(name)
                    flags[name] = Flag(group, default, short or about)
    return flags


def _classes(text: str) -> Iterator[ast.ClassDef]:
    names = ("TrainingArguments", "ModelConfig", "DataConfig", "TrainConfig")
    yield from (node for node in ast.parse(text).body if isinstance(node, ast.ClassDef) and node.name in names)


def _last_before(headings: dict[int, str], line: int) -> str:
    return next((headings[number].strip(" #-") for number in sorted(headings, reverse=True) if number < line), "")


def _group(owner: str, name: str, heading: str) -> str:
    if owner == "ModelConfig":
        return "LoRA and 4 bits" if name.startswith(("lora_", "bnb_", "load_in_4bit")) else "model"
    if owner == "DataConfig":
        return "data"
    named = next((group for group, names in _OF_RUN.items() if name in names), None)
    if named or owner == "TrainConfig":
        return named or "resume and robustness"
    return next((group for group, own in _GROUPS.items() if heading in own.split("|") and heading), [*_GROUPS][-1])


def _default_and_about(value: ast.expr | None) -> tuple[Any, str]:
    """The default and the help text of `field(default=..., metadata={"help": ...})`, or of config.py's shorter forms."""
    if not isinstance(value, ast.Call):
        return None, ""
    words = {keyword.arg: keyword.value for keyword in value.keywords}
    if not words:
        literals = [_literal(argument) for argument in value.args]
        return (literals[1] if len(literals) > 1 else None), str(literals[0] if literals else "")
    metadata = _literal(words.get("metadata"))
    about = metadata.get("help", "") if isinstance(metadata, dict) else ""
    return _literal(words.get("default")), " ".join(str(about).split())


def _literal(value: ast.expr | None) -> Any:
    try:
        return ast.literal_eval(value) if value is not None else None
    except ValueError:  # an expression, such as a name of a constant
        return None


def asks_for_help(argv: list[str]) -> bool:
    """Whether a command line asks for help."""
    return any(word in ("-h", "--help", "--help=all") for word in argv)


def help_text(argv: list[str]) -> str:
    """The help for a command line: recipe, profile, --config and flags in it give the values.

    Raises:
        UserError: no such recipe, profile or file.
    """
    words = [word for word in argv if word not in ("-h", "--help", "--help=all")]
    position = next((index for index, word in enumerate(argv) if word in ("-h", "--help")), None)
    everything = "--help=all" in argv or (position is not None and argv[position + 1 : position + 2] == ["all"])
    if everything and "all" in words:
        words.remove("all")
    flags = parse_flags(["--recipe", *words] if words and not words[0].startswith("-") else words)
    layers = layer(flags) if flags.get("recipe") or flags.get("config") else None
    values = _values(flags, layers)
    body = _all(values) if everything else _short(values, layers)
    return "\n".join([_HEAD, *_about(layers), *body])


def _about(layers: Layers | None) -> Iterator[str]:
    if layers is None:
        yield textwrap.fill(f"RECIPE: {', '.join(recipe_names())}, or a .py file of yours.", _WIDTH)
        yield "These are the defaults; with a RECIPE, its own values are shown."
    else:
        yield f"{layers.recipe.name}, profile {layers.profile} ({layers.why_profile}). These values would run:"


def _values(flags: dict[str, Any], layers: Layers | None) -> dict[str, Any]:
    """Flag -> its value on the command line and in what that names, else its default."""
    merged = {key: value for key, (value, _) in layers.merged().items()} if layers else {}
    own = {key: flags.get(key, default) for key, default in _OWN.items()}
    if layers:
        own["profile"] = layers.profile
        own["procs"] = ranks_of(own["procs"], layers)
        merged |= batch_of(layers, own["procs"])
    defaults = {name: flag.default for name, flag in known_flags().items()} | {"bf16": None}  # the device decides
    return defaults | merged | own


def _short(values: dict[str, Any], layers: Layers | None) -> Iterator[str]:
    for group, flags in _SHORT.items():
        yield f"\n{group}"
        for name, (unset, about) in flags.items():
            yield f"{_flag(name, values[name], unset)} {about}"
    rest = [f"--{key} {_word(values[key])}" for key in (layers.merged() if layers else ()) if key not in _SHORT_ABOUT]
    if rest:
        yield "\nalso set"
        line = textwrap.fill("  ".join(rest).replace(" ", "\0").replace("\0\0", "  "), _WIDTH - 2, break_long_words=False)
        yield textwrap.indent(line.replace("\0", " "), "  ")
    yield "\n`--help all` lists every flag; `dsrecipes show RECIPE` shows where each value comes from."


def _all(values: dict[str, Any]) -> Iterator[str]:
    hidden = {*ALIASES, *FIXED}
    for group in _GROUPS:
        yield f"\n{group}"
        if group == "start":
            lines = {name: about for name, (_, about) in _SHORT["start"].items() if name in _OWN}
        else:
            lines = {n: flag.about for n, flag in known_flags().items() if flag.group == group and n not in hidden}
        for name, about in lines.items():
            sentence = re.split(r"(?<!e\.g)(?<!i\.e)(?<=[\w)`'])\.(?:\s|$)", about, maxsplit=1)[0]
            first, *more = textwrap.wrap(sentence, _WIDTH - _COLUMN - 1) or [""]
            yield f"{_flag(name, values[name], '')} {first}".rstrip()
            yield from (f"{'':<{_COLUMN}} {line}" for line in more)


def _flag(name: str, value: Any, unset: str) -> str:
    """`  --name value`, the value shortened to the column."""
    shown = unset if value in (None, "") else _word(value)
    room = _COLUMN - len(name) - 6
    if len(shown) > room:
        shown = f"{shown[: room // 2 - 2]}...{shown[-(room - room // 2 - 1) :]}"
    return f"{f'  --{name} {shown}':<{_COLUMN}}"


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return printable(" ".join(map(str, value)) if isinstance(value, list) else str(value))
