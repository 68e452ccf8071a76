"""One model on one set of items, by task: what evaluate and compare are made of."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dsrecipes.data.encode import IGNORE
from dsrecipes.data.questions import LETTERS
from dsrecipes.data.records import record_hash
from dsrecipes.data.weights import WEIGHTS
from dsrecipes.errors import UserError

if TYPE_CHECKING:
    from tqdm import tqdm
    from transformers import PreTrainedModel

    from dsrecipes.evaluation.rows import Item
    from dsrecipes.inference.finished import FinishedRun

Json = dict[str, Any]
Measure = Callable[["PreTrainedModel", "tqdm"], list[Json]]
"""A loaded model to one entry an item, in the items' order."""


@dataclass(frozen=True)
class Settings:
    """What an evaluation may be told beside its rows."""

    limit: int | None = None
    batch_size: int = 8
    num_fewshot: int = 0
    form: str = "tmmluplus"
    max_new_tokens: int = 256


def losses(run: FinishedRun, paths: dict[str, Path], settings: Settings) -> tuple[Measure, int]:
    """The summed loss of each sequence over its labels, in nats; where rows have weights, each label's times its weight."""
    from dsrecipes.data.collate import Sequences

    parts = {name: Sequences(path) for name, path in paths.items()}
    every = ((name, part[index][0]) for name, part in parts.items() for index in range(len(part)))
    names, rows = zip(*islice(every, settings.limit), strict=True)
    measure = partial(_losses, run, list(rows), settings.batch_size)
    return partial(_with_sources, measure, names) if len(paths) > 1 else measure, len(rows)


def _with_sources(measure: Measure, names: tuple[str, ...], model: PreTrainedModel, bar: tqdm) -> list[Json]:
    return [item | {"source": name} for item, name in zip(measure(model, bar), names, strict=True)]


def _losses(run: FinishedRun, rows: list[Json], batch_size: int, model: PreTrainedModel, bar: tqdm) -> list[Json]:
    import torch

    from dsrecipes.inference.forward import logits_at
    from dsrecipes.model.task import pad_id

    labels = [row["labels"] for row in rows]
    places = [np.flatnonzero(each[1:] != IGNORE) for each in labels]
    wanted = [(row["input_ids"].tolist(), place.tolist()) for row, place in zip(rows, places, strict=True)]
    found: list[Json] = [{} for _ in rows]
    for index, logits in logits_at(model, wanted, pad_id(run.tokenizer), batch_size):
        targets = torch.from_numpy(labels[index][places[index] + 1].astype(np.int64)).to(logits.device)
        weights = rows[index].get(WEIGHTS, ())
        weighed: Json = {}
        if len(weights):
            numbers = torch.from_numpy(weights[places[index] + 1].copy()).to(logits.device)
            loss = (torch.nn.functional.cross_entropy(logits, targets, reduction="none") * numbers).sum().item()
            weighed = {"weight": numbers.sum().item()}
        else:
            loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()
        key = hashlib.md5(np.array(wanted[index][0]).tobytes(), usedforsecurity=False).hexdigest()
        found[index] = {"item": f"sequence {index + 1}", "key": key, "loss": loss, "tokens": len(targets)} | weighed
        bar.update()
    return found


def choices_by_head(run: FinishedRun, items: list[Item], settings: Settings) -> tuple[Measure, int]:
    """Questions put to a multiple-choice head, as in training: the share of each option."""
    return partial(_by_head, run, items, settings.batch_size), len(items)


def _by_head(run: FinishedRun, items: list[Item], batch_size: int, model: PreTrainedModel, bar: tqdm) -> list[Json]:
    import torch

    from dsrecipes.data.collate import TOKEN_COUNTS, PaddingCollator
    from dsrecipes.data.records import bad_row
    from dsrecipes.model.load import check_ids
    from dsrecipes.model.task import pad_id

    encoded = run.recipe.encode([item.record for item in items], run.tokenizer, run.options)
    for item, texts in zip(items, encoded["input_ids"], strict=True):
        try:
            check_ids([token for text in texts for token in text], run.tokenizer, run.embedding_rows)
        except ValueError as error:
            raise bad_row(item.where, error) from error
    names = [name for name in encoded if name not in ("subject", WEIGHTS)]
    rows = [{name: _texts(encoded[name][index]) for name in names} for index in range(len(items))]
    order = sorted(range(len(rows)), key=lambda index: -max(map(len, rows[index]["input_ids"])))
    collate, found = PaddingCollator(pad_id(run.tokenizer)), [dict[str, Any]() for _ in items]
    for begin in range(0, len(order), batch_size):
        chosen = order[begin : begin + batch_size]
        batch = collate([[rows[index]] for index in chosen])
        del batch[TOKEN_COUNTS], batch["labels"]
        with torch.no_grad():
            logits = model(**{name: values.to(model.device) for name, values in batch.items()}).logits.float()
        for index, chances in zip(chosen, logits.log_softmax(-1).cpu().double(), strict=True):
            answer, best = items[index].record["answer"], int(chances.argmax())
            found[index] = _question(items[index]) | {
                "probabilities": chances.exp().tolist(), "predicted": LETTERS[best],
                "acc": float(best == answer), "loss": -float(chances[answer]), "tokens": 1,
            }  # fmt: skip
            bar.update()
    return found


def _texts(value: Any) -> Any:
    """A question's four lists of tokens as the collator takes them: an array of lists."""
    if not isinstance(value, list):
        return value
    texts = np.empty(len(value), dtype=object)
    texts[:] = value
    return texts


def labels_by_head(run: FinishedRun, items: list[Item], settings: Settings) -> tuple[Measure, int]:
    """Texts put to a classifier: its logits, beside the row's own label."""
    return partial(_by_label, run, items, settings.batch_size), len(items)


def _by_label(run: FinishedRun, items: list[Item], batch_size: int, model: PreTrainedModel, bar: tqdm) -> list[Json]:
    import torch

    from dsrecipes.data.records import bad_row
    from dsrecipes.inference.labels import answer, label_names, logits_of_rows
    from dsrecipes.model.loss import losses_by_row
    from dsrecipes.model.task import unwrapped
    from dsrecipes.recipes.seq_classification import target

    kind, names = unwrapped(model).config.problem_type, label_names(model)
    of_class = class_weights_of(run)
    records = [item.record for item in items]
    labels = run.recipe.encode(records, run.tokenizer, run.options)["labels"]
    found: list[Json] = [{} for _ in items]
    for index, logits in logits_of_rows(run, model, records, batch_size):
        item, label = items[index], labels[index]
        try:  # labels are JSON text until their numbers are known; a recipe of the user's own gives numbers
            label = target(json.loads(label), kind, names) if isinstance(label, str) else label
        except ValueError as error:
            raise bad_row(item.where, error) from error
        loss = losses_by_row(logits[None], torch.tensor([label]))[0].item()
        shown = {name: item.record[name] for name in ("text", "text_pair", "label", "weight") if name in item.record}
        found[index] = {
            "item": item.where,
            "key": record_hash(item.record),
            **shown,
            "target": label,
            **answer(logits, kind, names),
        }
        found[index] |= {"logits": logits.tolist(), "loss": loss, "tokens": 1}
        if of_class:
            found[index]["weight"] = item.record.get("weight", 1.0) * of_class[label]
        bar.update()
    return found


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
        raise UserError(f"{path}: the class weights of the run cannot be read ({error})") from error


def choices_by_likelihood(
    run: FinishedRun, items: list[Item], shots: dict[str, list[Json]], settings: Settings
) -> tuple[Measure, int]:
    """Questions put to a causal model: the log-likelihood of each choice. `shots` are solved questions by subject."""
    return partial(_by_likelihood, run, items, shots, settings), 4 * len(items)


def _by_likelihood(
    run: FinishedRun, items: list[Item], shots: dict[str, list[Json]], settings: Settings, model: PreTrainedModel, bar: tqdm
) -> list[Json]:
    from dsrecipes.evaluation.log_likelihood import context, log_likelihoods, options, score

    pairs = [
        (asked, f" {choice}")
        for item in items
        for asked in [context(item.record, shots.get(item.record["subject"], []), settings.form)]
        for choice in options(item.record, settings.form)
    ]
    found = log_likelihoods(model, run.tokenizer, pairs, settings.batch_size, bar)
    fours = [found[begin : begin + 4] for begin in range(0, len(found), 4)]
    return [_question(item) | score(item.record, four, settings.form) for item, four in zip(items, fours, strict=True)]


def _question(item: Item) -> Json:
    record = item.record
    shown = {"question": record["question"], "options": record["options"], "subject": record["subject"]}
    weight = {name: record[name] for name in ("weight",) if name in record}
    return {"item": item.where, "key": record_hash(record), **shown, "answer": LETTERS[record["answer"]], **weight}


def written(run: FinishedRun, items: list[Item], settings: Settings) -> tuple[Measure, int]:
    """Greedy answers to instructions, beside the rows' own.

    Raises:
        UserError: the recipe's rows have no answers.
    """
    from dsrecipes.inference.answers import prompt_of

    prompts = [prompt_of(run, item.row) for item in items]
    if any(prompt.reference is None for prompt in prompts):
        raise UserError(
            f"--task answers: rows of {run.config.layers.recipe.name} have no answer to compare with; --task loss"
        )
    return partial(_written, run, items, prompts, settings), len(items)


def _written(
    run: FinishedRun, items: list[Item], prompts: list[Any], settings: Settings, model: PreTrainedModel, bar: tqdm
) -> list[Json]:
    from dsrecipes.evaluation.metrics import exact_match, rouge_l
    from dsrecipes.inference.answers import answers, generation_settings

    how = generation_settings(run, model, max_new_tokens=settings.max_new_tokens)
    found: list[Json] = [{} for _ in items]
    for index, text in answers(model, run.tokenizer, [each.ids for each in prompts], how, settings.batch_size):
        prompt = prompts[index]
        found[index] = {
            "item": items[index].where, "key": record_hash(items[index].record), "prompt": prompt.text,
            "reference": prompt.reference, "answer": text,
            "rouge_l": rouge_l(text, prompt.reference), "exact_match": exact_match(text, prompt.reference),
        }  # fmt: skip
        bar.update()
    return found


def figures(task: str, items: list[Json], names: list[str] | None = None) -> Json:
    """The figures of a task over its items; a loss is the mean by weight where rows have weights.

    Args:
        names: of a classifier's labels.
    """
    if task == "labels":
        return _label_figures(items, names or [])
    if task == "loss":
        mean = sum(each["loss"] for each in items) / sum(map(weight_of, items))
        result = {"loss": mean, "perplexity": math.exp(min(mean, 700)), "tokens": sum(each["tokens"] for each in items)}
        sources = dict.fromkeys(item["source"] for item in items if "source" in item)
        if len(sources) > 1:
            of = {name: [item for item in items if item["source"] == name] for name in sources}
            result["by_source"] = {name: figures(task, own) for name, own in of.items()}
        return result
    if task == "answers":
        from dsrecipes.evaluation.metrics import ExactMatch, RougeL

        pairs = {"predictions": [each["answer"] for each in items], "references": [each["reference"] for each in items]}
        both = [metric(keep_in_memory=True).compute(**pairs) for metric in (RougeL, ExactMatch)]
        return {**(both[0] or {}), **(both[1] or {})}
    return _choice_figures(items)


def weight_of(item: Json) -> float:
    """What an item counts in the mean loss: the weights of its labels, or their number."""
    return item.get("weight", item.get("tokens", 1))


def _label_figures(items: list[Json], names: list[str]) -> Json:
    from dsrecipes.recipes.seq_classification import NUMBER, ONE, SEVERAL, scores

    first = items[0]["target"]
    kind = SEVERAL if isinstance(first, list) else NUMBER if isinstance(first, float) else ONE
    logits, labels = (np.array([item[name] for item in items]) for name in ("logits", "target"))
    result = scores(logits, labels, kind, names)
    result["loss"] = float(np.average([item["loss"] for item in items], weights=list(map(weight_of, items))))
    if kind == ONE:
        confusion = np.zeros((len(names), len(names)), dtype=int)
        np.add.at(confusion, (labels, logits.argmax(-1)), 1)
        result["confusion"] = confusion.tolist()
    return result


def _choice_figures(items: list[Json]) -> Json:
    from dsrecipes.evaluation.metrics import Calibration
    from dsrecipes.recipes.bert_tmmlu_qa import Accuracy

    letters = {name: [LETTERS.index(each[name]) for each in items] for name in ("predicted", "answer")}
    accuracy = Accuracy(keep_in_memory=True).compute(
        predictions=letters["predicted"], references=letters["answer"], subjects=[each["subject"] for each in items]
    )
    calibration = Calibration(keep_in_memory=True).compute(
        predictions=[max(each["probabilities"]) for each in items], references=[each["acc"] == 1 for each in items]
    )
    confusion = np.zeros((4, 4), dtype=int)
    np.add.at(confusion, (letters["answer"], letters["predicted"]), 1)
    rest = {name: float(np.mean([each[name] for each in items])) for name in ("acc_norm", "acc_bytes") if name in items[0]}
    if "loss" in items[0]:
        rest["loss"] = float(np.average([each["loss"] for each in items], weights=[weight_of(each) for each in items]))
    return {**(accuracy or {}), **rest, **(calibration or {}), "confusion": confusion.tolist()}
