"""Who judges: a local model folder (a server: judge_server.py)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from dsrecipes.errors import UserError
from dsrecipes.io.paths import user_path
from dsrecipes.runs.folder import RunFolder

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

TEMPERATURE = 0.7
"""Of an attempt after the first, which is greedy."""


@dataclass(frozen=True)
class Reply:
    """What a judge wrote, and its cost in tokens (None where a server does not tell it)."""

    text: str
    prompt_tokens: int | None
    completion_tokens: int | None


class Judge(Protocol):
    """Both kinds."""

    def ask(self, prompt: str, attempt: int, max_new_tokens: int) -> Reply:
        """A reply; greedy at attempt 0, sampled with the attempt as its seed after that."""
        ...


def judge_folder(name: str) -> Path:
    """The judge's folder: a path, or the hub name of the SmolLM2 that the package index carries.

    Raises:
        UserError: no such folder, or no chat model in it.
    """
    from dsrecipes.model.bundled import BUNDLED_MODEL
    from dsrecipes.model.weights_source import local_model

    folder = user_path(local_model(name) if name == BUNDLED_MODEL else name)
    if not (folder / "config.json").is_file():
        hint = "; it is a run: `dsrecipes export` makes a folder of it" if RunFolder(folder).config.is_file() else ""
        raise UserError(f"--judge {name}: no folder with a model (config.json), and no http:// or https:// address{hint}")
    return folder


class LocalJudge:
    """A model folder, asked through its chat template."""

    def __init__(self, folder: Path, by_likelihood: bool = False, device: str = "auto") -> None:
        """Load it.

        Args:
            device: as --device takes it; auto is a GPU where there is one.
            by_likelihood: it writes nothing; the verdict is the likeliest of the three lines that a reply may end with,
                as the model's whole reply. A small model that never keeps to the form has an opinion then.

        Raises:
            UserError: no causal language model, no chat template, damaged files.
        """
        from transformers import AutoModelForCausalLM
        from transformers.utils.logging import disable_progress_bar

        from dsrecipes.inference.device import find_device
        from dsrecipes.inference.finished import best_dtype
        from dsrecipes.io.hub import first_line
        from dsrecipes.model.load import prepare_for_inference
        from dsrecipes.model.tokenizer import read_tokenizer
        from dsrecipes.runs.weights import weight_files

        disable_progress_bar()
        place = find_device(device)
        self.folder, self.by_likelihood = folder, by_likelihood
        try:
            weight_files(folder)
            self.tokenizer: PreTrainedTokenizerBase = read_tokenizer(folder, trust_remote_code=False)
            if not self.tokenizer.chat_template:
                raise UserError(f"--judge {folder}: its tokenizer has no chat template; take an instruction-tuned model")
            model = AutoModelForCausalLM.from_pretrained(
                folder, dtype=best_dtype(place), use_safetensors=True, trust_remote_code=False
            )
        except UserError:
            raise
        except Exception as error:  # tokenizers raises no narrower one
            raise UserError(f"--judge {folder}: cannot be loaded: {first_line(error)}") from error
        self.model: PreTrainedModel = prepare_for_inference(model, place)

    def ask(self, prompt: str, attempt: int, max_new_tokens: int) -> Reply:
        """A reply.

        Raises:
            UserError: prompt and reply have no room in the model's positions.
        """
        from dsrecipes.data.chat_template import chat_template
        from dsrecipes.inference.answers import positions

        try:
            text = chat_template(self.tokenizer).prompt([{"role": "user", "content": prompt}])
        except ValueError as error:
            raise UserError(f"--judge {self.folder}: {error}") from error
        asked = self.tokenizer(text, add_special_tokens=False, return_tensors="pt").to(self.model.device)
        count = asked["input_ids"].shape[1]
        room = positions(self.model)
        if room and count + max_new_tokens > room:
            raise UserError(
                f"--judge {self.folder}: a prompt of {count} tokens and a reply of {max_new_tokens} pass its {room} "
                "positions; give a smaller --max_new_tokens or --judge_tokens, a shorter --rubric, or another judge"
            )
        if self.by_likelihood:
            return self._weigh(asked["input_ids"])
        return self._write(asked, attempt, max_new_tokens)

    def _write(self, asked: BatchEncoding, attempt: int, max_new_tokens: int) -> Reply:
        import torch
        from transformers import GenerationConfig

        from dsrecipes.inference.answers import end_tokens
        from dsrecipes.model.task import pad_id

        count = asked["input_ids"].shape[1]
        sampling: dict[str, Any] = {"do_sample": True, "temperature": TEMPERATURE} if attempt else {"do_sample": False}
        settings = GenerationConfig(
            max_new_tokens=max_new_tokens, eos_token_id=end_tokens(self.model, self.tokenizer, chat=True),
            pad_token_id=pad_id(self.tokenizer), **sampling,
        )  # fmt: skip
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(attempt)
            written = self.model.generate(**asked, generation_config=settings)[0, count:]
        return Reply(self.tokenizer.decode(written, skip_special_tokens=True), count, len(written))

    def _weigh(self, prompt: Tensor) -> Reply:
        """The three log-likelihoods, and the verdict of the greatest; its cost is three prompts and no reply."""
        import torch

        found = {}
        for verdict in ("A", "B", "TIE"):
            line = self.tokenizer(f"VERDICT: {verdict}", add_special_tokens=False, return_tensors="pt")["input_ids"]
            ids = torch.cat([prompt, line.to(prompt.device)], dim=1)
            with torch.no_grad():
                logits = self.model(input_ids=ids, use_cache=False).logits[0, prompt.shape[1] - 1 : -1]
            found[verdict] = logits.float().log_softmax(-1).gather(1, ids[0, prompt.shape[1] :, None]).sum().item()
        told = ", ".join(f"{verdict} {value:.4f}" for verdict, value in found.items())
        return Reply(f"log-likelihoods: {told}\nVERDICT: {max(found, key=found.__getitem__)}", 3 * prompt.shape[1], 0)
