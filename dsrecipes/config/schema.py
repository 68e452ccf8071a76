"""Which settings does a run have? The fields of model, data and run, with their defaults, help and checks.

Importing this module loads neither torch nor transformers, so `dsrecipes train --help` reads the fields directly, and a
finished run is opened without the Trainer. TrainConfig, which adds these fields to transformers.TrainingArguments, is in
train_config.py.
"""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from dsrecipes.config.adapter import lora_targets
from dsrecipes.config.encoding import EncodeOptions
from dsrecipes.config.layers import Layers
from dsrecipes.config.sources import Source, read_sources
from dsrecipes.config.values import parse_class_weights, parse_columns
from dsrecipes.errors import UserError

# Fields that hold words after parsing and, after __post_init__, what the words mean.
if TYPE_CHECKING:
    Words = Any
    Paths = Any
else:
    # HfArgumentParser derives the arguments from these types.
    Words = list[str]
    Paths = list[str] | str


# HfArgumentParser reads help texts from the metadata of fields.
def _help(text: str, default: Any = None) -> Any:
    return field(default=default, metadata={"help": text})


def _list(text: str) -> Any:
    return field(default_factory=list, metadata={"help": text})


@dataclass(kw_only=True)
class ModelConfig:
    """Which model, how it is loaded, and which of its weights are trained."""

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
    lora_alpha: int = _help("LoRA scale: the update is multiplied by lora_alpha / lora_r.", 32)
    lora_dropout: float = _help("Dropout on the adapter's input.", 0.0)
    lora_target_modules: list[str] = _list(
        "Layers that get an adapter: all-linear (the default: all but the head), names such as q_proj,v_proj (every layer "
        "whose name ends with one of them), or a regular expression for the full name of a layer."
    )

    def __post_init__(self) -> None:
        """Check fields against each other (UserError: names the flag to change)."""
        if self.lora_r < 0:
            raise UserError("DSR047", f"lora_r is {self.lora_r}: give 0 (full fine-tuning) or a positive rank")
        if self.lora_alpha <= 0:
            raise UserError("DSR047", f"lora_alpha is {self.lora_alpha}: the update is multiplied by it; give 1 or more")
        if not 0 <= self.lora_dropout < 1:
            raise UserError("DSR047", f"lora_dropout is {self.lora_dropout}: give a number from 0 up to 1")
        # Called for its checks alone: peft would refuse a bad pattern only after the weights are loaded.
        lora_targets(self.lora_target_modules)
        if self.load_in_4bit and self.lora_r == 0:
            raise UserError(
                "DSR054", "load_in_4bit freezes the base weights: give lora_r > 0 as well, or load_in_4bit false"
            )
        if self.load_in_4bit and self.from_scratch:
            raise UserError("DSR054", "from_scratch has no weights worth quantizing: drop from_scratch or load_in_4bit")


@dataclass(kw_only=True)
class DataConfig:
    """Which rows, and how they become batches."""

    dataset: Paths = _list(
        "Hub id, file (.json .jsonl .csv .tsv .parquet .txt, each also .gz) or folder; `starter:NAME`. Several are mixed; "
        "an entry may be a mapping {path, name, split, rows or weight, prompt_style, columns, max_length, dataset_config}."
    )
    dataset_config: str | None = _help("Configuration name of a hub data set, such as wikitext-2-raw-v1.")
    eval_dataset: Paths = _list("Validation rows, in the forms of dataset.")
    columns: Words = _list(
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
        "Pool the rows of all files and split 70/25/5, or keep the files' own splits.", "pooled"
    )

    def __post_init__(self) -> None:
        """Check ranges and parse the fields that have a syntax of their own (UserError: names the flag to change).

        `columns` becomes a mapping; `sources` and `eval_sources` hold the parsed entries of dataset and eval_dataset.
        """
        self.columns = parse_columns(self.columns)
        self.sources, self.dataset = read_sources("dataset", self.dataset)
        self.eval_sources, self.eval_dataset = read_sources("eval_dataset", self.eval_dataset)
        if self.class_weights:
            parse_class_weights(self.class_weights)
        if self.max_length < 2:
            raise UserError("DSR047", f"max_length is {self.max_length}: a next token needs at least 2")
        if not 0 <= self.validation_split < 1:
            raise UserError("DSR047", f"validation_split is {self.validation_split}: give a share from 0 (none) up to 1")
        if self.is_mixture:
            for source in (*self.sources, *self.eval_sources):
                # Called for its checks alone: settings of a source are otherwise read when its rows are.
                self.of_source(source)

    @property
    def encoding(self) -> EncodeOptions:
        """The options that change how a row is tokenized."""
        return EncodeOptions(self.max_length, self.prompt_style, self.problem_type, self.reasoning)

    @property
    def is_mixture(self) -> bool:
        """Whether there are several sources, or one with settings of its own."""
        several = len(self.sources) > 1 or len(self.eval_sources) > 1
        return several or not all(source.is_plain for source in (*self.sources, *self.eval_sources))

    def of_source(self, source: Source) -> DataConfig:
        """The settings of a run on this source alone; a run with --eval_dataset is evaluated on the source, too.

        Raises:
            UserError: the source's own settings are out of range.
        """
        if not self.is_mixture:
            return self
        # The dataclass does not check a Literal; only the parser does, and a source's own settings bypass it.
        style = source.own.get("prompt_style", "chat")
        if style not in _prompt_styles():
            raise UserError("DSR060", f"{source.path}: prompt_style is {style!r}: choose from {', '.join(_prompt_styles())}")
        length = source.own.get("max_length", self.max_length)
        if length > self.max_length:
            raise UserError(
                "DSR060",
                f"{source.path}: its max_length {length} is above the run's, {self.max_length}: lower it, or raise "
                "--max_length",
            )
        settings = source.own
        # The file's own split is named, so the run must not pool and divide its rows.
        if source.split:
            settings = settings | {"split": "official"}
        elif self.eval_sources:
            settings = settings | {"eval_dataset": source.path}
        try:
            return dataclasses.replace(self, **{"dataset": source.path, "eval_dataset": []} | settings)
        except UserError as error:
            raise error.at(source.path) from None


@dataclass(kw_only=True)
class RunConfig:
    """What a run adds to transformers.TrainingArguments, and the fields of it that have another default here."""

    output_dir: str | None = _help("The run folder itself; default runs/RECIPE/TIMESTAMP.")
    deepspeed: str | None = _help("zero0, zero1, zero2, zero3, ..., a JSON's path, or none for plain PyTorch.", "zero2")
    global_batch_size: int | None = _help("Rows per optimizer step over all ranks; the accumulation is derived.")
    require_deepspeed: bool = _help("Stop where DeepSpeed cannot start, instead of running on plain PyTorch.", False)
    dry_run: bool = _help("Do everything up to the first step, print what would happen, write nothing.", False)
    early_stopping_patience: int | None = _help("Stop after this many evaluations without a better --metric_for_best_model.")
    time_limit: str | None = _help("Save and exit with code 75 before this much time has passed: 3h50m, 90m, 3:50:00.")
    allow_changed: list[str] = _list(
        "Properties of the run that may differ from the checkpoint's on resume, such as learning_rate."
    )
    hang_timeout: float = _help("Seconds without progress on a rank that others wait for before the run ends; 0: off.", 25)
    audit: bool = _help("Check rows, packing, gradients and shards in the first step (a second or less).", True)
    verify_model: bool = _help("After training, check the saved model in a process of its own (10 s or more).", True)
    overwrite_output_dir: bool = _help("Delete an existing run folder of this name first.", False)
    verbose: bool = _help("Show everything: library output, tracebacks, distributed debugging, a log per rank.", False)
    logging_nan_inf_filter: bool = _help("Hide NaN and infinite losses from the log.", False)
    logging_steps: float = _help("Optimizer steps between log lines (below 1: share of all steps).", 1)
    report_to: list[str] = _list("Trackers besides TensorBoard, which is always written: wandb, mlflow, ... or all.")


@dataclass(kw_only=True)
class FinishedRunConfig(RunConfig):
    """What the commands on a finished run need of its training flags, so that they need not import TrainingArguments."""

    seed: int = 42
    use_cpu: bool = False


@dataclass
class Config:
    """A checked configuration; `train` stays a mapping, because building a TrainConfig creates the process group."""

    model: ModelConfig
    data: DataConfig
    train: dict[str, Any]
    layers: Layers
    given: dict[str, str]
    """Explicitly given key -> origin."""
    notes: list[str] = field(default_factory=list)
    """Header lines about values that were overridden."""

    @property
    def own(self) -> dict[str, str]:
        """The part of `given` that comes from the user's flags, YAML or Python, neither from a recipe nor a ZeRO JSON."""
        origins = {layer.origin for layer in self.layers.layers if not (layer.default or layer.zero)}
        return {key: origin for key, origin in self.given.items() if origin in origins}


@cache
def _prompt_styles() -> tuple[str, ...]:
    return typing.get_args(typing.get_type_hints(DataConfig)["prompt_style"])
