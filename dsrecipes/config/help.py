"""Which flags exist, and with which values would this command line run? The text of `dsrecipes train --help`.

The fields of transformers.TrainingArguments are read from its source, because importing it takes ten seconds.
"""

from __future__ import annotations

import ast
import dataclasses
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
from dsrecipes.config.schema import DataConfig, ModelConfig, RunConfig
from dsrecipes.errors import printable

_WIDTH, _COLUMN = 80, 36
_HEAD = """\
usage: dsrecipes train RECIPE [--flag value ...]
       LAUNCHER -m dsrecipes.run --recipe RECIPE [--flag value ...]
"""
_OWN = {"config": None, "profile": "auto", "procs": None, "max_restarts": "0"}
"""Flag of the command itself -> its default."""
_SHORT: dict[str, dict[str, tuple[str, str]]] = {
    "start": {
        "config": ("FILE|NAME", "YAML of flags, or a shipped variant"),
        "profile": ("", "auto, full or starter (small, offline)"),
        "procs": ("N", "Ranks to start; default one for each GPU"),
        "max_restarts": ("N", "Restarts after a rank was killed or hung"),
        "dry_run": ("", "Check everything up to the first step"),
    },
    "model": {
        "model_name_or_path": ("MODEL", "Hub id or folder"),
        "lora_r": ("", "LoRA rank; 0 trains all weights"),
        "load_in_4bit": ("", "4-bit base weights (needs --lora_r)"),
    },
    "data": {
        "dataset": ("DATA", "Hub id, file or folder; several are mixed"),
        "eval_dataset": ("DATA", "Validation rows; also --validation_split"),
        "max_length": ("", "Longest sequence, in tokens"),
        "packing": ("", "Several examples in one sequence"),
    },
    "optimization": {
        "num_train_epochs": ("", "Passes over the data"),
        "max_steps": ("", "Optimizer steps; above 0 overrides epochs"),
        "global_batch_size": ("N", "Sequences per step, over all ranks"),
        "per_device_train_batch_size": ("", "Sequences in a rank's forward pass"),
        "learning_rate": ("", "Peak learning rate"),
        "warmup_steps": ("", "Steps up to the peak; below 1: a share"),
        "seed": ("", "Seed of row order, dropout, new weights"),
    },
    "engine": {
        "deepspeed": ("", "zero0 to zero3, *_offload, a JSON, or none"),
        "bf16": ("true|false", "Default: on if the GPU supports it"),
        "activation_checkpointing": ("true|false", "Saves memory; a third slower"),
    },
    "evaluation, saving, resume": {
        "eval_steps": ("N", "Steps between evaluations"),
        "save_steps": ("", "Steps between checkpoints"),
        "output_dir": ("DIR", "Run folder; default runs/RECIPE/TIME"),
        "resume_from_checkpoint": ("auto|stepN|DIR", "auto: the newest checkpoint, if any"),
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
"""Group -> fields without a heading; the other fields of RunConfig belong to resume and robustness."""


@dataclass(frozen=True)
class Flag:
    """A field of one of the configuration's dataclasses."""

    group: str
    default: Any
    about: str


@cache
def known_flags() -> dict[str, Flag]:
    """Every flag by name: the keys that a YAML or a command line may have."""
    flags = dict(_trainer_flags())
    for config_class in (ModelConfig, DataConfig, RunConfig):
        for field in dataclasses.fields(config_class):
            overridden = flags.get(field.name)
            group = overridden.group if overridden else _group(config_class, field.name)
            default = None if field.default is dataclasses.MISSING else field.default
            flags[field.name] = Flag(group, default, field.metadata["help"])
    return flags


def _group(config_class: type[Any], name: str) -> str:
    if config_class is DataConfig:
        return "data"
    if config_class is ModelConfig:
        return "LoRA and 4 bits" if name.startswith(("lora_", "bnb_", "load_in_4bit")) else "model"
    return next((group for group, names in _OF_RUN.items() if name in names), "resume and robustness")


def _trainer_flags() -> Iterator[tuple[str, Flag]]:
    """The fields of transformers.TrainingArguments, from its source."""
    package = importlib.util.find_spec("transformers")
    assert package is not None and package.origin
    text = Path(package.origin).with_name("training_args.py").read_text("utf-8")
    # Comments `# --- Heading ---` group the fields, and ast drops comments.
    headings = {
        number: line.strip(" #-") for number, line in enumerate(text.splitlines(), 1) if line.startswith("    # --- ")
    }
    fields = next(n.body for n in ast.parse(text).body if isinstance(n, ast.ClassDef) and n.name == "TrainingArguments")
    for field in fields:
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            name = field.target.id
            heading = next((headings[number] for number in sorted(headings, reverse=True) if number < field.lineno), "")
            default, about = _default_and_about(field.value)
            yield name, Flag(_trainer_group(name, heading), default, _SHORT_ABOUT.get(name) or about)


def _trainer_group(name: str, heading: str) -> str:
    by_name = next((group for group, names in _OF_RUN.items() if name in names), None)
    by_heading = next((group for group, own in _GROUPS.items() if heading and heading in own.split("|")), [*_GROUPS][-1])
    return by_name or by_heading


def _default_and_about(value: ast.expr | None) -> tuple[Any, str]:
    """The default and the help text of `field(default=..., metadata={"help": ...})`."""
    if not isinstance(value, ast.Call):
        return None, ""
    arguments = {keyword.arg: keyword.value for keyword in value.keywords}
    metadata = _literal(arguments.get("metadata"))
    about = metadata.get("help", "") if isinstance(metadata, dict) else ""
    return _literal(arguments.get("default")), " ".join(str(about).split())


def _literal(value: ast.expr | None) -> Any:
    """The value of an expression that is a literal, else None."""
    try:
        return ast.literal_eval(value) if value is not None else None
    except ValueError:
        # An expression, such as the name of a constant.
        return None


def asks_for_help(argv: list[str]) -> bool:
    """Whether a command line asks for help."""
    return any(word in ("-h", "--help", "--help=all") for word in argv)


def help_text(argv: list[str]) -> str:
    """The help for a command line, with the values that its recipe, profile, --config and flags give.

    Raises:
        UserError: no such recipe, profile or file.
    """
    words = [word for word in argv if word not in ("-h", "--help", "--help=all")]
    position = next((index for index, word in enumerate(argv) if word in ("-h", "--help")), None)
    # `all` counts only after --help; elsewhere it may be the value of a flag.
    everything = "--help=all" in argv or (position is not None and argv[position + 1 : position + 2] == ["all"])
    if everything and "all" in words:
        words.remove("all")
    # The first word may be the recipe, as in `dsrecipes train RECIPE --help`.
    flags = parse_flags(["--recipe", *words] if words and not words[0].startswith("-") else words)
    layers = layer(flags) if flags.get("recipe") or flags.get("config") else None
    values = _values(flags, layers)
    body = _all(values) if everything else _short(values, layers)
    return "\n".join([_HEAD, *_about(layers), *body])


def _about(layers: Layers | None) -> Iterator[str]:
    if layers is None:
        yield textwrap.fill(f"RECIPE: {', '.join(recipe_names())}, or the path of your own .py file.", _WIDTH)
        yield "These are the defaults. Name a RECIPE to see its values."
    else:
        yield f"{layers.recipe.name}, profile {layers.profile} ({layers.why_profile}). It would run with these values:"


def _values(flags: dict[str, Any], layers: Layers | None) -> dict[str, Any]:
    """Flag -> its value by the command line and the files that this names, else its default."""
    merged = {key: value for key, (value, _) in layers.merged().items()} if layers else {}
    own: dict[str, Any] = {key: flags.get(key, default) for key, default in _OWN.items()}
    if layers:
        own["profile"] = layers.profile
        ranks = ranks_of(own["procs"], layers)
        own["procs"] = ranks
        merged |= batch_of(layers, ranks)
    # The default of bf16 depends on the device.
    defaults = {name: flag.default for name, flag in known_flags().items()} | {"bf16": None}
    return defaults | merged | own


def _short(values: dict[str, Any], layers: Layers | None) -> Iterator[str]:
    for group, flags in _SHORT.items():
        yield f"\n{group}"
        for name, (unset, about) in flags.items():
            yield from _lines(name, values[name], about, unset)
    rest = [f"--{key} {_word(values[key])}" for key in (layers.merged() if layers else ()) if key not in _SHORT_ABOUT]
    if rest:
        yield "\nalso set"
        # A flag and its value stay on one line: \0 replaces the spaces inside them.
        pairs = "  ".join(pair.replace(" ", "\0") for pair in rest)
        lines = textwrap.fill(pairs, _WIDTH - 2, break_long_words=False, break_on_hyphens=False)
        yield textwrap.indent(lines.replace("\0", " "), "  ")
    yield "\n`dsrecipes train RECIPE --help all` lists every flag."
    yield "`dsrecipes show RECIPE` shows where each value comes from."


def _all(values: dict[str, Any]) -> Iterator[str]:
    # Old names, and flags that have one value here, would only fill the page.
    hidden = {*ALIASES, *FIXED}
    for group in _GROUPS:
        yield f"\n{group}"
        if group == "start":
            lines = {name: about for name, (_, about) in _SHORT["start"].items() if name in _OWN}
        else:
            lines = {n: flag.about for n, flag in known_flags().items() if flag.group == group and n not in hidden}
        for name, about in lines.items():
            # Only the first sentence, because transformers' help may fill a page.
            sentence = re.split(r"(?<!e\.g)(?<!i\.e)(?<=[\w)`'])\.(?:\s|$)", about, maxsplit=1)[0]
            yield from _lines(name, values[name], sentence)


def _lines(name: str, value: Any, about: str, unset: str = "") -> Iterator[str]:
    """`  --name value  about` in columns; a flag that is too long for its column has a line of its own."""
    flag = _flag(name, value, unset)
    first, *more = textwrap.wrap(about, _WIDTH - _COLUMN) or [""]
    if len(flag) + 2 > _COLUMN:
        yield flag
        yield f"{'':{_COLUMN}}{first}".rstrip()
    else:
        yield f"{flag:<{_COLUMN}}{first}".rstrip()
    yield from (f"{'':{_COLUMN}}{line}" for line in more)


def _flag(name: str, value: Any, unset: str) -> str:
    """`  --name value`, with the middle of a long value cut out."""
    shown = unset if value in (None, "") else _word(value)
    room = _WIDTH - len(name) - 5
    if len(shown) > room:
        # Both ends of a path say more than its middle.
        shown = f"{shown[: room // 2 - 2]}...{shown[-(room - room // 2 - 1) :]}"
    return f"  --{name} {shown}".rstrip()


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return printable(" ".join(map(str, value)) if isinstance(value, list) else str(value))
