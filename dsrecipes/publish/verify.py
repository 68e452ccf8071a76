"""dsrecipes verify RUN: load the saved model in this process, without DeepSpeed, and see that it is what was trained."""

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
        UserError: what is wrong, with the tensor or file; VERIFIED.json is gone then.
    """
    from dsrecipes.io.disk import checksum
    from dsrecipes.runs.reference import read_reference

    finished = open_run(run, device)
    folder = finished.folder
    folder.verified.unlink(missing_ok=True)
    facts, batches = read_reference(folder)
    count = _check_tensors(folder.model, facts)
    _check_tokenizer(finished, facts)
    for name, known in facts["files"].items():
        if not (folder.model / name).is_file() or checksum(folder.model / name) != known:
            raise UserError(f"{folder.model / name} is missing or was changed since training ended")
    difference, allowed = _compare(load_saved(finished, facts), finished, facts, batches)
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES if name.replace("-", "_") in sys.modules}
    result = {
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "step": facts["step"], "tensors": count,
        "largest_difference": difference, "allowed": allowed, "precision": facts["precision"],
        "device": str(finished.device), "versions": versions,
        "files": {p.relative_to(folder.model).as_posix(): checksum(p) for p in sorted(folder.model.rglob("*")) if p.is_file()},
    }  # fmt: skip
    write_whole(folder.verified, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    return result


def _check_tensors(model: Path, facts: dict[str, Any]) -> int:
    """Every tensor: whole, not empty, finite, and as it was saved. Returns how many there are."""
    from dsrecipes.runs.weights import GATHER_HINT, fingerprint, read_tensors, weight_files

    known, zero = dict(facts["weights"]), []
    for path in weight_files(model):
        for name, tensor in read_tensors(path):
            where = f"{path}: tensor {name}"
            if not tensor.numel():
                raise UserError(f"{where} is empty; {GATHER_HINT}")
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise UserError(f"{where} holds NaN or infinite numbers")
            if "lora_B" in name:
                zero.append(not tensor.any())
            if name not in known:
                raise UserError(f"{where} was not saved by this run: the file is another model's")
            if fingerprint(tensor) != known.pop(name):
                raise UserError(f"{where} was changed since training ended" + ("" if tensor.any() else " (it is all zero)"))
    if known:
        raise UserError(
            f"{model}: {plural(len(known), 'tensor')} that this run saved not found: {', '.join(sorted(known)[:3])}"
        )
    if not facts["weights"]:
        raise UserError(f"{model} holds no tensors; {GATHER_HINT}")
    if zero and all(zero) and facts["learned"]:
        raise UserError(f"{model}: every lora_B of the adapter is zero, so it changes nothing: training did not reach it")
    return len(facts["weights"])


def _check_tokenizer(run: FinishedRun, facts: dict[str, Any]) -> None:
    """The tokenizer gives the ids that it gave when training ended."""
    known = facts["tokenizer"]
    found = run.tokenizer
    if len(found) != known.get("size"):
        raise UserError(
            f"{run.folder.model}: the tokenizer has {len(found)} tokens, the one of the training had {known.get('size')}"
        )
    for text, ids in known["texts"].items():
        if found(text)["input_ids"] != ids:
            raise UserError(f"{run.folder.model}: the tokenizer is not that of the training: it gives {text!r} other ids")


def load_saved(run: FinishedRun, facts: dict[str, Any]) -> PreTrainedModel:
    """The model by plain transformers or peft, with no tensor missing, left over or of another shape."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    from dsrecipes.io.hub import damaged
    from dsrecipes.model.load import prepare_for_inference

    disable_progress_bar()
    dtype = getattr(torch, facts["dtype"])
    if run.device.type == "cpu" and dtype == torch.float16:
        dtype = torch.float32  # a CPU computes little in fp16
    try:
        adapter = (run.folder.model / "adapter_config.json").is_file()
        model = _load_adapter(run, dtype) if adapter else _load_whole(run, facts["auto_class"], dtype)
    except (*damaged(), RuntimeError) as error:
        raise UserError(f"{run.folder.model} cannot be loaded: {' '.join(str(error).split())[:300]}") from error
    return prepare_for_inference(model, run.device)


def _load_whole(run: FinishedRun, auto_class: str, dtype: torch.dtype) -> PreTrainedModel:
    from transformers import AutoConfig

    from dsrecipes.model.task import loading_class

    config = AutoConfig.from_pretrained(run.folder.model, trust_remote_code=run.config.model.trust_remote_code)
    model, info = loading_class(auto_class, config).from_pretrained(
        run.folder.model, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True,
        use_safetensors=True, trust_remote_code=run.config.model.trust_remote_code,
    )  # fmt: skip
    path = run.folder.model
    for key, words in (("missing_keys", "missing"), ("unexpected_keys", "not part of the model")):
        if info[key]:
            raise UserError(
                f"{path}: by config.json {plural(len(info[key]), 'tensor')} {words}: {', '.join(sorted(info[key])[:3])}"
            )
    for name, found, wanted in info["mismatched_keys"]:
        raise UserError(f"{path}: tensor {name} has shape {list(found)}, config.json asks for {list(wanted)}")
    output = model.get_output_embeddings()
    tied = output is not None and output.weight is model.get_input_embeddings().weight
    asked = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    if output is not None and asked != tied:
        raise UserError(
            f"{path}: config.json has tie_word_embeddings {asked}, but the two embeddings are {'one' if tied else 'two'}"
        )
    return model


def _load_adapter(run: FinishedRun, dtype: torch.dtype) -> PreTrainedModel:
    from peft import PeftModel, get_peft_model_state_dict

    from dsrecipes.runs.weights import read_tensors, weight_files

    model = PeftModel.from_pretrained(run.load_base(dtype), str(run.folder.model), torch_device=str(run.device))
    wanted = {name: tensor.shape for name, tensor in get_peft_model_state_dict(model, save_embedding_layers=False).items()}
    found = {name: tensor.shape for path in weight_files(run.folder.model) for name, tensor in read_tensors(path)}
    for name in sorted(wanted.keys() ^ found.keys()):
        state = "is missing" if name in wanted else "is not part of the adapter"
        raise UserError(f"{run.folder.model}: by adapter_config.json tensor {name} {state}")
    return model


def _compare(
    model: PreTrainedModel, run: FinishedRun, facts: dict[str, Any], batches: dict[str, dict[str, torch.Tensor]]
) -> tuple[float, float]:
    """(largest difference of the logits from the recorded ones, what rounding may explain)."""
    from dsrecipes.runs.reference import allowed_difference, logits_of

    four_bit = run.config.model.load_in_4bit
    differences, limits = [], []
    for name, batch in batches.items():
        expected = batch.pop("logits")
        if not expected.isfinite().all():
            raise UserError(f"{run.folder.path}: the logits were not finite when training ended: it diverged")
        try:
            logits = logits_of(model, {key: value.to(run.device) for key, value in batch.items()}, facts["auto_class"])
            difference = (logits - expected).abs().max().item()
        except (TypeError, LookupError, ValueError, RuntimeError) as error:
            raise UserError(
                f"{run.folder.reference} is damaged, or of another model: what it holds on {name} cannot be asked ({error})"
            ) from error
        limit = allowed_difference(expected, facts["precision"], four_bit)
        if not difference <= limit:
            base = run.config.model.model_name_or_path
            other = f", or the base {base} is not the one of the training" if run.config.model.lora_r else ""
            raise UserError(
                f"{run.folder.model}: its logits on {name} differ from the live engine's by up to {difference:.2g} (allowed "
                f"{limit:.2g}): what was saved is not what was trained{other}"
            )
        differences.append(difference)
        limits.append(limit)
    return max(differences), max(limits)


def main(argv: list[str]) -> int:
    """`dsrecipes verify RUN`."""
    parser = CommandParser("verify", "Check that the model a run saved is what it trained.")
    parser.add_argument("run", metavar="RUN", help="run folder, or `last`")
    add_device(parser)
    asked = parser.parse_args(argv)
    result = verify(asked.run, device=asked.device)
    from dsrecipes.runs.reference import describe_verification

    print(f"VERIFIED  {find_run(asked.run).verified}\n          {describe_verification(result)}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_CODE)
