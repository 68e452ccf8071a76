"""Is the saved model what was trained? dsrecipes verify RUN loads it without DeepSpeed and compares it."""

from __future__ import annotations

import importlib.metadata
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsrecipes.errors import EXIT_CODE, UserError, plural
from dsrecipes.inference.device import add_device, memory_errors
from dsrecipes.inference.finished import FinishedRun, open_run
from dsrecipes.io.arguments import CommandParser
from dsrecipes.io.disk import write_whole
from dsrecipes.runs.folder import find_run

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_PACKAGES = ("dsrecipes", "torch", "transformers", "peft", "safetensors", "bitsandbytes")


@memory_errors()
def verify(run: str, *, device: str = "auto") -> dict[str, Any]:
    """Check every file and tensor of a run's model/, and its logits against the live engine's; write VERIFIED.json.

    Args:
        run: a run folder, or `last`.
        device: cpu, cuda, cuda:N, or auto: a GPU where there is one, unless the run was trained with --use_cpu.

    Returns:
        What VERIFIED.json holds: tensors, largest_difference, allowed, files (sha256), versions, date.

    Raises:
        UserError: what is wrong, with the tensor or file; VERIFIED.json is deleted then.
    """
    from dsrecipes.io.disk import checksum
    from dsrecipes.runs.reference import read_reference

    finished = open_run(run, device)
    folder = finished.folder
    # The result of an earlier check must not outlive a failed one.
    folder.verified.unlink(missing_ok=True)
    facts, batches = read_reference(folder)
    count = _check_tensors(folder.model, facts)
    _check_tokenizer(finished, facts)
    # After the tensors, because a message about a tensor says more than one about its file.
    for name, known in facts["files"].items():
        if not (folder.model / name).is_file() or checksum(folder.model / name) != known:
            raise UserError("DSR540", f"{folder.model / name} is missing or was changed since training ended")
    difference, allowed = _compare(load_saved(finished, facts), finished, facts, batches)
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES if name.replace("-", "_") in sys.modules}
    files = [path for path in sorted(folder.model.rglob("*")) if path.is_file()]
    result = {
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "step": facts["step"],
        "tensors": count,
        "largest_difference": difference,
        "allowed": allowed,
        "precision": facts["precision"],
        "device": str(finished.device),
        "versions": versions,
        "files": {path.relative_to(folder.model).as_posix(): checksum(path) for path in files},
    }
    write_whole(folder.verified, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    return result


def _check_tensors(model: Path, facts: dict[str, Any]) -> int:
    """Check that every tensor is there, not empty, finite, and as it was saved; return how many there are."""
    from dsrecipes.runs.weights import GATHER_HINT, fingerprint, read_tensors, weight_files

    missing, adapter_is_zero = dict(facts["weights"]), []
    for path in weight_files(model):
        for name, tensor in read_tensors(path):
            _check_tensor(f"{path}: tensor {name}", tensor)
            if "lora_B" in name:
                adapter_is_zero.append(not tensor.any())
            if name not in missing:
                raise UserError("DSR542", f"{path}: tensor {name} was not saved by this run: the file is another model's")
            if fingerprint(tensor) != missing.pop(name):
                zeros = "" if tensor.any() else " (it is all zero)"
                raise UserError("DSR540", f"{path}: tensor {name} was changed since training ended{zeros}")
    if missing:
        names = ", ".join(sorted(missing)[:3])
        raise UserError("DSR542", f"{model}: {plural(len(missing), 'tensor')} that this run saved not found: {names}")
    if not facts["weights"]:
        raise UserError("DSR541", f"{model} has no tensors; {GATHER_HINT}")
    if adapter_is_zero and all(adapter_is_zero) and facts["learned"]:
        # lora_B starts at zero, so an adapter that is still zero was never updated.
        raise UserError(
            "DSR544", f"{model}: every lora_B of the adapter is zero, so it changes nothing: training did not reach it"
        )
    return len(facts["weights"])


def _check_tensor(name: str, tensor: torch.Tensor) -> None:
    from dsrecipes.runs.weights import GATHER_HINT

    if not tensor.numel():
        raise UserError("DSR541", f"{name} is empty; {GATHER_HINT}")
    if tensor.is_floating_point() and not tensor.isfinite().all():
        raise UserError("DSR543", f"{name} has NaN or infinite numbers")


def _check_tokenizer(run: FinishedRun, facts: dict[str, Any]) -> None:
    """Check that the tokenizer gives the ids that it gave when training ended."""
    known, size = facts["tokenizer"], len(run.tokenizer)
    if size != known.get("size"):
        raise UserError(
            "DSR545",
            f"{run.folder.model}: the tokenizer has {size} tokens, the one of the training had {known.get('size')}",
        )
    for text, ids in known["texts"].items():
        if run.tokenizer(text)["input_ids"] != ids:
            raise UserError(
                "DSR545", f"{run.folder.model}: the tokenizer is not that of the training: it gives {text!r} other ids"
            )


def load_saved(run: FinishedRun, facts: dict[str, Any]) -> Any:
    """Load the model by plain transformers or peft, with no tensor missing, left over or of another shape.

    Args:
        run: whose model/ is loaded.
        facts: what the run recorded when training ended.

    Raises:
        UserError: what does not fit.
    """
    import torch
    from transformers.utils.logging import disable_progress_bar

    from dsrecipes.io.hub import damaged
    from dsrecipes.model.load import prepare_for_inference

    disable_progress_bar()
    dtype = getattr(torch, facts["dtype"])
    if run.device.type == "cpu" and dtype == torch.float16:
        # torch has few fp16 operations for a CPU.
        dtype = torch.float32
    faults: tuple[type[Exception], ...] = (*damaged(), RuntimeError)
    try:
        model = _load_adapter(run, dtype) if run.has_adapter else _load_whole(run, facts["auto_class"], dtype)
    except faults as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError("DSR546", f"{run.folder.model} cannot be loaded: {reason}") from error
    return prepare_for_inference(model, run.device)


def _load_whole(run: FinishedRun, auto_class: str, dtype: torch.dtype) -> PreTrainedModel:
    from transformers import AutoConfig

    from dsrecipes.model.task import loading_class

    path, trusted = run.folder.model, run.config.model.trust_remote_code
    config = AutoConfig.from_pretrained(path, trust_remote_code=trusted)
    model, info = loading_class(auto_class, config).from_pretrained(
        path,
        dtype=dtype,
        output_loading_info=True,
        # Reported below, in the same form as missing and unexpected tensors.
        ignore_mismatched_sizes=True,
        use_safetensors=True,
        trust_remote_code=trusted,
    )
    # from_pretrained only warns about these, and initializes missing weights at random.
    for key, fault in (("missing_keys", "missing"), ("unexpected_keys", "not part of the model")):
        if info[key]:
            names = ", ".join(sorted(info[key])[:3])
            raise UserError("DSR547", f"{path}: by config.json {plural(len(info[key]), 'tensor')} {fault}: {names}")
    for name, saved, expected in info["mismatched_keys"]:
        raise UserError("DSR547", f"{path}: tensor {name} has shape {list(saved)}, config.json has {list(expected)}")
    _check_tied(path, model)
    return model


def _check_tied(path: Path, model: PreTrainedModel) -> None:
    """Check that input and output embedding are one tensor where config.json says so."""
    output = model.get_output_embeddings()
    if output is None:
        return
    is_tied = output.weight is model.get_input_embeddings().weight
    configured = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    if configured != is_tied:
        number = "one" if is_tied else "two"
        raise UserError(
            "DSR548", f"{path}: config.json has tie_word_embeddings {configured}, but the two embeddings are {number}"
        )


def _load_adapter(run: FinishedRun, dtype: torch.dtype) -> Any:
    from peft import PeftModel, get_peft_model_state_dict

    from dsrecipes.runs.weights import read_tensors, weight_files

    model = PeftModel.from_pretrained(run.load_base(dtype), str(run.folder.model), torch_device=str(run.device))
    # As model/lora.py saves it, without weights of the base.
    expected = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    saved = {name for path in weight_files(run.folder.model) for name, _ in read_tensors(path)}
    for name in sorted(expected ^ saved):
        fault = "is missing" if name in expected else "is not part of the adapter"
        raise UserError("DSR547", f"{run.folder.model}: by adapter_config.json tensor {name} {fault}")
    return model


def _compare(
    model: PreTrainedModel, run: FinishedRun, facts: dict[str, Any], batches: dict[str, dict[str, torch.Tensor]]
) -> tuple[float, float]:
    """Compare the logits with those of the live engine.

    Returns:
        The largest difference, and the largest that rounding may explain.
    """
    from dsrecipes.runs.reference import allowed_difference, logits_of

    differences, limits = [], []
    for name, batch in batches.items():
        expected = batch.pop("logits")
        if not expected.isfinite().all():
            raise UserError("DSR549", f"{run.folder.path}: the logits were not finite when training ended: it diverged")
        try:
            logits = logits_of(model, {key: value.to(run.device) for key, value in batch.items()}, facts["auto_class"])
            difference = (logits - expected).abs().max().item()
        except (TypeError, LookupError, ValueError, RuntimeError) as error:
            raise UserError(
                "DSR550",
                f"{run.folder.reference} is damaged, or of another model: its inputs of {name} cannot be computed ({error})",
            ) from error
        limit = allowed_difference(expected, facts["precision"], run.config.model.load_in_4bit)
        # Written so that NaN is refused too.
        if not difference <= limit:
            raise UserError("DSR551", _differs(run, name, difference, limit))
        differences.append(difference)
        limits.append(limit)
    return max(differences), max(limits)


def _differs(run: FinishedRun, name: str, difference: float, limit: float) -> str:
    base = run.config.model.model_name_or_path
    other = f", or the base {base} is not the one of the training" if run.config.model.lora_r else ""
    return (
        f"{run.folder.model}: its logits on {name} differ from the live engine's by up to {difference:.2g} (allowed "
        f"{limit:.2g}): what was saved is not what was trained{other}"
    )


def main(argv: list[str]) -> int:
    """`dsrecipes verify RUN`."""
    parser = CommandParser("verify", "Check that the model a run saved is what it trained.")
    parser.add_argument("run", metavar="RUN", help="run folder, or `last`")
    add_device(parser)
    flags = parser.parse_args(argv)
    result = verify(flags.run, device=flags.device)
    from dsrecipes.runs.reference import describe_verification

    print(f"VERIFIED  {find_run(flags.run).verified}\n          {describe_verification(result)}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_CODE)
