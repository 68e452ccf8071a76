"""How does a causal model score four-way questions? As lm-evaluation-harness 0.4 does: prompts, tokens and scores.

Its tasks tmmluplus, cmmlu, mmlu and mmlu_continuation, without a chat template. Ties go to the first choice.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dsrecipes.data import questions
from dsrecipes.data.questions import LETTERS
from dsrecipes.errors import UserError
from dsrecipes.evaluation.forms import FORMS

if TYPE_CHECKING:
    from tqdm import tqdm
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from dsrecipes.inference.forward import ScoredSequence

Record = dict[str, Any]
_DEFAULT_LIMIT = 2048
"""Tokens of a model that sets no limit, as in the harness."""


@cache
def _names() -> dict[str, dict[str, str]]:
    """Task -> subject -> its Chinese name in the harness's descriptions."""
    return json.loads(Path(questions.__file__).with_name("subject_names.json").read_text("utf-8"))


def context(record: Record, shots: list[Record], form: str) -> str:
    """Text before the answer: description, solved questions, the question."""
    subject = _names().get(form, {}).get(record["subject"], record["subject"].replace("_", " "))
    solved = [f"{_asked(shot, form)} {options(shot, form)[shot['answer']]}\n\n" for shot in shots]
    return FORMS[form].description.format(subject=subject) + "".join(solved) + _asked(record, form)


def _asked(record: Record, form: str) -> str:
    a, b, c, d = record["options"]
    return FORMS[form].ask.format(question=record["question"].strip(), a=a, b=b, c=c, d=d)


def options(record: Record, form: str) -> list[str]:
    """The four texts that are scored."""
    return list(LETTERS) if FORMS[form].letters else record["options"]


def encode_pair(context: str, continuation: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Ids of a context and of its continuation: encoded together, and cut where the context alone would end.

    Spaces at the end of the context go to the continuation, since tokens of words begin with theirs.
    """
    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    opening = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    # A context that begins with the opening token, as a template writes it, must not get a second one.
    special = not context.startswith(str(tokenizer.decode(opening)))
    whole = tokenizer.encode(context + continuation, add_special_tokens=special)
    start = len(tokenizer.encode(context, add_special_tokens=special))
    return whole[:start], whole[start:]


def log_likelihoods(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: list[tuple[str, str]],
    batch_size: int,
    bar: tqdm,
) -> list[float]:
    """Log-likelihood of each continuation after its context, in nats; a context that is too long loses its beginning.

    Each distinct input is computed once: the four letters of a question share one.

    Args:
        model: a causal language model.
        tokenizer: the model's.
        pairs: (context, continuation).
        batch_size: inputs computed together.
        bar: advances by 1 for each pair.

    Raises:
        UserError: a continuation alone is longer than the model reads, or has no token of its own.
    """
    from dsrecipes.inference.answers import positions
    from dsrecipes.inference.forward import logits_at
    from dsrecipes.model.task import pad_id
    from dsrecipes.model.tokenizer import check_prompt_ids, embedding_rows

    limit = positions(model) or _DEFAULT_LIMIT
    inputs: dict[tuple[int, ...], list[tuple[int, list[int]]]] = {}
    """Input ids -> (number of the pair, ids of its continuation)."""
    for number, (before, after) in enumerate(pairs):
        start, ids = encode_pair(before, after, tokenizer)
        check_prompt_ids(start + ids, tokenizer, embedding_rows(model.config))
        if not ids or len(ids) > limit:
            raise UserError("DSR486", f"choice {after!r} has {len(ids)} tokens; a choice needs 1 to {limit}")
        # The last token is predicted but never read, so limit + 1 tokens fit.
        inputs.setdefault(tuple((start + ids)[-(limit + 1) :][:-1]), []).append((number, ids))
    scored = list(inputs.items())
    sequences: list[ScoredSequence] = []
    for context_ids, continuations in scored:
        # One forward pass serves all continuations of an input, up to the longest.
        longest = max(len(ids) for _, ids in continuations)
        sequences.append((list(context_ids), list(range(len(context_ids) - longest, len(context_ids)))))
    values = [0.0] * len(pairs)
    for index, logits in logits_at(model, sequences, pad_id(tokenizer), batch_size):
        chances = logits.log_softmax(-1)
        for number, ids in scored[index][1]:
            # Summed in fp32, as the harness does; otherwise a long choice differs in the fourth digit.
            values[number] = chances[range(len(chances) - len(ids), len(chances)), ids].sum().item()
            bar.update()
    return values


def score(record: Record, log_likelihoods: list[float], form: str) -> Record:
    """Which option the four log-likelihoods choose: as they are (acc), by characters (acc_norm) and by bytes (acc_bytes)."""
    values, texts = np.array(log_likelihoods), options(record, form)
    characters = np.array([len(text) for text in texts], dtype=float)
    octets = np.array([len(text.encode()) for text in texts], dtype=float)
    chosen = {
        "acc": int(np.argmax(values)),
        "acc_norm": int(np.argmax(values / characters)),
        "acc_bytes": int(np.argmax(values / octets)),
    }
    chances = np.exp(values - values.max())
    return {
        "log_likelihoods": log_likelihoods,
        "probabilities": (chances / chances.sum()).tolist(),
        "predicted": LETTERS[chosen["acc"]],
        "predicted_norm": LETTERS[chosen["acc_norm"]],
        **{name: float(choice == record["answer"]) for name, choice in chosen.items()},
    }
