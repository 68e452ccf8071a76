"""What ranks run for tests; every rank of a pool (tests/support/rank_pool.py) calls the same function with the same values."""

from __future__ import annotations

import contextlib
import gc
import importlib
import io
import json
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from support import disturbances
from support.flash import flash_attention
from support.tiny import run_recipe
from transformers import TrainerCallback

from dsrecipes import UserError, load_recipe
from dsrecipes.base import RecipeBase, RunResult
from dsrecipes.config.layers import layer
from dsrecipes.data import window
from dsrecipes.errors import RunStopped
from dsrecipes.io.console import Console
from dsrecipes.recipe_class import recipe_class
from dsrecipes.runs.folder import RunFolder
from dsrecipes.runs.log import read_log
from dsrecipes.train import finishing, first_step, run_folder
from dsrecipes.train.state import Prepared, Run
from dsrecipes.train.training import Training
from dsrecipes.zero.shards import Shards


@contextlib.contextmanager
def _no_pictures() -> Iterator[None]:
    """Runs without loss_curve.png and report.html: half the time of a small run, and no test of a pool reads them."""
    draw, write = finishing.draw_curve, finishing._write_page
    finishing.draw_curve = finishing._write_page = lambda *_: None  # type: ignore[assignment]
    try:
        yield
    finally:
        finishing.draw_curve, finishing._write_page = draw, write


class ObservedTraining(Training):
    """A training that hands over its run once it has started."""

    def __init__(self, recipe: RecipeBase, on_start: Callable[[Run], None]) -> None:
        super().__init__(recipe)
        self.on_start = on_start

    def start(self, prepared: Prepared) -> Run:
        """As Training does it."""
        run = super().start(prepared)
        self.on_start(run)
        return run


def _run(recipe: str, values: dict[str, Any]) -> tuple[Run, RunResult]:
    """load_recipe(recipe, **values).run(), and the run's state."""
    gc.collect()  # engines of earlier cases
    with _no_pictures():
        return run_recipe(load_recipe(recipe, **values))


def _facts(run: Run, result: RunResult) -> dict[str, Any]:
    engine, setup = run.trainer.model_wrapped, run.prepared.setup
    return {
        "path": str(result.path),
        "step": result.step,
        "metrics": result.metrics,
        "rows": {name: len(each) for name, each in run.prepared.sequences.items()},
        "notes": setup.notes,
        "batch": (setup.micro, setup.accumulation),
        "log": read_log(RunFolder(result.path).log),
        "engine": type(engine).__name__,
        "stage": engine.zero_optimization_stage() if hasattr(engine, "zero_optimization_stage") else None,
    }


def _values_of_engine(run: Run) -> dict[str, Any]:
    """What a run really computed with, by the flag that sets it; the engine's own figures, not the configuration's."""
    trainer = run.trainer
    engine = trainer.deepspeed if run.prepared.setup.zero else None
    optimizer = trainer.optimizer
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    group = optimizer.param_groups[0]
    found = {key: group[key] for key in ("eps", "weight_decay") if key in group} | {"optimizer": type(optimizer).__name__}
    if "betas" in group:
        found |= {"adam_beta1": group["betas"][0], "adam_beta2": group["betas"][1]}
    if engine is None:
        batch = (trainer.args.per_device_train_batch_size, trainer.args.gradient_accumulation_steps)
        total, clip, scheduler = (
            batch[0] * batch[1] * trainer.args.world_size,
            trainer.args.max_grad_norm,
            trainer.lr_scheduler,
        )
        precision = {True: "bf16", False: "fp32"}[trainer.args.bf16]
    else:
        batch = (engine.train_micro_batch_size_per_gpu(), engine.gradient_accumulation_steps())
        total, clip, scheduler = engine.train_batch_size(), engine.gradient_clipping(), engine.lr_scheduler
        precision = "bf16" if engine.bfloat16_enabled() else "fp16" if engine.fp16_enabled() else "fp32"
    return found | {
        "per_device_train_batch_size": batch[0], "gradient_accumulation_steps": batch[1], "global_batch_size": total,
        "max_grad_norm": clip, "precision": precision, "scheduler": type(scheduler).__name__,
    }  # fmt: skip


def train_for_values(recipe: str, values: dict[str, Any]) -> dict[str, Any]:
    """Run a recipe: what `train` returns, and the values that the engine really had."""
    run, result = _run(recipe, values)
    return _facts(run, result) | {"values": _values_of_engine(run)}


def try_values(recipe: str, values: dict[str, Any]) -> dict[str, Any]:
    """What `train_for_values` returns, or the message of a refusal and whether it came after weights were loaded."""
    loaded = []
    load = RecipeBase.load_model

    def note(*args: Any, **kwargs: Any) -> Any:
        loaded.append(True)
        return load(*args, **kwargs)

    RecipeBase.load_model = note  # type: ignore[method-assign]
    try:
        return train_for_values(recipe, values)
    except UserError as error:
        return {"refused": str(error), "loaded": bool(loaded)}
    finally:
        RecipeBase.load_model = load  # type: ignore[method-assign]


def train(recipe: str, values: dict[str, Any]) -> dict[str, Any]:
    """Run a recipe: folder, log, metrics, engine and stage."""
    run, result = _run(recipe, values)
    return _facts(run, result)


def train_in_windows(recipe: str, values: dict[str, Any], tokens: int) -> dict[str, Any]:
    """Run a recipe that streams, in windows of a few tokens."""
    before, window.WINDOW_TOKENS = window.WINDOW_TOKENS, tokens
    try:
        return train(recipe, values)
    finally:
        window.WINDOW_TOKENS = before


def probe(model: Any, causal: bool, vocabulary: int) -> np.ndarray:
    """Logits of fixed ids: (2, 16) tokens, or two questions of four choices."""
    ids = torch.arange(32 if causal else 128).reshape((2, 16) if causal else (2, 4, 16)) * 7 % vocabulary
    model.eval()
    with torch.no_grad():
        options = {"use_cache": False} if causal else {"attention_mask": torch.ones_like(ids)}
        return model(input_ids=ids, **options).logits.float().numpy()


def train_and_probe(recipe: str, values: dict[str, Any]) -> dict[str, Any]:
    """Run a recipe, and ask the live engine for the logits of fixed ids."""
    run, result = _run(recipe, values)
    logits = probe(run.trainer.model_wrapped, run.trainer.causal, run.prepared.model_config.vocab_size)
    return _facts(run, result) | {"logits": logits}


def train_with_flash(recipe: str, values: dict[str, Any]) -> dict[str, Any]:
    """Run a recipe whose model computes flash attention."""
    with flash_attention() as switch_on:
        load = RecipeBase.load_model
        RecipeBase.load_model = lambda *args, **kwargs: switch_on(load(*args, **kwargs))  # type: ignore[method-assign]
        try:
            return train(recipe, values)
        finally:
            RecipeBase.load_model = load  # type: ignore[method-assign]


def train_without_gathering(recipe: str, values: dict[str, Any]) -> str:
    """Run a recipe at ZeRO-3 whose engine does not gather the weights it saves; returns what the run ends with."""

    def ungathered(run: Run) -> None:
        save = run.trainer.save_model

        def without(folder: str) -> None:
            run.trainer.deepspeed._config.zero_config.gather_16bit_weights_on_model_save = False
            save(folder)

        run.trainer.save_model = without  # type: ignore[method-assign]

    try:
        return f"step {ObservedTraining(load_recipe(recipe, **values), ungathered).run().step}"
    except UserError as error:
        return str(error)


def evaluate(recipe: str, values: dict[str, Any], batch_sizes: list[int]) -> dict[str, Any]:
    """Run a recipe, then evaluate the trained model at each batch size; the tokenized rows are given too."""
    run, result = _run(recipe, values)
    losses = {}
    trainer = run.trainer
    trainer.compute_metrics = None
    for size in batch_sizes:
        trainer.args.per_device_eval_batch_size = size
        losses[size] = trainer.evaluate()["eval_loss"]
    texts = {name: list(split.data) for name, split in run.prepared.rows.splits.items()}
    return _facts(run, result) | {"losses": losses, "texts": texts}


def sequence(recipe: str, runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Several runs in one process, with the engine each had and the ds_config.json it left."""
    results = []
    for values in runs:
        facts = train(recipe, values)
        config = RunFolder(Path(facts["path"])).ds_config
        results.append(facts | {"json": json.loads(config.read_text()) if config.is_file() else None})
    return results


class Disturbance(TrainerCallback):
    """Does something to a run at the beginning of steps, or after the first batch of an evaluation."""

    def __init__(self, rank: int, events: dict[str, list[list[Any]]]) -> None:
        """`events`: "4" or "evaluation 4" -> [action, rank or None for all, arguments...]."""
        self.rank, self.events, self.batches = rank, events, 0

    def _happen(self, when: str) -> None:
        for action, rank, *arguments in self.events.get(when, []):
            if rank in (None, self.rank):
                getattr(disturbances, action)(*arguments)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The step that begins is the one after `global_step`."""
        self.batches = 0
        self._happen(str(state.global_step + 1))

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After the first batch."""
        self.batches += 1
        if self.batches == 1:
            self._happen(f"evaluation {state.global_step}")


def disturbed(recipe: str, values: dict[str, Any], events: dict[str, list[list[Any]]]) -> dict[str, Any]:
    """Run a recipe while things happen to it: what `train` returns, or how it stopped; and what was said on rank 0."""
    said = io.StringIO()
    layers = layer({"recipe": recipe, **values}, origin="python")
    run_folder.PATIENCE = 1

    def add_events(run: Run) -> None:
        run.trainer.add_callback(Disturbance(run.args.process_index, events))

    training = ObservedTraining(recipe_class(layers.recipe)(layers, Console(out=said)), add_events)
    try:
        with _no_pictures():
            result = training.run()
    except (RunStopped, UserError) as stopped:
        return {"stopped": type(stopped).__name__, "why": str(stopped), "said": said.getvalue()}
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert training.started is not None
    return _facts(training.started, result) | {"said": said.getvalue()}


def fault(recipe: str, values: dict[str, Any], spoil: str) -> str:
    """Run a recipe with one of tests/support/fault_injection.py's faults; returns what it ends with."""
    gc.collect()
    with getattr(importlib.import_module("support.fault_injection"), spoil)() as change, _no_pictures():
        try:
            return f"step {ObservedTraining(load_recipe(recipe, **values), change).run().step}"
        except UserError as error:
            return str(error)


def shares(recipe: str, values: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Run a recipe; (held, whole) bytes of each part that the first step's audit counted on this rank."""
    found: list[Shards] = []
    count = first_step.measure_shards

    def keep(*given: Any) -> Shards:
        found.append(count(*given))
        return found[-1]

    first_step.measure_shards = keep
    try:
        train(recipe, values)
    finally:
        first_step.measure_shards = count
    return {part: found[0].share(part) for part in ("weights", "gradients", "states")}
