"""How are generated answers compared with the rows' own?"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from dsrecipes.data.records import record_hash
from dsrecipes.errors import UserError

if TYPE_CHECKING:
    from tqdm import tqdm
    from transformers import PreTrainedModel

    from dsrecipes.evaluation.rows import Item
    from dsrecipes.evaluation.tasks import Measure, Settings
    from dsrecipes.inference.finished import FinishedRun
    from dsrecipes.inference.prompting import Prompt

Json = dict[str, Any]


def measure_answers(run: FinishedRun, items: list[Item], settings: Settings) -> tuple[Measure, int]:
    """Greedy answers to instructions, each with the row's own as its reference.

    Raises:
        UserError: the recipe's rows have no answers.
    """
    from dsrecipes.inference.prompting import prompt_of

    prompts = [prompt_of(run, item.row) for item in items]
    if any(prompt.reference is None for prompt in prompts):
        recipe = run.config.layers.recipe.name
        raise UserError("DSR477", f"--task answers: rows of {recipe} have no answer to compare with; --task loss")
    return partial(_measure, run, items, prompts, settings), len(items)


def _measure(
    run: FinishedRun, items: list[Item], prompts: list[Prompt], settings: Settings, model: PreTrainedModel, bar: tqdm
) -> list[Json]:
    from dsrecipes.inference.answers import answers, generation_settings

    generation = generation_settings(run, model, max_new_tokens=settings.max_new_tokens)
    results: list[Json] = [{} for _ in items]
    # answers() yields the longest prompts first, so each result is put at its own index.
    ids = [prompt.ids for prompt in prompts]
    for index, text in answers(model, run.tokenizer, ids, generation, settings.batch_size):
        item, prompt = items[index], prompts[index]
        results[index] = {
            "item": item.where,
            "key": record_hash(item.record),
            "prompt": prompt.text,
            "reference": prompt.reference,
            "answer": text,
        }
        bar.update()
    return results
