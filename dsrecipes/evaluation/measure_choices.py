"""How are four-way questions put to a model: to a head that scores options, or to a model that writes?"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from dsrecipes.data.questions import LETTERS
from dsrecipes.data.records import record_hash
from dsrecipes.data.weights import WEIGHTS

if TYPE_CHECKING:
    import torch
    from tqdm import tqdm
    from transformers import PreTrainedModel

    from dsrecipes.evaluation.rows import Item
    from dsrecipes.evaluation.tasks import Measure, Settings
    from dsrecipes.inference.finished import FinishedRun

Json = dict[str, Any]


def measure_choices_by_head(run: FinishedRun, items: list[Item], settings: Settings) -> tuple[Measure, int]:
    """Questions put to a multiple-choice head, as in training: the probability of each option."""
    return partial(_by_head, run, items, settings.batch_size), len(items)


def _by_head(run: FinishedRun, items: list[Item], batch_size: int, model: PreTrainedModel, bar: tqdm) -> list[Json]:
    import torch

    from dsrecipes.data.collate import TOKEN_COUNTS, PaddingCollator
    from dsrecipes.model.task import pad_id

    rows = _encode(run, items)
    order = sorted(range(len(rows)), key=lambda index: -max(map(len, rows[index]["input_ids"])))
    collate = PaddingCollator(pad_id(run.tokenizer))
    results = [dict[str, Any]() for _ in items]
    for begin in range(0, len(order), batch_size):
        chosen = order[begin : begin + batch_size]
        batch = collate([[rows[index]] for index in chosen])
        # Without labels the model computes no loss of its own: the loss is taken from the probabilities below.
        del batch[TOKEN_COUNTS], batch["labels"]
        with torch.no_grad():
            logits = model(**{name: values.to(model.device) for name, values in batch.items()}).logits.float()
        for index, chances in zip(chosen, logits.log_softmax(-1).cpu().double(), strict=True):
            results[index] = _question(items[index]) | _choice(chances, items[index].record["answer"])
            bar.update()
    return results


def _choice(chances: torch.Tensor, answer: int) -> Json:
    """Result of a head's log-probabilities (4,) of the options."""
    best = int(chances.argmax())
    return {
        "probabilities": chances.exp().tolist(),
        "predicted": LETTERS[best],
        "acc": float(best == answer),
        "loss": -float(chances[answer]),
        "tokens": 1,
    }


def _encode(run: FinishedRun, items: list[Item]) -> list[Json]:
    """Rows as the collator takes them.

    Raises:
        UserError: a token that the model has no embedding for; names the row.
    """
    from dsrecipes.data.records import bad_row
    from dsrecipes.model.tokenizer import check_ids

    encoded = run.recipe.encode([item.record for item in items], run.tokenizer, run.options)
    for item, texts in zip(items, encoded["input_ids"], strict=True):
        try:
            check_ids([token for text in texts for token in text], run.tokenizer, run.embedding_rows)
        except ValueError as error:
            raise bad_row(item.where, error) from error
    names = [name for name in encoded if name not in ("subject", WEIGHTS)]
    return [{name: _as_array(encoded[name][index]) for name in names} for index in range(len(items))]


def _as_array(value: Any) -> Any:
    """A question's four lists of tokens as the collator takes them: an array of lists."""
    if not isinstance(value, list):
        return value
    # np.array would turn four lists of equal length into one matrix.
    texts = np.empty(len(value), dtype=object)
    texts[:] = value
    return texts


def measure_choices_by_likelihood(
    run: FinishedRun, items: list[Item], shots: dict[str, list[Json]], settings: Settings
) -> tuple[Measure, int]:
    """Questions put to a causal model: the log-likelihood of each option.

    Args:
        run: whose tokenizer is used.
        items: the questions.
        shots: solved questions by subject, which are put before each.
        settings: form and batch_size.
    """
    return partial(_by_likelihood, run, items, shots, settings), 4 * len(items)


def _by_likelihood(
    run: FinishedRun,
    items: list[Item],
    shots: dict[str, list[Json]],
    settings: Settings,
    model: PreTrainedModel,
    bar: tqdm,
) -> list[Json]:
    from dsrecipes.evaluation.log_likelihood import context, log_likelihoods, options, score

    pairs = []
    for item in items:
        before = context(item.record, shots.get(item.record["subject"], []), settings.form)
        # The space is the harness's delimiter, part of the continuation.
        pairs += [(before, f" {option}") for option in options(item.record, settings.form)]
    values = log_likelihoods(model, run.tokenizer, pairs, settings.batch_size, bar)
    return [
        _question(item) | score(item.record, values[4 * number : 4 * number + 4], settings.form)
        for number, item in enumerate(items)
    ]


def _question(item: Item) -> Json:
    """The part of a result that describes its question."""
    record = item.record
    shown = {"question": record["question"], "options": record["options"], "subject": record["subject"]}
    weight = {"weight": record["weight"]} if "weight" in record else {}
    return {"item": item.where, "key": record_hash(record), **shown, "answer": LETTERS[record["answer"]], **weight}
