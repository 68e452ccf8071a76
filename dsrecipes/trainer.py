"""transformers.Trainer with the hooks it lacks: step layout, exact evaluation, what is logged, whole checkpoints."""

from __future__ import annotations

import contextlib
import math
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import EvalPrediction, Trainer, set_seed
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import EvalLoopOutput, rotate_checkpoints

from dsrecipes.data.collate import COUNTS, Sequences, StepLoader, StepSampler
from dsrecipes.data.encode import IGNORE
from dsrecipes.runs.folder import write_manifest
from dsrecipes.zero import reshape
from dsrecipes.zero.saved import fits, made_by


def is_causal_lm(model: nn.Module) -> bool:
    """Whether the model, or the base of a LoRA model, is one of transformers' causal language models."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return type(base).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


def row_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None) -> torch.Tensor:
    """Cross-entropy summed over labelled rows, over the number of labelled rows of the whole step.

    Heads with one label a row (BertForMultipleChoice) take **kwargs but ignore num_items_in_batch: their own mean
    would be multiplied by accumulation x ranks, and is NaN for a batch of fillers.

    Args:
        outputs: a model output with logits (rows, classes).
        labels: (rows,), -100 where there is nothing to learn.
        num_items_in_batch: labelled rows of the step, over micro batches and ranks.
    """
    loss = nn.functional.cross_entropy(outputs.logits.float(), labels, ignore_index=IGNORE, reduction="sum")
    return loss / num_items_in_batch if num_items_in_batch is not None else loss


class RecipeTrainer(Trainer):
    """Trainer over Sequences; rows of a step depend on seed and step alone, evaluation loss is a sum over labels."""

    def __init__(self, *, checkpoints: Path, made_by: dict[str, Any], **kwargs: Any) -> None:
        causal = is_causal_lm(kwargs["model"])
        if not causal:
            kwargs["model"].accepts_loss_kwargs = False
        if causal:
            kwargs["compute_metrics"] = None
        super().__init__(compute_loss_func=None if causal else row_loss, **kwargs)
        self.checkpoints, self.made_by = checkpoints, made_by
        self.causal = causal
        self.details: dict[str, dict] = {}
        self._tally = [0, 0]
        self._rate = 0.0
        self._clock = _Clock()

    # ---- rows of a step ----

    def _loader(self, data: Sequences, micro: int, *, accumulation: int, shuffle: bool) -> DataLoader:
        args = self.args
        sampler = StepSampler(
            data.lengths, micro, accumulation=accumulation, rank=args.process_index, world=args.world_size,
            seed=args.data_seed if args.data_seed is not None else args.seed, shuffle=shuffle,
        )  # fmt: skip
        return StepLoader(
            data, batch_sampler=sampler, collate_fn=self.data_collator, num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and args.device.type == "cuda",
            persistent_workers=args.dataloader_persistent_workers, prefetch_factor=args.dataloader_prefetch_factor,
        )  # fmt: skip

    def get_train_dataloader(self) -> DataLoader:
        """This rank's micro batches, in step order."""
        return self._loader(
            self.train_dataset, self.args.train_batch_size, accumulation=self.args.gradient_accumulation_steps,
            shuffle=self.args.train_sampling_strategy == "random",
        )  # fmt: skip

    def get_eval_dataloader(self, eval_dataset: Sequences | None = None) -> DataLoader:
        """This rank's part of the evaluation rows; every rank has as many batches."""
        data = eval_dataset if eval_dataset is not None else self.eval_dataset
        return self._loader(data, self.args.eval_batch_size, accumulation=1, shuffle=False)

    def get_batch_samples(self, *args: Any) -> tuple[list, torch.Tensor | int | None]:
        """A step's micro batches, with their counts of useful tokens and rows taken out."""
        self._clock.start()
        self._rate = float(self.optimizer.param_groups[0]["lr"])
        batches, items = super().get_batch_samples(*args)
        for batch in batches:
            self._tally = [total + more for total, more in zip(self._tally, batch.pop(COUNTS).tolist(), strict=True)]
        return batches, items

    def _run_epoch(self, **kwargs: Any) -> None:
        """Train an epoch, unless a resumed run stands at its last step already, where Trainer takes one step more."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(**kwargs)

    # ---- checkpoints of another place ----

    def _made_elsewhere(self, checkpoint: str | None) -> bool:
        return checkpoint is not None and not fits(made_by(Path(checkpoint)), self.made_by)

    def _prepare_for_training(self, max_steps: int, train_dataloader: DataLoader, resume_from_checkpoint: str | None) -> Any:
        """Start engine and optimizer; a checkpoint of other ranks or another stage is divided anew."""
        elsewhere = self._made_elsewhere(resume_from_checkpoint)
        result = super()._prepare_for_training(max_steps, train_dataloader, None if elsewhere else resume_from_checkpoint)
        if elsewhere:
            reshape.load(self, Path(resume_from_checkpoint))
        return result

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self._made_elsewhere(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if self._made_elsewhere(self.state.best_model_checkpoint):
            reshape.load(self, Path(self.state.best_model_checkpoint))
        else:
            super()._load_best_model()

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """This rank's random numbers; a rank that the checkpoint knows nothing of gets its own, the same each time."""
        name = f"rng_state_{self.args.process_index}.pth" if self.args.world_size > 1 else "rng_state.pth"
        if checkpoint is None or Path(checkpoint, name).is_file():
            super()._load_rng_state(checkpoint)
        else:
            place = (self.args.seed, self.state.global_step, self.args.process_index)
            set_seed(int(np.random.SeedSequence(place).generate_state(1)[0]))

    # ---- evaluation ----

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Loss summed over labels of all ranks, then divided: the same for any batch size and number of ranks.

        Trainer's own loop averages batch means and repeats rows to fill the last batch.
        """
        model, device = self.model, self.args.device
        model.eval()
        one = torch.ones((), device=device)
        sums = torch.zeros(2, dtype=torch.float64, device=device)
        logits: list[torch.Tensor] = []
        labels: list[torch.Tensor] = []
        for batch in dataloader:
            batch.pop(COUNTS)
            batch = self._prepare_inputs(batch)
            targets = batch["labels"]
            with torch.no_grad():
                loss, outputs = self.compute_loss(model, batch, return_outputs=True, num_items_in_batch=one)
            sums += torch.stack([loss.double() / self.accelerator.num_processes, (targets != IGNORE).sum().double()])
            if self.compute_metrics is not None:
                logits.append(self.accelerator.gather(outputs.logits.float()).cpu())
                labels.append(self.accelerator.gather(targets).cpu())
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        total, count = self.accelerator.reduce(sums).tolist()
        metrics = {"loss": total / count if count else math.nan}
        if self.causal:
            metrics["perplexity"] = math.exp(min(metrics["loss"], 700)) if count else math.nan
        rows = len(dataloader.dataset)
        if self.compute_metrics is not None:
            order = dataloader.batch_sampler.order().flatten()
            place = np.argsort(order, kind="stable")[-rows:]  # fillers, -1, come first
            prediction = EvalPrediction(torch.cat(logits).numpy()[place], torch.cat(labels).numpy()[place])
            metrics |= self.compute_metrics(prediction)
        self.details = {key: metrics.pop(key) for key in list(metrics) if isinstance(metrics[key], dict)}
        metrics = {f"{metric_key_prefix}_{key}": value for key, value in metrics.items()}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=rows)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate; the time it takes is not counted as training."""
        with self._clock.paused():
            return super().evaluate(*args, **kwargs)

    # ---- what is logged ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add speed (useful tokens and rows of all ranks, over training time alone) and the greatest peak memory."""
        logs.pop("total_flos", None)
        if "loss" in logs:
            seconds = self._clock.lap()
            tokens, rows = self._over_ranks([float(n) for n in self._tally], torch.distributed.ReduceOp.SUM)
            logs |= {"samples_per_second": rows / seconds, "tokens_per_second": tokens / seconds}
            logs["peak_memory_gb"] = self._over_ranks([peak_memory_gb(self.args.device)], torch.distributed.ReduceOp.MAX)[0]
            self._tally = [0, 0]
            # the rate of the step itself: with an optimizer block in the ZeRO JSON, Trainer reads the next step's
            logs["learning_rate"] = self._rate
        super().log(logs, start_time)

    def _over_ranks(self, values: list[float], how: Any) -> list[float]:
        if self.args.world_size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64, device=self.args.device)
        torch.distributed.all_reduce(tensor, how)
        return tensor.tolist()

    def last_loss(self) -> float | None:
        """The last logged training loss."""
        return next((line["loss"] for line in reversed(self.state.log_history) if "loss" in line), None)

    # ---- saving ----

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.checkpoints)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save on all ranks, then write the manifest, and only then remove older checkpoints.

        What an earlier, cut-off save left under the same name is removed first: its manifest would call the new one whole
        while it is still being written.
        """
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        with self._clock.paused():
            if self.args.should_save:
                shutil.rmtree(self.checkpoints / f"checkpoint-{self.state.global_step}", ignore_errors=True)
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
            self.args.save_total_limit = limit
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                write_manifest(self.checkpoints / f"checkpoint-{self.state.global_step}", self.made_by)
                rotate_checkpoints(str(self.checkpoints), limit, self.state.best_model_checkpoint)
            self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Leave out training_args.bin (a pickle), and give generation its cache back, which training turned off.

        ZeRO-3 gathers tied weights apart; made one tensor again, they are written once, as from every other stage.
        """
        for tied, source in getattr(self.model, "all_tied_weights_keys", {}).items():
            if state_dict and tied in state_dict and source in state_dict:
                state_dict[tied] = state_dict[source]
        config = self.model.config
        use_cache = getattr(config, "use_cache", None)
        if use_cache is not None:
            config.use_cache = True
        super()._save(output_dir, state_dict)
        if use_cache is not None:
            config.use_cache = use_cache
        Path(output_dir or self.args.output_dir, TRAINING_ARGS_NAME).unlink(missing_ok=True)


class _Clock:
    """Seconds of training between two log lines, evaluation and saving left out."""

    def __init__(self) -> None:
        self.began: float | None = None
        self.away = 0.0

    def start(self) -> None:
        if self.began is None:
            self.began = time.perf_counter()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        if self.began is not None:
            self.away += time.perf_counter() - began

    def lap(self) -> float:
        now = time.perf_counter()
        seconds = max(now - (self.began or now) - self.away, 1e-9)
        self.began, self.away = None, 0.0
        return seconds


def peak_memory_gb(device: torch.device) -> float:
    """Greatest memory so far in GB (1e9 bytes): allocated on the accelerator, or resident on a CPU run."""
    if device.type != "cpu":
        return torch.accelerator.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


Metrics = Callable[[EvalPrediction], dict[str, float]]
