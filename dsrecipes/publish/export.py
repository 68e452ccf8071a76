"""How does a run become one folder that plain transformers loads? dsrecipes export RUN --to DIR; adapters are merged."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsrecipes.errors import UserError
from dsrecipes.inference.device import add_device, memory_errors
from dsrecipes.inference.finished import FinishedRun
from dsrecipes.io.arguments import CommandParser
from dsrecipes.io.disk import is_disk_full
from dsrecipes.io.paths import user_path
from dsrecipes.runs.checkpoint_manifest import find_problem
from dsrecipes.runs.folder import RunFolder, find_run

if TYPE_CHECKING:
    import torch

_DTYPES = ("float32", "bfloat16", "float16")


@memory_errors()
def export(
    run: str,
    to: str | Path,
    *,
    dtype: str | None = None,
    checkpoint: str | None = None,
    max_shard_size: str = "5GB",
    device: str = "cpu",
) -> dict[str, Any]:
    """Write model, tokenizer, generation settings and a model card into a new folder, and compare its logits.

    Args:
        run: a run folder, or `last`.
        to: a folder that does not exist or is empty.
        dtype: float32, bfloat16 or float16; as the run saved its weights where it is not given (float32 after a merge).
        checkpoint: `step100` takes that checkpoint's weights instead of the finished model's.
        max_shard_size: of a weights file, as 500MB; a larger model is written as several.
        device: cpu, cuda, cuda:N or auto. The model is loaded in float32, up to twice (a QLoRA base is dequantised into
            a second copy), which few cards have room for: 2 x 4 bytes a parameter.

    Returns:
        path, dtype, merged (LoRA, QLoRA or none), largest_difference of the logits and what is allowed.

    Raises:
        UserError: the folder is not empty, the run or checkpoint is missing or damaged, or the exported logits differ.
    """
    if not re.fullmatch(r"[1-9]\d*[KMG]B", max_shard_size):
        raise UserError("DSR530", f"--max_shard_size {max_shard_size}: give a whole number of KB, MB or GB, as 500MB")
    folder = find_run(run, ended=checkpoint is None)
    target = _check_target(user_path(to))
    finished = FinishedRun(folder, _checkpoint(folder, checkpoint) if checkpoint else None, device)
    # Written under another name and renamed, so that a failed export leaves nothing that looks complete.
    staging = target.with_name(f".{target.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir(parents=True)
        result = _write(finished, staging, dtype, max_shard_size)
        if target.is_dir():
            target.rmdir()
        staging.rename(target)
    except OSError as error:
        is_full = staging.is_dir() and is_disk_full(error, staging)
        raise UserError(
            "DSR532", f"--to {target}: {'no space left on the disk' if is_full else error.strerror or error}"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return {"path": str(target), **result}


def _check_target(target: Path) -> Path:
    """The folder to write, which must be new or empty."""
    if target.exists() and not target.is_dir():
        raise UserError("DSR531", f"--to {target}: there is a file of this name; choose another folder")
    if target.is_dir() and any(target.iterdir()):
        raise UserError("DSR531", f"--to {target}: the folder is not empty; choose another, or empty it yourself")
    return target.absolute()


def _checkpoint(folder: RunFolder, name: str) -> Path:
    """An intact checkpoint by its step."""
    path = folder.checkpoints / f"checkpoint-{name.removeprefix('step')}"
    problem = find_problem(path)
    if problem:
        known = (
            ", ".join(f"step{checkpoint.name.removeprefix('checkpoint-')}" for checkpoint in folder.complete_checkpoints())
            or "none"
        )
        raise UserError("DSR533", f"--checkpoint {name}: {path} {problem}; intact ones of this run: {known}")
    return path


def _write(run: FinishedRun, folder: Path, dtype: str | None, max_shard_size: str) -> dict[str, Any]:
    """Write the model, load it again by plain transformers, and compare; returns what the command reports."""
    import torch

    from dsrecipes.model.load import prepare_for_inference
    from dsrecipes.model.task import loading_class
    from dsrecipes.publish.card import model_card

    # In 16 bits, merging would round the sum of base and adapter.
    model = run.load(dtype=torch.float32)
    expected = _logits(model, run)
    four_bit = bool(getattr(model, "is_quantized", False) or getattr(model.config, "quantization_config", None))
    merged = "none"
    if run.has_adapter:
        merged = "QLoRA" if four_bit else "LoRA"
        model = _merge(run, model, four_bit)
    # A merged weight is a sum in float32; rounding it is the user's choice.
    stored = dtype or ("float32" if run.has_adapter else _dtype(run.source))
    _save(model, folder, stored, max_shard_size)
    kind = loading_class(run.recipe.auto_class, model.config)
    # The help of --device counts two float32 copies at most, and the next line loads one.
    del model
    run.tokenizer.save_pretrained(folder)
    exported = prepare_for_inference(kind.from_pretrained(folder, dtype=torch.float32), run.device)
    difference, allowed = _compare(_logits(exported, run), expected, stored, four_bit)
    result = {"dtype": stored, "merged": merged, "largest_difference": difference, "allowed": allowed}
    (folder / "README.md").write_text(model_card(run, result), encoding="utf-8")
    return result


def _save(model: Any, folder: Path, dtype: str, max_shard_size: str) -> None:
    import torch

    from dsrecipes.launch.imports import hide_packages

    config = model.config.get_text_config()
    if getattr(config, "use_cache", None) is False:
        # Training turned it off, and generation without it is slow.
        config.use_cache = True
    # accelerate would import DeepSpeed, which takes seconds, to see whether the model is an engine.
    with hide_packages(["deepspeed"]):
        model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=max_shard_size)


def _compare(logits: torch.Tensor, expected: torch.Tensor, dtype: str, four_bit: bool) -> tuple[float, float]:
    """Largest difference of the logits, and the largest that rounding to the dtype explains (UserError: it is larger)."""
    from dsrecipes.runs.reference import allowed_difference

    difference = (logits - expected).abs().max().item()
    allowed = allowed_difference(expected, "fp32" if dtype == "float32" else dtype, four_bit)
    # Written so that NaN is refused too.
    if not difference <= allowed:
        cure = "--dtype bfloat16 or float32 has more range" if dtype == "float16" else "The weights do not fit the run"
        raise UserError(
            "DSR534",
            f"the exported model's logits differ from the run's by up to {difference:.2g} (allowed {allowed:.2g}); nothing was "
            f"written. {cure}",
        )
    return difference, allowed


def _merge(run: FinishedRun, model: Any, four_bit: bool) -> Any:
    """Merge the adapter into the base's weights; a 4-bit base is dequantized first, or the result would be rounded again."""
    if not four_bit:
        return model.merge_and_unload()
    from peft import PeftModel

    try:
        base = run.load_base(model.dtype).dequantize()
    except NotImplementedError as error:
        base_name = run.config.model.model_name_or_path
        raise UserError("DSR535", f"the base {base_name} cannot be dequantized: {error}") from error
    return PeftModel.from_pretrained(base, str(run.source), torch_device=str(run.device)).merge_and_unload()


def _dtype(source: Path) -> str:
    """The dtype of saved weights."""
    from dsrecipes.runs.weights import read_tensors, weight_files

    _, tensor = next(read_tensors(weight_files(source)[0]))
    return str(tensor.dtype).removeprefix("torch.")


def _logits(model: Any, run: FinishedRun) -> torch.Tensor:
    """Logits on random ids of a fixed seed."""
    from dsrecipes.runs.reference import logits_of, random_inputs

    auto, length = run.recipe.auto_class, min(16, run.config.data.max_length)
    batch = random_inputs(auto, model.config.get_text_config().vocab_size, length, run.config.train["seed"])
    return logits_of(model, {key: value.to(run.device) for key, value in batch.items()}, auto)


def rounding(dtype: str) -> str:
    """Describe how far rounding may move a weight."""
    import torch

    return f"{dtype} keeps a weight to {torch.finfo(getattr(torch, dtype)).eps / 2:.1g} of its size"


def main(argv: list[str]) -> int:
    """`dsrecipes export RUN --to DIR`."""
    parser = CommandParser("export", "Write a run's model as one folder that plain transformers loads.")
    parser.add_argument("run", metavar="RUN", help="run folder, or `last`")
    parser.add_argument("--to", metavar="DIR", required=True, help="new or empty folder")
    parser.add_argument(
        "--dtype", choices=_DTYPES, help="of the weights; default: as they were saved, float32 after a merge"
    )
    parser.add_argument("--checkpoint", metavar="stepN", help="the weights of this checkpoint instead of the finished model")
    parser.add_argument("--max_shard_size", metavar="SIZE", default="5GB", help="largest weights file (default 5GB)")
    add_device(parser, "cpu", "a float32 copy of a 7B model takes 27 GB")
    flags = parser.parse_args(argv)
    result = export(
        flags.run,
        flags.to,
        dtype=flags.dtype,
        checkpoint=flags.checkpoint,
        max_shard_size=flags.max_shard_size,
        device=flags.device,
    )
    origins = {"LoRA": "adapter merged", "QLoRA": "4-bit base dequantized, adapter merged", "none": "all weights"}
    print(f"exported  {result['path']} · {origins[result['merged']]}")
    print(
        f"logits    largest difference from the run's {result['largest_difference']:.2g} (allowed {result['allowed']:.2g}); "
        f"{rounding(result['dtype'])}"
    )
    print(f"card      {result['path']}/README.md: add a license before you publish it")
    return 0
