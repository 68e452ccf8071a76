"""What does the model card of an exported model say? It is filled from the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from dsrecipes.errors import UserError
from dsrecipes.inference.finished import FinishedRun
from dsrecipes.inference.prompting import find_prompt_field, prompt_of
from dsrecipes.runs.log import read_log

_MERGED = {
    "LoRA": "The LoRA adapter is merged into the base's weights.",
    "QLoRA": "The adapter was trained on a 4-bit base. That base was dequantized and the adapter merged into it, so the "
    "weights are those the adapter learned with, and not the original base's.",
    "none": "All weights were trained.",
}
_PIPELINES = {"AutoModelForCausalLM": "text-generation", "AutoModelForSequenceClassification": "text-classification"}


def _name(value: Any) -> Any:
    """Reduce paths of this machine to their last part, inside lists and mappings too."""
    if isinstance(value, list):
        return [_name(item) for item in value]
    if isinstance(value, dict):
        return {key: _name(item) for key, item in value.items()}
    if isinstance(value, str) and (Path(value).is_absolute() or value.startswith(("~", "."))):
        return Path(value).name
    return value


def model_card(run: FinishedRun, result: dict[str, Any]) -> str:
    """README.md in the hub's form, without paths of this machine; the license is for the user to add."""
    options, auto = run.config.model, run.recipe.auto_class
    base = str(options.model_name_or_path)
    # A path of this machine means nothing to a reader, and may hold the name of a user.
    values = {key: _name(value) for key, value in yaml.safe_load(run.folder.config.read_text(encoding="utf-8")).items()}
    head = {"library_name": "transformers", "tags": ["dsrecipes", values["recipe"]]}
    if auto in _PIPELINES:
        head["pipeline_tag"] = _PIPELINES[auto]
    # The hub links base_model to a repository, so a path or a starter: name is left out.
    if not options.from_scratch and _name(base) == base and ":" not in base:
        head["base_model"] = base
    sections = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}# license: add one that the base model and the data allow\n---",
        f"# {_name(base)}, tuned with dsrecipes {values['recipe']}",
        f"{'Random weights of the configuration' if options.from_scratch else 'Base'}: `{_name(base)}`. "
        f"{_MERGED[result['merged']]} Weights: {result['dtype']}.",
        f"## Load it\n\n```python\n{_code(auto)}\n```",
        *_prompt(run),
        f"## Data\n\n{_datasets(run)}, at most {run.config.data.max_length} tokens a row.",
        f"## Figures\n\n{_figures(run)}",
        f"## Recipe\n\n```yaml\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True)}```",
        f"## Check\n\nThe largest difference of its logits from those of the run, on fixed random ids and computed in "
        f"float32: {result['largest_difference']:.2g}.",
    ]
    return "\n\n".join(sections) + "\n"


def _datasets(run: FinishedRun) -> str:
    return ", ".join(f"`{_name(source.path)}`" for source in run.config.data.sources)


def _code(auto: str) -> str:
    return (
        f"from transformers import {auto}, AutoTokenizer\n\n"
        f'model = {auto}.from_pretrained("FOLDER")\ntokenizer = AutoTokenizer.from_pretrained("FOLDER")'
    )


def _prompt(run: FinishedRun) -> list[str]:
    """A section on the recipe's prompt, where its model answers prompts."""
    try:
        field = find_prompt_field(run)
    except UserError:
        return []
    if field.continues:
        return []
    prompt = prompt_of(run, field.row("Name three colours."))
    return [f"## Prompt\n\nIt was trained to answer texts of this form:\n\n```text\n{prompt.text}\n```"]


def _figures(run: FinishedRun) -> str:
    """A table of metrics.json's numbers; for a checkpoint, of the last that the log has up to its step."""
    if run.checkpoint:
        step = int(run.checkpoint.name.removeprefix("checkpoint-"))
        figures: dict[str, Any] = {}
        for values in read_log(run.folder.log):
            if values["step"] <= step:
                figures |= {"step": values["step"]} | {key: value for key, value in values.items() if key.endswith("loss")}
    else:
        try:
            figures = json.loads(run.folder.metrics.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return f"No figures: {run.folder.metrics.name} is missing or damaged."
    # Times belong to the machine, not to the model.
    timing = ("_runtime", "_per_second")
    rows = [
        f"| {key} | {value:.4g} |"
        for key, value in figures.items()
        if isinstance(value, (int, float)) and not key.endswith(timing)
    ]
    return "\n".join(["| figure | value |", "|---|---|", *rows])
