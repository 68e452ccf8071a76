"""What is in a finished run? Its configuration, recipe, tokenizer and model, after training and before it."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsrecipes.config.layers import Layers, layer
from dsrecipes.errors import UserError
from dsrecipes.inference.device import find_device
from dsrecipes.launch.imports import quick_imports, unneeded_packages
from dsrecipes.runs.folder import RunFolder, find_run

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from dsrecipes.base import RecipeBase
    from dsrecipes.config.encoding import EncodeOptions
    from dsrecipes.config.schema import Config


@dataclass
class FinishedRun:
    """One run folder, whose parts are read at first use: a command pays only for what it needs."""

    folder: RunFolder
    checkpoint: Path | None = None
    """Take weights and tokenizer from here instead of model/."""
    device_name: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    def __post_init__(self) -> None:
        """Refuse an impossible device before anything is read."""
        if self.device_name != "auto":
            find_device(self.device_name)

    @property
    def source(self) -> Path:
        """The folder of the weights and the tokenizer."""
        return self.checkpoint or self.folder.model

    @cached_property
    def config(self) -> Config:
        """The configuration that the run recorded, checked again."""
        from dsrecipes.config.parse import read_config

        return read_config(self.layers())

    def layers(self, **changed: Any) -> Layers:
        """The run's values in layers, some of them changed; without its ZeRO JSON, which only training needs and which may be gone."""
        return layer({"config": str(self.folder.config), "deepspeed": "none"} | changed)

    @cached_property
    def recipe(self) -> type[RecipeBase]:
        """The recipe's class, for its row hooks."""
        from dsrecipes.recipe_class import recipe_class

        return recipe_class(self.config.layers.recipe)

    @cached_property
    def options(self) -> EncodeOptions:
        """Options with which the rows were encoded."""
        return self.config.data.encoding

    @cached_property
    def reasons(self) -> bool:
        """Whether the run trained on reasoning before answers."""
        from dsrecipes.data.chat_answers import REASONING

        try:
            splits = json.loads(self.folder.data.read_text("utf-8"))
        except (OSError, ValueError):
            return False
        return REASONING in splits.get("train", {}).get("notes", {})

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that was saved with the model."""
        from dsrecipes.io.hub import first_line
        from dsrecipes.model.tokenizer import read_tokenizer

        trusted = self.config.model.trust_remote_code
        try:
            return read_tokenizer(self.source, trust_remote_code=trusted)
        except Exception as error:
            # tokenizers raises plain Exception.
            raise UserError("DSR462", f"{self.source}: the tokenizer cannot be loaded: {first_line(error)}") from error

    @cached_property
    def device(self) -> torch.device:
        """The device that --device names; auto is a GPU where there is one, unless the run was trained with --use_cpu."""
        return find_device(self.device_name, self.config.train["use_cpu"])

    def import_libraries(self) -> None:
        """Import what this run needs, without the packages that transformers and peft import wherever they are installed.

        Those, such as datasets and bitsandbytes, took most of the time to a chat's prompt.
        """
        layers = self.layers()
        # transformers looks for installed packages at its first import only; hiding them later has no effect.
        packages = [] if "transformers" in sys.modules else unneeded_packages(layers)
        # An adapter needs peft, and a 4-bit base bitsandbytes.
        if packages and self.has_adapter:
            packages = [name for name in packages if name != "peft"]
            in_4bit, _ = layers.merged().get("load_in_4bit", (False, ""))
            packages += [] if str(in_4bit).lower() == "true" else ["bitsandbytes"]
        with quick_imports(packages):
            import dsrecipes.model.load  # noqa: F401

            if self.has_adapter:
                import peft  # noqa: F401
            _ = self.recipe

    @property
    def has_adapter(self) -> bool:
        """Whether the run saved a LoRA adapter, whose base is elsewhere."""
        return (self.source / "adapter_config.json").is_file()

    def load(self, *, base: bool = False, dtype: torch.dtype | None = None) -> Any:
        """Load the model in evaluation mode: base and adapter for LoRA, in 4 bits where the run was.

        Args:
            base: the model as it was before the run.
            dtype: of the weights; default: best_dtype.

        Returns:
            A PreTrainedModel, or peft's PeftModel around one; `Any`, because their types have different methods.

        Raises:
            UserError: the base is missing, or files of model/ are missing or damaged.
        """
        from transformers.utils.logging import disable_progress_bar

        from dsrecipes.config.adapter import adapter_folder
        from dsrecipes.io.hub import damaged, first_line
        from dsrecipes.model.load import prepare_for_inference
        from dsrecipes.runs.weights import check_readable, weight_files

        disable_progress_bar()
        if dtype is None:
            dtype = best_dtype(self.device)
        if not base:
            # Before from_pretrained: the error of safetensors does not name the damaged file.
            check_readable(weight_files(self.source))
            if self.has_adapter and not (self.source / "adapter_model.safetensors").is_file():
                # peft would load a pickle instead, or ask the hub.
                raise UserError("DSR460", f"{self.source}: adapter_model.safetensors is missing")
        # The base of a run that continued an adapter is that adapter on its own base.
        adapter = adapter_folder(self.config.model.model_name_or_path) if base else self.source
        try:
            if not base and not self.has_adapter:
                model = self._load_saved(dtype)
            else:
                model = self.load_base(dtype)
                if self.has_adapter and adapter is not None:
                    from peft import PeftModel

                    model = PeftModel.from_pretrained(model, str(adapter), torch_device=str(self.device))
        except damaged() as error:
            raise UserError("DSR461", f"{self.source} cannot be loaded: {first_line(error)}") from error
        return prepare_for_inference(model, self.device)

    def _load_saved(self, dtype: torch.dtype) -> Any:
        """The whole model that the run saved."""
        from transformers import AutoConfig

        from dsrecipes.model.task import loading_class

        trusted = self.config.model.trust_remote_code
        config = AutoConfig.from_pretrained(self.source, trust_remote_code=trusted)
        return loading_class(self.recipe.auto_class, config).from_pretrained(
            self.source, dtype=dtype, use_safetensors=True, trust_remote_code=trusted
        )

    def load_base(self, dtype: torch.dtype) -> PreTrainedModel:
        """The model without any adapter, in 4 bits where the run was."""
        from dsrecipes.model.load import load_model, prepare_for_inference

        options, auto = self.config.model, self.recipe.auto_class
        config = self._base_config()
        seed = self.config.train["seed"]
        model = load_model(options, config, auto, dtype, seed, False, adapter=False, device=self.device)
        return prepare_for_inference(model, self.device)

    def _base_config(self) -> PretrainedConfig:
        from transformers import AutoConfig

        from dsrecipes.config.adapter import head_settings, read_head, set_head
        from dsrecipes.model.configuration import load_config

        name = self.config.model.model_name_or_path
        try:
            config = load_config(self.config.model, self.recipe.auto_class)
        except UserError as error:
            reason = error.message.removeprefix("--model_name_or_path ")
            raise UserError(
                "DSR463",
                f"{self.folder.path}: the base model of this run, {name}, cannot be loaded ({reason}); if it was moved, correct "
                f"model_name_or_path in {self.folder.config}",
            ) from error
        # The base does not know this run's labels: they are next to the adapter, or in the saved model.
        if self.recipe.auto_class.endswith("ForSequenceClassification"):
            read_head(self.source, config)
            if (self.source / "config.json").is_file():
                set_head(config, head_settings(AutoConfig.from_pretrained(self.source)))
        return config

    @cached_property
    def embedding_rows(self) -> int | None:
        """Rows of the model's input embedding, known without its weights."""
        from transformers import AutoConfig

        from dsrecipes.model.tokenizer import embedding_rows

        if (self.source / "config.json").is_file():
            trusted = self.config.model.trust_remote_code
            return embedding_rows(AutoConfig.from_pretrained(self.source, trust_remote_code=trusted))
        return embedding_rows(self._base_config())


def best_dtype(device: torch.device) -> torch.dtype:
    """The dtype to compute in: fp32 on a CPU, bf16 on a GPU that has it, else fp16."""
    import torch

    if device.type != "cuda":
        return torch.float32
    # A GPU without bf16 would emulate it, slower than it computes fp16.
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def open_run(name: str, device: str = "auto") -> FinishedRun:
    """Open a run folder by path or `last`, to be loaded on `device` (as --device takes it).

    Raises:
        UserError: there is none, it has no trained model, or there is no such device.
    """
    run = FinishedRun(find_run(name), device_name=device)
    run.import_libraries()
    return run
