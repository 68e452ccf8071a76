"""Which of four options does a multiple-choice model choose?"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from dsrecipes.errors import UserError
from dsrecipes.inference.session import Session, Speaker, Terminal

if TYPE_CHECKING:
    from dsrecipes.inference.finished import FinishedRun

Json = dict[str, Any]
LETTERS = "ABCD"


def probabilities(run: FinishedRun, model: Any, question: str, options: list[str], adapter: bool = True) -> list[float]:
    """The probability of each of the four options; they add up to 1.

    Args:
        run: whose recipe encodes the question.
        model: in evaluation mode.
        question: without its options.
        options: four.
        adapter: False switches the adapter of a LoRA run off.

    Raises:
        UserError: an empty question, or not four options.
    """
    import torch

    from dsrecipes.model.tokenizer import check_prompt_ids

    if len(options) != len(LETTERS):
        raise UserError("DSR455", f"a question has four options, found {len(options)}")
    # format_row refuses a row without an answer; the probabilities do not depend on it.
    row = {"question": question, **dict(zip(LETTERS, options, strict=True)), "answer": LETTERS[0]}
    try:
        encoded = run.recipe.encode([run.recipe.format_row(row)], run.tokenizer, run.options)
    except (ValueError, KeyError, TypeError) as error:
        recipe = run.config.layers.recipe.name
        raise UserError("DSR455", f"recipe {recipe} cannot take this question: {error}") from error
    check_prompt_ids([token for text in encoded["input_ids"][0] for token in text], run.tokenizer, run.embedding_rows)
    texts = {name: column[0] for name, column in encoded.items() if isinstance(column[0], list)}
    padded = run.tokenizer.pad(texts, return_tensors="pt")
    inputs = {name: values[None].to(model.device) for name, values in padded.items()}
    with torch.no_grad(), contextlib.nullcontext() if adapter else model.disable_adapter():
        return model(**inputs).logits[0].float().softmax(-1).tolist()


class QuestionSession(Session):
    """A question and its options, in five lines or in one with tabs; each model gives its probabilities."""

    ask_with = "question> "

    def __init__(self, run: FinishedRun, speakers: list[Speaker], terminal: Terminal) -> None:
        super().__init__(run, speakers, terminal)
        self.results: list[Json] = []

    def take(self, line: str) -> None:
        """Read the options that are not in the line, and answer."""
        question, *options = line.split("\t")
        # A line with tabs must hold all options, so that a pipe can give one question per line.
        while len(options) < len(LETTERS) and "\t" not in line:
            option = self.terminal.read(f"{LETTERS[len(options)]}> ")
            if option is None:
                break
            options.append(option.strip())
        for speaker in self.speakers:
            shares = probabilities(self.run, speaker.model, question, options, speaker.adapter)
            best = LETTERS[shares.index(max(shares))]
            result = {"model": speaker.name, "question": question, "options": options}
            self.results.append(result | {"answer": best, "probabilities": shares})
            self._show(speaker.name, best, options, shares)

    def _show(self, name: str, best: str, options: list[str], shares: list[float]) -> None:
        if not self.terminal.interactive:
            numbers = " ".join(f"{letter}={share:.4f}" for letter, share in zip(LETTERS, shares, strict=True))
            self.terminal.write(f"{self.terminal.label(name)}{best} {numbers}\n")
            return
        self.terminal.write(f"{self.terminal.label(name)}{best}\n")
        for letter, option, share in zip(LETTERS, options, shares, strict=True):
            self.terminal.write(f"  {letter} {share:6.1%} {'#' * round(20 * share):<20}  {option}\n")

    def record(self) -> list[Json]:
        """The questions with the models' answers and probabilities."""
        return self.results

    def do_reset(self, argument: str) -> None:
        """Forget the questions."""
        self.results = []
