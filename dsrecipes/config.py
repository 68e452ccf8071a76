"""The three dataclasses of a run, and the one parser that YAML, flags and Python keywords go through."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import typing
from dataclasses import dataclass, field
from enum import Enum
from functools import cache, cached_property
from typing import Any, Literal, NoReturn

import torch
from transformers import HfArgumentParser, TrainingArguments

from dsrecipes.adapter import lora_targets, take_settings
from dsrecipes.batch import BATCH_KEYS
from dsrecipes.data.encode import EncodeOptions
from dsrecipes.data.renamed import parse_columns
from dsrecipes.data.weights import parse_class_weights
from dsrecipes.errors import UserError, nearest
from dsrecipes.flags import FIXED, JUDGED_SCHEDULES, refuse_unknown, refuse_unsuited
from dsrecipes.layers import Layers, seconds_of
from dsrecipes.sources import Source, read_sources
from dsrecipes.zero_values import ENGINE_KEYS


def _help(text: str, default: Any = None) -> Any:
    return field(default=default, metadata={"help": text})


def _list(text: str) -> Any:
    return field(default_factory=list, metadata={"help": text})


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


@dataclass(kw_only=True)
class ModelConfig:
    """Which model, how it is loaded, and what of it is trained."""

    model_name_or_path: str | None = _help("Hub id or folder of the model; `starter:NAME` is a bundled configuration.")
    model_revision: str = _help("Branch, tag or commit of a hub model.", "main")
    from_scratch: bool = _help("Start from random weights of the model's configuration.", False)
    attn_implementation: str | None = _help("Attention backend of transformers: sdpa, eager, flash_attention_2, ...")
    trust_remote_code: bool = _help("Run Python code that comes with a hub model.", False)
    allow_pickle: bool = _help("Read weights of a model that has no safetensors, only pickles (.bin).", False)
    load_in_4bit: bool = _help("Quantize the frozen base weights to 4 bits (needs lora_r > 0).", False)
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = _help("4-bit data type (QLoRA, arXiv:2305.14314, section 3).", "nf4")
    bnb_4bit_use_double_quant: bool = _help("Quantize the quantization constants too (QLoRA, section 3).", True)
    lora_r: int = _help("Rank of the LoRA adapter; 0 trains all weights.", 0)
    lora_alpha: int = _help("LoRA scale; the update is multiplied by lora_alpha / lora_r.", 32)
    lora_dropout: float = _help("Dropout on the adapter's input.", 0.0)
    lora_target_modules: list[str] = _list(
        "Layers that get an adapter: all-linear (the default: all but the head), names such as q_proj,v_proj (a layer whose "
        "name ends so), or a regular expression for the whole name of a layer."
    )

    def __post_init__(self) -> None:
        """Cross-field checks; ValueError names the flag to change."""
        _require(self.lora_r >= 0, f"lora_r is {self.lora_r}: give 0 (full fine-tuning) or a positive rank")
        _require(self.lora_alpha > 0, f"lora_alpha is {self.lora_alpha}: the update is multiplied by it; give 1 or more")
        lora_targets(self.lora_target_modules)
        _require(0 <= self.lora_dropout < 1, f"lora_dropout is {self.lora_dropout}: give a number from 0 up to 1")
        _require(
            not self.load_in_4bit or self.lora_r > 0,
            "load_in_4bit freezes the base weights: give lora_r > 0 as well, or load_in_4bit false",
        )
        _require(
            not (self.load_in_4bit and self.from_scratch),
            "from_scratch has no weights worth quantizing: drop from_scratch or load_in_4bit",
        )


@dataclass(kw_only=True)
class DataConfig:
    """Which rows, and how they become batches."""

    dataset: list[str] | str = _list(
        "Hub id, file (.json .jsonl .csv .tsv .parquet .txt, each also .gz) or folder; `starter:NAME`. Several are mixed; "
        "an entry may be a mapping {path, name, split, rows or weight, prompt_style, columns, max_length, dataset_config}."
    )
    dataset_config: str | None = _help("Configuration name of a hub data set, such as wikitext-2-raw-v1.")
    eval_dataset: list[str] | str = _list("Validation rows, in the forms of dataset.")
    columns: list[str] = _list(
        "Columns under other names, RECIPE'S=FILE'S: prompt=question,output=answer; in YAML also a mapping."
    )
    validation_split: float = _help("Share of the training rows held out where the data set has no validation rows.", 0.0)
    skip_bad_rows: bool = _help("Drop and count rows that cannot be read, instead of stopping at the first.", False)
    streaming: bool = _help("Read, tokenize and pack training files while training; needs max_steps.", False)
    max_length: int = _help("Longest sequence, or the block of a text recipe, in tokens.", 512)
    packing: bool = _help("Put several whole examples into one sequence; attention stays inside each.", True)
    prompt_style: Literal["alpaca", "chat"] = _help("Stanford's templates, or the tokenizer's chat template.", "alpaca")
    reasoning: Literal["keep", "drop"] = _help(
        "Train on the reasoning before answers where rows have some, or leave it out of every turn.", "keep"
    )
    class_weights: list[str] = _list(
        "Weights of the classes in the loss of a classifier, in label order (1 5), by name or index (neg=1,pos=5), or balanced."
    )
    problem_type: Literal["auto", "single_label_classification", "multi_label_classification", "regression"] = _help(
        "What a label is (classification recipes): one class, several, or a number; auto decides by the training labels.",
        "auto",
    )
    subjects: list[str] = _list("Names and groups of subjects to keep (question recipes); none keeps all.")
    split: Literal["pooled", "official"] = _help(
        "Pool the rows of all files and split 70/25/5, or keep the files' own.", "pooled"
    )

    def __post_init__(self) -> None:
        """Range checks, and the sources behind dataset and eval_dataset; ValueError names the flag to change.

        `columns` becomes a mapping.
        """
        self.columns: dict[str, str] = parse_columns(self.columns)
        self.sources, self.dataset = read_sources("dataset", self.dataset)
        self.eval_sources, self.eval_dataset = read_sources("eval_dataset", self.eval_dataset)
        if self.class_weights:
            parse_class_weights(self.class_weights)
        _require(self.max_length >= 2, f"max_length is {self.max_length}: a next token needs at least 2")
        _require(
            0 <= self.validation_split < 1,
            f"validation_split is {self.validation_split}: give a share from 0 (none) up to 1",
        )
        for source in (*self.sources, *self.eval_sources) if self.is_mixture else ():
            self.of_source(source)  # refuses settings of a source that the run could not have

    @property
    def encoding(self) -> EncodeOptions:
        """The part that changes how a row is encoded."""
        return EncodeOptions(self.max_length, self.prompt_style, self.problem_type, self.reasoning)

    @property
    def is_mixture(self) -> bool:
        """Whether there are several sources, or one with settings of its own."""
        several = len(self.sources) > 1 or len(self.eval_sources) > 1
        return several or not all(source.is_plain for source in (*self.sources, *self.eval_sources))

    def of_source(self, source: Source) -> DataConfig:
        """The settings of a run on this source alone; where the run has --eval_dataset, it is evaluated on it, too.

        Raises:
            ValueError: the source's own settings are out of range.
        """
        if not self.is_mixture:
            return self
        unknown = source.own.get("prompt_style", "chat") not in _styles()
        _require(
            not unknown,
            f"{source.path}: prompt_style is {source.own.get('prompt_style')!r}: choose from {', '.join(_styles())}",
        )
        length = source.own.get("max_length", self.max_length)
        _require(
            length <= self.max_length,
            f"{source.path}: its max_length {length} is above the run's, {self.max_length}: lower it, or raise --max_length",
        )
        own = source.own
        if source.split:
            own = own | {"split": "official"}
        elif self.eval_sources:
            own = own | {"eval_dataset": source.path}
        try:
            return dataclasses.replace(self, **{"dataset": source.path, "eval_dataset": []} | own)
        except ValueError as error:
            raise ValueError(f"{source.path}: {error}") from None


@dataclass(kw_only=True)
class TrainConfig(TrainingArguments):
    """transformers.TrainingArguments and what a run adds; building one creates the process group under a launcher."""

    output_dir: str | None = _help("The run folder itself; default runs/RECIPE/TIMESTAMP.")
    deepspeed: str | None = _help("zero0, zero1, zero2, zero3, ..., a JSON's path, or none for plain PyTorch.", "zero2")
    global_batch_size: int | None = _help("Rows per optimizer step over all ranks; the accumulation is derived.")
    require_deepspeed: bool = _help("Stop where DeepSpeed cannot start, instead of running on plain PyTorch.", False)
    dry_run: bool = _help("Go through everything up to the first step, print what would happen, write nothing.", False)
    early_stopping_patience: int | None = _help("Stop after so many evaluations without a better --metric_for_best_model.")
    time_limit: str | None = _help("Save and leave with exit code 75 before so long has passed: 3h50m, 90m, 3:50:00.")
    allow_changed: list[str] = _list("Terms that a resumed run may change, such as learning_rate; all others must stay.")
    hang_timeout: float = _help("Seconds a rank may stand still while the others wait, before the run ends; 0: off.", 25)
    audit: bool = _help("Check rows, packing, gradients and shards in the first step (a second or less).", True)
    verify_model: bool = _help("When training ends, check the saved model in a process of its own (10 s and more).", True)
    overwrite_output_dir: bool = _help("Delete an existing run folder of this name first.", False)
    verbose: bool = _help("Show everything: library output, tracebacks, distributed debugging, a log per rank.", False)
    logging_nan_inf_filter: bool = _help("Hide NaN and infinite losses from the log.", False)
    logging_steps: float = _help("Optimizer steps between log lines (below 1: share of all steps).", 1)
    report_to: list[str] = _list("Trackers besides TensorBoard, which is always written: wandb, mlflow, ... or all.")

    @cached_property
    def _setup_devices(self) -> torch.device:
        """Give DeepSpeed and DDP real gloo ranks on CPU.

        accelerate counts one process there (its DeepSpeed path knows no CPU backend and its plain path needs
        use_cpu), so two ranks would train two models in silence.
        """
        if self._on_accelerator():
            device = super()._setup_devices
            self._n_gpu = min(self._n_gpu, 1)  # no DataParallel, which would divide the rows of a micro batch
            return device
        from accelerate.state import AcceleratorState, PartialState
        from accelerate.utils import DistributedType

        AcceleratorState._reset_state(reset_partial_state=True)
        if self.deepspeed:
            import deepspeed

            deepspeed.init_distributed("gloo", auto_mpi_discovery=False, timeout=self.ddp_timeout_delta)
        # a single plain process has no rank, and accelerate no group for it
        group = {"backend": "gloo", "timeout": self.ddp_timeout_delta} if "RANK" in os.environ else {}
        self.distributed_state = PartialState(cpu=True, **group)
        if self.deepspeed:
            self.distributed_state.distributed_type = DistributedType.DEEPSPEED
        self._n_gpu = 0
        return torch.device("cpu")

    def _on_accelerator(self) -> bool:
        return not self.use_cpu and torch.accelerator.is_available()


CONFIG_CLASSES = (ModelConfig, DataConfig, TrainConfig)
_POSITIVE = (
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "num_train_epochs",
    "logging_steps",
    "save_steps",
    "eval_steps",
)

_SMALLER_IS_BETTER = ("loss", "perplexity", "ppl", "error", "wer", "cer", "ter", "mae", "mse", "rmse", "runtime")


@dataclass
class Config:
    """A checked configuration; `train` stays a mapping until the process group may exist."""

    model: ModelConfig
    data: DataConfig
    train: dict[str, Any]
    layers: Layers
    given: dict[str, str]
    """Explicitly given key -> origin."""
    notes: list[str] = field(default_factory=list)
    """Lines for the header on values that were overridden."""

    @property
    def own(self) -> dict[str, str]:
        """The part of `given` that the user gave by flag, YAML or Python, not a recipe and not a ZeRO JSON."""
        origins = {layer.origin for layer in self.layers.layers if not (layer.default or layer.zero)}
        return {key: origin for key, origin in self.given.items() if origin in origins}


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def parser() -> HfArgumentParser:
    """The one parser, over the three dataclasses."""
    return _Parser([*CONFIG_CLASSES], allow_abbrev=False)


def _argv(key: str, value: Any) -> list[str]:
    if isinstance(value, (list, tuple)):
        return [f"--{key}", *(json.dumps(item) if isinstance(item, (dict, list)) else str(item) for item in value)]
    if isinstance(value, dict):
        try:
            return [f"--{key}={json.dumps(value)}"]
        except (TypeError, ValueError) as error:
            raise UserError(f"--{key}: {error}") from None
    return [f"--{key}={str(value).lower() if isinstance(value, bool) else value}"]


def build_config(layers: Layers) -> Config:
    """Check the layered values: unknown keys, types, choices, ranges.

    Raises:
        UserError: one message for the first key at fault, with where its value comes from.
    """
    merged = layers.merged()
    refuse_unknown(merged, {f.name for c in CONFIG_CLASSES for f in dataclasses.fields(c) if f.init})
    refuse_unsuited(merged)
    merged = {key: (_spelled(key, value), origin) for key, (value, origin) in merged.items()}
    # refuse_unsuited has seen that a fixed flag has its one value, which its type need not be able to express
    merged = {key: pair for key, pair in merged.items() if pair[0] is not None and key not in FIXED}
    notes: list[str] = []
    take_settings(merged, layers.by_user(), notes)
    given = {key: origin for key, (_, origin) in merged.items()}
    for key in ENGINE_KEYS:  # an optimizer or scheduler of DeepSpeed's, whose names Trainer does not know
        if key in layers.zero_json().values:
            merged.pop(key, None)
    flags = parser()
    single = {action.dest for action in flags._actions if action.nargs in (None, "?")}
    for key, (value, origin) in merged.items():
        if key in single and isinstance(value, (list, tuple)):
            raise UserError(f"--{key}: expected one value, found {len(value)}: {' '.join(map(str, value))} ({origin})")
    try:
        namespace, rest = flags.parse_known_args([arg for key, (v, _) in merged.items() for arg in _argv(key, v)])
    except UserError as error:
        raise _with_origin(str(error), given) from None
    if rest:
        raise UserError(f"unexpected argument {rest[0]!r}: a value with spaces needs quotes")
    values = vars(namespace)
    try:
        model = ModelConfig(**{f.name: values[f.name] for f in dataclasses.fields(ModelConfig)})
        data = DataConfig(**{f.name: values[f.name] for f in dataclasses.fields(DataConfig)})
        train = {f.name: values[f.name] for f in dataclasses.fields(TrainConfig) if f.init}
        for key in BATCH_KEYS:
            if key not in merged:
                train[key] = None  # derived, once the number of ranks is known
        if "torch_compile" in given and not train["torch_compile"]:
            # transformers would take either as a request to compile
            train["torch_compile_backend"] = train["torch_compile_mode"] = None
        _check_train(train, given)
    except ValueError as error:
        named = re.search(r"--(\w+)", str(error))
        zero = layers.zero_json()
        raise UserError(f"{zero.origin}: {error}" if named and named[1] in zero.values else str(error)) from None
    for key, value in {"model_name_or_path": values["model_name_or_path"], "dataset": data.sources}.items():
        if not value:
            raise UserError(f"--{key} is missing: a recipe has no default for it, give one by flag or YAML")
    return Config(model, data, train, layers, given, notes)


_OFF_WORD = {"deepspeed": "none", "report_to": "none", "debug": None, "time_limit": None, "resume_from_checkpoint": None}
"""What `no`, `off` and false mean for a flag that takes words, where it is not `no`; None: as if it were not given."""


def _spelled(key: str, value: Any) -> Any:
    """`on` and `off` as true and false for a switch, and a false as the word that a flag with words has for it."""
    is_list_of_one = isinstance(value, (list, tuple)) and len(value) == 1
    text = str(value[0] if is_list_of_one and key in _OFF_WORD else value).lower()
    if text not in ("on", "off", "no", "false"):
        return None if text == "" and _OFF_WORD.get(key, "none") is None else value
    if key in _switches():
        return str(text == "on").lower()
    if key in _OFF_WORD or "no" in _choices().get(key, ()):
        return _OFF_WORD.get(key, "no")
    return value


@cache
def _styles() -> tuple[str, ...]:
    return typing.get_args(typing.get_type_hints(DataConfig)["prompt_style"])


@cache
def _switches() -> set[str]:
    """Fields that are true or false."""
    hints = {name: hint for config_class in CONFIG_CLASSES for name, hint in typing.get_type_hints(config_class).items()}
    return {name for name, hint in hints.items() if hint is bool or set(typing.get_args(hint)) == {bool, type(None)}}


@cache
def _choices() -> dict[str, list[str]]:
    """Fields of TrainConfig that take one of some words -> the words."""
    return {
        name: [str(choice.value) for choice in option]
        for name, hint in typing.get_type_hints(TrainConfig).items()
        for option in typing.get_args(hint)
        if isinstance(option, type) and issubclass(option, Enum)
    }


def _with_origin(message: str, given: dict[str, str]) -> UserError:
    match = re.match(r"argument --(\w+)[^:]*: (.*)", message, flags=re.DOTALL)
    if not match:
        return UserError(message)
    key, problem = match.groups()
    return UserError(f"--{key}: {problem} ({given.get(key, 'flag')})")


def _check_train(train: dict[str, Any], given: dict[str, str]) -> None:
    """What TrainingArguments would refuse only after the data are prepared; ValueError names the flag."""
    for name, choices in _choices().items():
        _require(
            train[name] in choices,
            f"--{name} {train[name]}{nearest(str(train[name]), choices)}: choose from {', '.join(choices)}",
        )
    for name in TrainConfig._VALID_DICT_FIELDS:
        if name == "deepspeed" or train[name] is None:
            continue
        try:
            is_object = isinstance(json.loads(train[name]), dict)
        except ValueError as error:
            raise ValueError(f"--{name} {train[name]}: not JSON ({error}); {given.get(name, 'flag')}") from None
        _require(is_object, f"--{name} {train[name]}: give a JSON object, such as '{{\"key\": 1}}'")
    for name, value in train.items():
        if isinstance(value, (int, float)):
            _require(abs(value) < 2**63, f"--{name} is {value}: give a number that is finite and below 2**63")
    for name in ("seed", "data_seed"):
        _require(train[name] is None or 0 <= train[name] < 2**32, f"--{name} is {train[name]}: give 0 up to 2**32 - 1")
    for name in _POSITIVE:
        _require(train[name] is None or train[name] > 0, f"--{name} is {train[name]}: give a number above 0")
    steps = train["max_steps"]
    _require(steps == -1 or steps > 0, f"--max_steps is {steps}: give 1 or more, or -1 for --num_train_epochs")
    _require(
        "tpu_metrics_debug" not in (train["debug"] or ()),
        "--debug tpu_metrics_debug: no TPU trains here; choose underflow_overflow",
    )
    for name in ("learning_rate", "weight_decay", "max_grad_norm", "warmup_steps", "hang_timeout", "neftune_noise_alpha"):
        _require(train[name] is None or train[name] >= 0, f"--{name} is {train[name]}: give 0 or more")
    if train["time_limit"]:
        seconds_of(train["time_limit"])
    patience = train["early_stopping_patience"]
    _require(patience is None or patience > 0, f"--early_stopping_patience is {patience}: give 1 or more")
    _require(
        patience is None or train["eval_strategy"] != "no",
        "--early_stopping_patience needs evaluations: give --eval_strategy steps or epoch",
    )
    judged = [("lr_scheduler_type", schedule) for schedule in JUDGED_SCHEDULES]
    for name, value in (("save_strategy", "best"), ("load_best_model_at_end", True), *judged):
        _require(
            train[name] != value or train["eval_strategy"] != "no",
            f"--{name} {str(value).lower()} needs evaluations: give --eval_strategy steps or epoch",
        )
    _require(not (train["fp16"] and train["bf16"]), "--fp16 and --bf16 are both on: choose one")
    _require(train["global_batch_size"] is None or train["global_batch_size"] > 0, "--global_batch_size must be above 0")
    _require(
        not (train["save_only_model"] and train["load_best_model_at_end"]),
        "--save_only_model leaves nothing for --load_best_model_at_end to load: drop one of them",
    )
    _require(
        not train["load_best_model_at_end"] or train["save_strategy"] in ("best", train["eval_strategy"]),
        "--load_best_model_at_end needs --save_strategy best, or the same as --eval_strategy",
    )
    _require(
        train["train_sampling_strategy"] in ("random", "sequential"),
        f"--train_sampling_strategy {train['train_sampling_strategy']}: rows are laid out by step here; choose random or sequential",
    )


def best_metric(train: dict[str, Any]) -> dict[str, Any]:
    """The values that decide which evaluation is the best, with defaults for those that were not given.

    transformers itself takes a higher value of every metric but a loss as better, while a schedule that follows a metric
    takes a lower one as better.
    """
    name, greater = train["metric_for_best_model"], train["greater_is_better"]
    judged = train["lr_scheduler_type"] in JUDGED_SCHEDULES
    if name is None and (judged or train["early_stopping_patience"] or train["save_strategy"] == "best"):
        name = "loss"
    if name is not None and greater is None:
        greater = name.lower().rsplit("_", 1)[-1] not in _SMALLER_IS_BETTER
    options = json.loads(train["lr_scheduler_kwargs"] or "{}")
    if judged and greater:
        options = {"mode": "max"} | options
    return {
        "metric_for_best_model": name,
        "greater_is_better": greater,
        "lr_scheduler_kwargs": json.dumps(options) if options else None,
    }
