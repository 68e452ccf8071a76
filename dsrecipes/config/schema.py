"""The three dataclasses of a run, and the one parser that YAML, flags and Python keywords go through."""

from __future__ import annotations

import dataclasses
import os
import typing
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any, Literal

import torch
from transformers import TrainingArguments

from dsrecipes.config.adapter import lora_targets
from dsrecipes.config.encoding import EncodeOptions
from dsrecipes.config.layers import Layers
from dsrecipes.config.sources import Source, read_sources
from dsrecipes.config.values import parse_class_weights, parse_columns


def _help(text: str, default: Any = None) -> Any:
    return field(default=default, metadata={"help": text})


def _list(text: str) -> Any:
    return field(default_factory=list, metadata={"help": text})


def require(ok: bool, message: str) -> None:
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
        require(self.lora_r >= 0, f"lora_r is {self.lora_r}: give 0 (full fine-tuning) or a positive rank")
        require(self.lora_alpha > 0, f"lora_alpha is {self.lora_alpha}: the update is multiplied by it; give 1 or more")
        lora_targets(self.lora_target_modules)
        require(0 <= self.lora_dropout < 1, f"lora_dropout is {self.lora_dropout}: give a number from 0 up to 1")
        require(
            not self.load_in_4bit or self.lora_r > 0,
            "load_in_4bit freezes the base weights: give lora_r > 0 as well, or load_in_4bit false",
        )
        require(
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
        require(self.max_length >= 2, f"max_length is {self.max_length}: a next token needs at least 2")
        require(
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
        require(
            not unknown,
            f"{source.path}: prompt_style is {source.own.get('prompt_style')!r}: choose from {', '.join(_styles())}",
        )
        length = source.own.get("max_length", self.max_length)
        require(
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


@cache
def _styles() -> tuple[str, ...]:
    return typing.get_args(typing.get_type_hints(DataConfig)["prompt_style"])
