"""How is a four-way question worded for a model that writes? As the tasks of lm-evaluation-harness 0.4 do.

Not in log_likelihood.py, which scores them, so that the flags of `evaluate` need no import of transformers.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Form:
    """How a task of the harness writes a question."""

    description: str
    """Precedes everything; {subject} is the subject's name."""
    ask: str
    """The question up to its answer."""
    letters: bool = True
    """Whether the letters are scored, or the texts of the options."""


_LETTERED = "{question}\nA. {a}\nB. {b}\nC. {c}\nD. {d}\n"
# Character by character the harness's wording: its published scores depend on it.
FORMS = {
    "tmmluplus": Form("以下為{subject}的單選題，請提供正確答案的選項。\n\n", _LETTERED + "Answer:"),
    "cmmlu": Form("以下是关于{subject}的单项选择题，请直接给出正确答案的选项。\n\n", _LETTERED + "答案："),
    "mmlu": Form("The following are multiple choice questions (with answers) about {subject}.\n\n", _LETTERED + "Answer:"),
    "mmlu_continuation": Form(
        "The following are questions (with answers) about {subject}.\n\n", "Question: {question}\nAnswer:", letters=False
    ),
}
