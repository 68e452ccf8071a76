"""How are a classifier's labels measured, with the class weights that its run trained with?"""

from __future__ import annotations

import json
from functools import partial
from typing import TYPE_CHECKING, Any

from dsrecipes.data.labels import target
from dsrecipes.data.records import bad_row, record_hash
from dsrecipes.errors import UserError

if TYPE_CHECKING:
    from tqdm import tqdm
    from transformers import PreTrainedModel

    from dsrecipes.evaluation.rows import Item
    from dsrecipes.evaluation.tasks import Measure, Settings
    from dsrecipes.inference.finished import FinishedRun

Json = dict[str, Any]
_SHOWN = ("text", "text_pair", "label", "weight")
"""Fields of a record that a result repeats."""


def measure_labels(run: FinishedRun, items: list[Item], settings: Settings) -> tuple[Measure, int]:
    """Texts put to a classifier: its logits, the row's own label, and the loss of the row."""
    return partial(_measure, run, items, settings.batch_size), len(items)


def _measure(run: FinishedRun, items: list[Item], batch_size: int, model: PreTrainedModel, bar: tqdm) -> list[Json]:
    import torch

    from dsrecipes.inference.labels import answer, label_names, logits_of_rows
    from dsrecipes.model.loss import losses_by_row
    from dsrecipes.model.task import unwrapped

    kind, names = unwrapped(model).config.problem_type, label_names(model)
    weight_of_class = class_weights_of(run)
    records = [item.record for item in items]
    labels = run.recipe.encode(records, run.tokenizer, run.options)["labels"]
    results: list[Json] = [{} for _ in items]
    for index, logits in logits_of_rows(run, model, records, batch_size):
        label = _target(items[index], labels[index], kind, names)
        # The function of training, so that both losses are comparable.
        loss = losses_by_row(logits[None], torch.tensor([label]))[0].item()
        results[index] = _row(items[index]) | {"target": label, **answer(logits, kind, names)}
        results[index] |= {"logits": logits.tolist(), "loss": loss, "tokens": 1}
        # As in training: the row's weight times that of its class.
        if weight_of_class:
            results[index]["weight"] = items[index].record.get("weight", 1.0) * weight_of_class[label]
        bar.update()
    return results


def _target(item: Item, label: Any, kind: str, names: list[str]) -> Any:
    """The label as the loss takes it: an encode gives JSON text, whose number is known by the model's classes, or numbers."""
    if not isinstance(label, str):
        return label
    try:
        return target(json.loads(label), kind, names)
    except ValueError as error:
        raise bad_row(item.where, error) from error


def _row(item: Item) -> Json:
    shown = {name: item.record[name] for name in _SHOWN if name in item.record}
    return {"item": item.where, "key": record_hash(item.record), **shown}


def class_weights_of(run: FinishedRun) -> list[float] | None:
    """The weights that the run's --class_weights gave to the classes; None where it gave none.

    Raises:
        UserError: the run folder does not have them.
    """
    if not run.config.data.class_weights:
        return None
    path = run.folder.data
    try:
        return [float(weight) for weight in json.loads(path.read_text(encoding="utf-8"))["train"]["class_weights"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError("DSR476", f"{path}: the class weights of the run cannot be read ({error})") from error
