"""What ranks run for tests; every rank of a pool (tests/ranks.py) calls the same function with the same values."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dsrecipes import UserError, load_recipe
from dsrecipes.base import RecipeBase, RunResult
from dsrecipes.runs.curve import read_log
from dsrecipes.runs.folder import RunFolder
from dsrecipes.trainer import RecipeTrainer


def _run(recipe: str, values: dict[str, Any]) -> tuple[RecipeBase, RecipeTrainer, RunResult]:
    """load_recipe(recipe, **values).run(), and the trainer that it made."""
    gc.collect()  # engines of earlier cases
    story = load_recipe(recipe, **values)
    made: list[RecipeTrainer] = []
    build = story.build_trainer

    def keep() -> RecipeTrainer:
        made.append(build())
        return made[0]

    story.build_trainer = keep  # type: ignore[method-assign]
    result = story.run()
    return story, made[0], result


def _facts(story: RecipeBase, trainer: RecipeTrainer, result: RunResult) -> dict[str, Any]:
    engine = trainer.model_wrapped
    return {
        "path": str(result.path),
        "step": result.step,
        "metrics": result.metrics,
        "rows": {name: len(each) for name, each in story.sequences.items()},
        "notes": story.place.notes,
        "batch": (story.place.micro, story.place.accumulation),
        "log": read_log(RunFolder(result.path).log),
        "engine": type(engine).__name__,
        "stage": engine.zero_optimization_stage() if hasattr(engine, "zero_optimization_stage") else None,
    }


def train(recipe: str, values: dict[str, Any]) -> dict[str, Any]:
    """Run a recipe: folder, log, metrics, engine and stage."""
    story, trainer, result = _run(recipe, values)
    return _facts(story, trainer, result)


def probe(model: Any, causal: bool, vocabulary: int) -> np.ndarray:
    """Logits of fixed ids: (2, 16) tokens, or two questions of four choices."""
    ids = torch.arange(32 if causal else 128).reshape((2, 16) if causal else (2, 4, 16)) * 7 % vocabulary
    model.eval()
    with torch.no_grad():
        options = {"use_cache": False} if causal else {"attention_mask": torch.ones_like(ids)}
        return model(input_ids=ids, **options).logits.float().numpy()


def train_and_probe(recipe: str, values: dict[str, Any]) -> dict[str, Any]:
    """Run a recipe, and ask the live engine for the logits of fixed ids."""
    story, trainer, result = _run(recipe, values)
    logits = probe(trainer.model_wrapped, trainer.causal, story.model_config.vocab_size)
    return _facts(story, trainer, result) | {"logits": logits}


def train_without_gathering(recipe: str, values: dict[str, Any]) -> str:
    """Run a recipe at ZeRO-3 whose engine does not gather the weights it saves; returns what the run ends with."""
    story = load_recipe(recipe, **values)
    build = story.build_trainer

    def ungathered() -> RecipeTrainer:
        trainer = build()
        save = trainer.save_model

        def without(folder: str) -> None:
            trainer.deepspeed._config.zero_config.gather_16bit_weights_on_model_save = False
            save(folder)

        trainer.save_model = without  # type: ignore[method-assign]
        return trainer

    story.build_trainer = ungathered  # type: ignore[method-assign]
    try:
        return f"step {story.run().step}"
    except UserError as error:
        return str(error)


def evaluate(recipe: str, values: dict[str, Any], batch_sizes: list[int]) -> dict[str, Any]:
    """Run a recipe, then evaluate the trained model at each batch size; the tokenized rows are given too."""
    story, trainer, result = _run(recipe, values)
    losses = {}
    trainer.compute_metrics = None
    for size in batch_sizes:
        trainer.args.per_device_eval_batch_size = size
        losses[size] = trainer.evaluate()["eval_loss"]
    texts = {name: list(split.data) for name, split in story.splits.items()}
    return _facts(story, trainer, result) | {"losses": losses, "texts": texts}


def sequence(recipe: str, runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Several runs in one process, with the engine each had and the ds_config.json it left."""
    results = []
    for values in runs:
        facts = train(recipe, values)
        config = RunFolder(Path(facts["path"])).ds_config
        results.append(facts | {"json": json.loads(config.read_text()) if config.is_file() else None})
    return results
