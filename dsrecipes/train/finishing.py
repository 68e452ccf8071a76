"""What happens when the last step is done: save, evaluate, verify, report."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from dsrecipes.base import RecipeBase, RunResult
from dsrecipes.errors import EXIT_CODE, UserError
from dsrecipes.io.disk import is_write_error, put_in_place, sync
from dsrecipes.launch.environment import RANK_KEYS
from dsrecipes.recipe_class import call_hook
from dsrecipes.runs.curve import draw_curve
from dsrecipes.runs.folder import RunFolder
from dsrecipes.runs.reference import RANDOM_LENGTH, first_rows, random_inputs, save_reference, tokenizer_facts
from dsrecipes.train import artifacts
from dsrecipes.train.footer import footer
from dsrecipes.train.state import Prepared, Run
from dsrecipes.train.trainer import RecipeTrainer

_ID = re.compile(r" \[(DSR\d+)\]$")
"""The id at the end of another process's message; a message has one id."""


def finish_run(run: Run, recipe: RecipeBase, began: float) -> RunResult:
    """Save the model, its reference and the figures, verify it, and write the report.

    Args:
        began: time.monotonic() of the start.

    Raises:
        UserError: the model could not be saved; or, on rank 0, the saved model is not the one that was trained.
    """
    console, trainer = run.prepared.console, run.trainer
    run.watchdog.enter("finishing")
    console.say("saving the model")
    _save_model(run)
    _save_reference(run)
    result = RunResult(run.folder.path, trainer.state.global_step, _final_metrics(run, recipe))
    # raised only after the barrier, so that no rank is left waiting in it
    problem = _write_results(run, recipe, result, began) if console.main else None
    trainer.accelerator.wait_for_everyone()
    if problem:
        raise problem
    return result


def _save_model(run: Run) -> None:
    """Save the model beside model/, and replace model/ once everything is on the disk."""
    trainer, main = run.trainer, run.prepared.console.main
    staged = run.folder.path / "model.writing"
    try:
        if main:
            shutil.rmtree(staged, ignore_errors=True)
        # no rank may write before rank 0 has removed what an earlier, interrupted save left
        trainer.accelerator.wait_for_everyone()
        trainer.save_model(str(staged))
        trainer.accelerator.wait_for_everyone()
        if main:
            # a rename may reach the disk before the contents do, so that a power failure would leave empty files
            for path in staged.rglob("*"):
                sync(path)
            put_in_place(staged, run.folder.model)
        trainer.accelerator.wait_for_everyone()
    except (OSError, RuntimeError, SafetensorError) as error:
        if not is_write_error(error):
            raise
        reason = str(error).splitlines()[0]
        raise UserError(
            "DSR354", f"the model could not be saved into {run.folder.path}: {reason}. {trainer.writer.last_complete()}"
        ) from error


def _save_reference(run: Run) -> None:
    """Record what `dsrecipes verify` compares the saved model with; all ranks take part."""
    prepared, trainer, setup = run.prepared, run.trainer, run.prepared.setup
    auto_class, device = prepared.recipe.auto_class, run.args.device
    vocabulary = trainer.model.config.get_text_config().vocab_size
    length = min(RANDOM_LENGTH, prepared.config.data.max_length)
    batches = {
        "random ids": random_inputs(auto_class, vocabulary, length, run.args.seed),
        "training rows": first_rows(trainer.train_dataset.sample, trainer.data_collator, auto_class),
    }
    facts = {
        "step": trainer.state.global_step,
        "auto_class": auto_class,
        "precision": setup.precision,
        "dtype": str(setup.dtype(prepared.config.model)).removeprefix("torch."),
        "learned": any(line.get("learning_rate", 0) > 0 for line in trainer.state.log_history),
        "tokenizer": tokenizer_facts(prepared.tokenizer),
    }
    on_device = {name: {key: value.to(device) for key, value in batch.items()} for name, batch in batches.items()}
    save_reference(trainer.model, on_device, facts, run.folder if trainer.is_world_process_zero() else None)


def _final_metrics(run: Run, recipe: RecipeBase) -> dict[str, Any]:
    """The figures of metrics.json; a split whose last evaluation is of an earlier step is evaluated again."""
    trainer, splits = run.trainer, run.prepared.rows.splits
    metrics: dict[str, Any] = {"step": trainer.state.global_step, "train_loss": _last_loss(trainer)}
    for name, prefix in (("validation", "eval"), ("test", "test")):
        if name not in splits:
            continue
        logged = next((line for line in reversed(trainer.state.log_history) if f"{prefix}_loss" in line), {})
        compute = None
        if not trainer.causal:
            compute = call_hook(
                recipe, "metrics", split=splits[name], train=splits["train"], model_config=run.prepared.model_config
            )
        # after load_best_model_at_end the weights are not those of the last evaluation, whatever its step
        is_stale = logged.get("step") != trainer.state.global_step or run.args.load_best_model_at_end
        if is_stale or (compute and not trainer.evaluator.details):
            trainer.compute_metrics = compute
            logged = trainer.evaluate(run.prepared.sequences[name], metric_key_prefix=prefix)
            # the evaluation left the phase, which alone has no time limit of a step
            run.watchdog.enter("finishing")
        metrics |= {key: value for key, value in logged.items() if key.startswith(f"{prefix}_")}
        metrics |= {f"{prefix}_{key}": value for key, value in trainer.evaluator.details.items()}
    return metrics


def _last_loss(trainer: RecipeTrainer) -> float | None:
    """The last logged training loss."""
    return next((line["loss"] for line in reversed(trainer.state.log_history) if "loss" in line), None)


def _write_results(run: Run, recipe: RecipeBase, result: RunResult, began: float) -> UserError | None:
    """Write what a person reads, on rank 0; returns what is wrong with the saved model."""
    config, console, folder = run.prepared.config, run.prepared.console, run.folder
    artifacts.write_metrics(folder, result.metrics)
    call_hook(recipe, "write_extras", folder=folder.path, sources=run.prepared.rows.sources)
    draw_curve(folder.log, folder.curve, f"{config.layers.recipe.name}: {config.model.model_name_or_path}")
    problem = None
    if config.train["verify_model"]:
        console.say("verifying the model")
        problem = _verify_apart(folder)
    _write_page(run)
    streamed = write_data(folder, run.prepared, result.step)
    console.say(footer(config, result, folder, time.monotonic() - began, streamed))
    return problem


def write_data(folder: RunFolder, prepared: Prepared, step: int) -> dict[str, Any] | None:
    """Write data.json; returns what became of a stream's rows up to a step."""
    rows = prepared.rows
    streamed = rows.stream.facts(step) if rows.stream else None
    artifacts.write_data(folder, rows.splits, prepared.sequences, streamed)
    return streamed


def _write_page(run: Run) -> None:
    """Write report.html; a run is complete without it, so whatever fails is reported in one line."""
    from dsrecipes.reporting.report import report

    try:
        report(run.folder.path)
    except Exception as error:
        run.prepared.console.say(f"{'report':<10}not written: {error}")


def _verify_apart(folder: RunFolder) -> UserError | None:
    """Verify a run in a new process on the CPU, because the accelerator is still full.

    By module name: verification is in a layer above training (publish/), and is a command itself.

    Returns:
        What is wrong, or None.
    """
    # with this rank's variables, the process would take itself for one of several ranks
    env = {key: value for key, value in os.environ.items() if not key.startswith("ACCELERATE_") and key not in RANK_KEYS}
    # a checkout need not be installed
    root = str(Path(__file__).parents[2])
    python_path = os.pathsep.join(filter(None, [root, env.get("PYTHONPATH")]))
    env |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": python_path}
    command = [sys.executable, "-m", "dsrecipes.publish.verify", str(folder.path.absolute())]
    process = subprocess.run(command, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if process.returncode == 0:
        return None
    last_line = (process.stderr.strip().splitlines() or [""])[-1]
    if process.returncode == EXIT_CODE:
        # the message below gets an id of its own
        message = _ID.sub("", last_line).removeprefix("error: ")
        return UserError("DSR355", f"the saved model failed its verification. {message}")
    return UserError(
        "DSR356",
        f"the saved model was not verified: the process that loads it ended with exit code {process.returncode} "
        f"({last_line[:200]}). Try again with `dsrecipes verify {folder.path}`, or leave it out with --verify_model false",
    )
