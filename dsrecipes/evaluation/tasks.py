"""Which tasks measure which models, and what may be set in an evaluation?

loss: the loss of each sequence; choices: four-way questions; answers: written answers compared with the rows' own; labels:
those of a classifier. metrics.py has the figures of each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dsrecipes.errors import UserError
from dsrecipes.evaluation.forms import FORMS

if TYPE_CHECKING:
    from tqdm import tqdm
    from transformers import PreTrainedModel

    from dsrecipes.inference.finished import FinishedRun

TASKS = ("loss", "choices", "answers", "labels")
# As text, so that the flags of the commands need no import of transformers.
Measure = Callable[["PreTrainedModel", "tqdm"], list[dict[str, Any]]]
"""From a loaded model and a progress bar to one entry per item, in the items' order."""
_TASKS_OF_MODELS = {
    "ForCausalLM": ("loss", "choices", "answers"),
    "ForMultipleChoice": ("choices",),
    "ForSequenceClassification": ("labels",),
}
"""End of a recipe's auto_class -> the tasks that measure its models, the default first."""


@dataclass(frozen=True)
class Settings:
    """Settings of an evaluation other than its rows and its task."""

    limit: int | None = None
    """Items to measure; None: all."""
    batch_size: int = 8
    """Items (of choices: texts) computed together."""
    num_fewshot: int = 0
    """Solved questions before each question that is put to a model that writes."""
    form: str = "tmmluplus"
    """A key of forms.FORMS."""
    max_new_tokens: int = 256
    """Longest answer."""


def writes_text(run: FinishedRun) -> bool:
    """Whether the run's model is a causal language model."""
    return run.recipe.auto_class.endswith("ForCausalLM")


def choose_task(run: FinishedRun, task: str | None, dataset: str | None, settings: Settings) -> str:
    """The task to measure a run by; what its recipe trains where none is given.

    Raises:
        UserError: an unknown task or form, one that does not fit the model, or settings of another task.
    """
    recipe = run.config.layers.recipe.name
    auto_class = run.recipe.auto_class
    fitting = next((tasks for end, tasks in _TASKS_OF_MODELS.items() if auto_class.endswith(end)), None)
    if fitting is None:
        raise UserError(
            "DSR471",
            f"{recipe}: evaluate measures causal language models, multiple choice and classifiers, not a {auto_class}",
        )
    task = task or fitting[0]
    for value, known in ((task, TASKS), (settings.form, tuple(FORMS))):
        if value not in known:
            raise UserError("DSR470", f"{value!r} is unknown; choose from {', '.join(known)}")
    if task not in fitting:
        raise UserError("DSR472", f"--task {task}: a model of {recipe} is measured by --task {' or '.join(fitting)}")
    asks_questions = task == "choices" and writes_text(run)
    if asks_questions and not dataset:
        raise UserError(
            "DSR473",
            "--task choices: name a file or folder of questions with --dataset (columns question,A,B,C,D,answer)",
        )
    if settings.num_fewshot and not asks_questions:
        raise UserError("DSR474", "--num_fewshot is for questions put to a model that writes: --task choices")
    return task
