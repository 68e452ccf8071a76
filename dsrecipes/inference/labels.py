"""What label does a classifier give a text? The probabilities of its labels, or a number."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from dsrecipes.errors import UserError
from dsrecipes.inference.session import Session, Speaker, Terminal

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from dsrecipes.inference.finished import FinishedRun

Json = dict[str, Any]
_SHOWN = 10
"""Number of labels that a terminal shows, the likeliest first."""


def logits_of_rows(
    run: FinishedRun, model: Any, records: list[Json], batch_size: int = 1
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield (index, fp32 logits of all labels, on the CPU) of each record, the longest first.

    Raises:
        UserError: a token that the model has no embedding for.
    """
    import numpy as np
    import torch

    from dsrecipes.data.collate import TOKEN_COUNTS, PaddingCollator
    from dsrecipes.model.task import pad_id
    from dsrecipes.model.tokenizer import check_prompt_ids

    encoded = run.recipe.encode(records, run.tokenizer, run.options)
    names = [name for name, column in encoded.items() if name != "labels" and isinstance(column[0], list)]
    rows: list[Json] = [
        {name: np.array(encoded[name][index]) for name in names} | {"labels": 0} for index in range(len(records))
    ]
    # The longest first, so that too little memory shows in the first batch.
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index]["input_ids"]))
    collate = PaddingCollator(pad_id(run.tokenizer))
    for begin in range(0, len(order), batch_size):
        chosen = order[begin : begin + batch_size]
        for index in chosen:
            # Checked here, because on a GPU such an id ends in a device-side assert.
            check_prompt_ids(rows[index]["input_ids"].tolist(), run.tokenizer, run.embedding_rows)
        batch = collate([[rows[index]] for index in chosen])
        # The labels are placeholders for the collator; with labels the model would compute a loss.
        del batch[TOKEN_COUNTS], batch["labels"]
        with torch.no_grad():
            logits = model(**{name: values.to(model.device) for name, values in batch.items()}).logits.float().cpu()
        yield from zip(chosen, logits, strict=True)


def label_names(model: PreTrainedModel) -> list[str]:
    """The names of a classifier's outputs, in their order."""
    from dsrecipes.model.task import unwrapped

    config = unwrapped(model).config
    return [str(config.id2label[index]) for index in range(config.num_labels)]


def answer(logits: torch.Tensor, kind: str | None, names: list[str]) -> Json:
    """{"value"} of a number; else {"predicted", "probabilities" by name}.

    Args:
        logits: (labels,).
        kind: config.problem_type; None means one label per row.
        names: of the labels.
    """
    if kind == "regression":
        return {"value": float(logits[0])}
    several = kind == "multi_label_classification"
    shares = (logits.double().sigmoid() if several else logits.double().softmax(-1)).tolist()
    if several:
        predicted: Any = [name for name, share in zip(names, shares, strict=True) if share > 0.5]
    else:
        predicted = names[int(logits.argmax())]
    return {"predicted": predicted, "probabilities": dict(zip(names, shares, strict=True))}


class LabelSession(Session):
    """One text per line, or two separated by a tab; each model labels it."""

    ask_with = "text> "

    def __init__(self, run: FinishedRun, speakers: list[Speaker], terminal: Terminal) -> None:
        super().__init__(run, speakers, terminal)
        self.results: list[Json] = []

    def take(self, line: str) -> None:
        """Classify the line."""
        from dsrecipes.model.task import unwrapped

        # format_row refuses a row without a label; this one never reaches the model.
        row = dict(zip(("text", "text_pair"), line.split("\t"), strict=False)) | {"label": "0"}
        try:
            record = self.run.recipe.format_row(row)
        except (ValueError, KeyError, TypeError) as error:
            recipe = self.run.config.layers.recipe.name
            raise UserError("DSR454", f"recipe {recipe} cannot take this text: {error}") from error
        for speaker in self.speakers:
            model = speaker.model
            with contextlib.nullcontext() if speaker.adapter else model.disable_adapter():
                _, logits = next(logits_of_rows(self.run, model, [record]))
            result = answer(logits, unwrapped(model).config.problem_type, label_names(model))
            self.results.append({"model": speaker.name, "text": line, **result})
            self.terminal.write("".join(f"{text}\n" for text in self._lines(speaker.name, result)))

    def _lines(self, name: str, result: Json) -> Iterator[str]:
        label = self.terminal.label(name)
        if "value" in result:
            yield f"{label}{result['value']:.4f}"
            return
        predicted = result["predicted"]
        if not isinstance(predicted, str):
            predicted = ", ".join(predicted) or "none"
        shares = result["probabilities"]
        if not self.terminal.interactive:
            rounded = {key: round(share, 4) for key, share in shares.items()}
            yield f"{label}{predicted}\t{json.dumps(rounded, ensure_ascii=False)}"
            return
        yield f"{label}{predicted}"
        for key in sorted(shares, key=lambda key: -shares[key])[:_SHOWN]:
            yield f"  {shares[key]:6.1%} {'#' * round(20 * shares[key]):<20}  {key}"

    def record(self) -> list[Json]:
        """The texts with the models' labels."""
        return self.results

    def do_reset(self, argument: str) -> None:
        """Forget the texts."""
        self.results = []
