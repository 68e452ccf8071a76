"""Where a model's files come from: a folder, the base of an adapter, the bundled package or the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsrecipes.config.adapter import CONFIG as ADAPTER_CONFIG
from dsrecipes.config.adapter import adapter_folder, base_model
from dsrecipes.errors import UserError
from dsrecipes.io.hub import first_line, hub_error
from dsrecipes.io.paths import starter_path, user_path
from dsrecipes.model.bundled import converted_model, is_bundled, offline_hint
from dsrecipes.runs.folder import RunFolder

if TYPE_CHECKING:
    from dsrecipes.config.schema import ModelConfig

_FLAG = "--model_name_or_path"
_PICKLES = (
    "model {} has its weights only as pickles (.bin), a format that can carry code: use a version with .safetensors, or "
    "give --allow_pickle true if you trust it"
)


def local_model(name: str) -> str:
    """Convert a model name for from_pretrained: a folder's absolute path, or a hub name unchanged.

    The bundled SmolLM2 becomes its folder in the cache.

    Raises:
        UserError: the name looks like a path and nothing is there, or the folder is not a model.
    """
    path = user_path(name)
    if path.is_dir():
        _check_model_folder(path, name)
        # Absolute, because an adapter's files name this path and are read from other working directories.
        return str(path.absolute())
    # A name of the hub has one slash at most.
    if path.is_file() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError("DSR200", f"{_FLAG} {name}: no such folder")
    return str(converted_model()) if is_bundled(name) else name


def _check_model_folder(path: Path, name: str) -> None:
    if not (path / "config.json").is_file():
        raise UserError("DSR200", f"{_FLAG} {name}: {_models_near(path) or 'no config.json in this folder'}")
    if (path / ADAPTER_CONFIG).is_file():
        # from_pretrained would load the adapter into the model without a message.
        raise UserError(
            "DSR201",
            f"{_FLAG} {name}: this folder holds a model (config.json) and a LoRA adapter ({ADAPTER_CONFIG}): move "
            f"{ADAPTER_CONFIG} and adapter_model.safetensors into a folder of their own, and give that folder to train the "
            "adapter further, or this one to train the model",
        )


def _models_near(path: Path) -> str:
    """Name the model that is probably meant by a run folder or its checkpoints; empty for any other folder."""
    if path.name == "checkpoints" and (path.parent / "config.yaml").is_file():
        path = path.parent
    if not (path / "config.yaml").is_file():
        return ""
    run = RunFolder(path)
    if run.model.is_dir():
        return f"this is a run folder; its model is {run.model}"
    checkpoints = run.complete_checkpoints()
    newest = f"; its newest checkpoint is {checkpoints[-1]}" if checkpoints else ""
    return f"this is the folder of a run that has no model yet{newest}"


def weights_source(options: ModelConfig) -> tuple[str, dict[str, Any]]:
    """Name or folder of the weights (for an adapter, of its base), and the other arguments of from_pretrained.

    Raises:
        UserError: nothing is there.
    """
    model = options.model_name_or_path or ""
    try:
        name = local_model(starter_path(base_model(model)))
    except UserError as error:
        folder = adapter_folder(model)
        if folder is None:
            raise
        reason = error.message.removeprefix(f"{_FLAG} ")
        raise UserError(error.code, f"{_needs_base(model)}: {reason}") from error
    return name, {"revision": options.model_revision, "trust_remote_code": options.trust_remote_code}


def _needs_base(adapter: str | Path) -> str:
    return f"the adapter {adapter} needs its base model, which its {ADAPTER_CONFIG} names"


def explain_load_error(error: Exception, options: ModelConfig) -> UserError:
    """Convert what from_pretrained raised into a message that says what to do."""
    name, adapter = base_model(options.model_name_or_path or ""), adapter_folder(options.model_name_or_path)
    if adapter is None:
        return _explain(error, name, offline_hint(name))
    alternative = f"a local copy, and write its path into {adapter / ADAPTER_CONFIG} (base_model_name_or_path)"
    return _explain(error, name, alternative).at(_needs_base(adapter))


def _explain(error: Exception, name: str, alternative: str) -> UserError:
    hub_problem = hub_error(error, name, "model", alternative)
    if hub_problem is not None:
        return UserError("DSR206", hub_problem)
    # transformers raises one type for all causes; the option that the message names distinguishes them.
    if "trust_remote_code" in str(error):
        advice = "read it, then give --trust_remote_code true to run it"
        return UserError("DSR203", f"model {name} comes with Python code of its own: {advice}")
    if "use_safetensors" in str(error):
        return UserError("DSR204", _PICKLES.format(name))
    return UserError("DSR205", f"model {name} cannot be loaded: {first_line(error)}")


def refuse_pickles(name: str, options: ModelConfig) -> None:
    """Require safetensors in a model folder, in files of that folder, unless pickles are allowed (UserError)."""
    folder = Path(name)
    if any(folder.glob("model*.safetensors*")):
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            # Refuses an index that names files outside the folder.
            from dsrecipes.runs.weights import indexed_files

            indexed_files(index)
    elif any(folder.glob("*.bin*")) and not options.allow_pickle:
        raise UserError("DSR204", _PICKLES.format(options.model_name_or_path))
