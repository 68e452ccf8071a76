"""Who judges? The interface, and a judge that is a local model folder (judge_server.py: one behind a server)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from dsrecipes.errors import UserError
from dsrecipes.io.paths import user_path
from dsrecipes.runs.folder import RunFolder

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import BatchEncoding, PreTrainedTokenizerBase

TEMPERATURE = 0.7
"""For attempts after the first, which is greedy: a second greedy attempt would give the same reply."""


@dataclass(frozen=True)
class Reply:
    """What a judge wrote, and its cost."""

    text: str
    prompt_tokens: int | None
    """None where a server does not report it."""
    completion_tokens: int | None


class Judge(Protocol):
    """A model that compares two answers."""

    def ask(self, prompt: str, attempt: int, max_new_tokens: int) -> Reply:
        """Reply to a prompt; greedily at attempt 0, then sampled with the attempt as the seed."""
        ...


def judge_folder(name: str) -> Path:
    """Find the judge's folder: a path, or the hub name of the SmolLM2 that the package index carries.

    Raises:
        UserError: no such folder, or no model in it.
    """
    from dsrecipes.model.bundled import BUNDLED_MODEL
    from dsrecipes.model.weights_source import local_model

    # Only this hub name works offline; any other must be a folder.
    folder = user_path(local_model(name) if name == BUNDLED_MODEL else name)
    if not (folder / "config.json").is_file():
        hint = "; it is a run, of which `dsrecipes export` makes a folder" if RunFolder(folder).config.is_file() else ""
        raise UserError(
            "DSR500", f"--judge {name}: no folder with a model (config.json), and no http:// or https:// address{hint}"
        )
    return folder


class LocalJudge:
    """A model folder, which gets prompts through its chat template."""

    def __init__(self, folder: Path, by_likelihood: bool = False, device: str = "auto") -> None:
        """Load it.

        Args:
            folder: of the model and its tokenizer.
            by_likelihood: it writes nothing; the verdict is the likeliest of the three lines that a reply may end with,
                taken as the whole reply. So a small model that does not follow the form can judge, too.
            device: as --device takes it; auto is a GPU where there is one.

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
        target = find_device(device)
        self.folder, self.by_likelihood = folder, by_likelihood
        try:
            weight_files(folder)
            self.tokenizer: PreTrainedTokenizerBase = read_tokenizer(folder, trust_remote_code=False)
            if not self.tokenizer.chat_template:
                raise UserError(
                    "DSR501", f"--judge {folder}: its tokenizer has no chat template; take an instruction-tuned model"
                )
            model = AutoModelForCausalLM.from_pretrained(
                folder, dtype=best_dtype(target), use_safetensors=True, trust_remote_code=False
            )
        except UserError:
            raise
        except Exception as error:
            # tokenizers raises plain Exception.
            raise UserError("DSR502", f"--judge {folder}: cannot be loaded: {first_line(error)}") from error
        self.model: Any = prepare_for_inference(model, target)

    def ask(self, prompt: str, attempt: int, max_new_tokens: int) -> Reply:
        """Reply to a prompt.

        Raises:
            UserError: prompt and reply do not fit into the model's positions.
        """
        from dsrecipes.data.chat_template import chat_template
        from dsrecipes.inference.answers import positions

        try:
            text = chat_template(self.tokenizer).prompt([{"role": "user", "content": prompt}])
        except ValueError as error:
            raise UserError("DSR501", f"--judge {self.folder}: {error}") from error
        inputs = self.tokenizer(text, add_special_tokens=False, return_tensors="pt").to(self.model.device)
        count = inputs["input_ids"].shape[1]
        limit = positions(self.model)
        if limit and count + max_new_tokens > limit:
            raise UserError(
                "DSR503",
                f"--judge {self.folder}: a prompt of {count} tokens and a reply of {max_new_tokens} exceed its {limit} "
                "positions; give a smaller --max_new_tokens or --judge_tokens, a shorter --rubric, or another judge",
            )
        if self.by_likelihood:
            return self._likeliest(inputs["input_ids"])
        return self._write(inputs, attempt, max_new_tokens)

    def _write(self, inputs: BatchEncoding, attempt: int, max_new_tokens: int) -> Reply:
        import torch
        from transformers import GenerationConfig

        from dsrecipes.inference.answers import end_tokens
        from dsrecipes.model.task import pad_id

        count = inputs["input_ids"].shape[1]
        sampling: dict[str, Any] = {"do_sample": True, "temperature": TEMPERATURE} if attempt else {"do_sample": False}
        settings = GenerationConfig(
            max_new_tokens=max_new_tokens,
            eos_token_id=end_tokens(self.model, self.tokenizer, chat=True),
            pad_token_id=pad_id(self.tokenizer),
            **sampling,
        )
        # The seed of an attempt must not change the caller's random state.
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(attempt)
            written = self.model.generate(**inputs, generation_config=settings)[0, count:]
        return Reply(str(self.tokenizer.decode(written, skip_special_tokens=True)), count, len(written))

    def _likeliest(self, prompt: Tensor) -> Reply:
        """The three log-likelihoods, and the verdict of the greatest; its cost is three prompts and no reply.

        Args:
            prompt: ids (1, tokens).
        """
        import torch

        likelihoods = {}
        for verdict in ("A", "B", "TIE"):
            line = self.tokenizer(f"VERDICT: {verdict}", add_special_tokens=False, return_tensors="pt")["input_ids"]
            # Encoded apart and concatenated, so that the prompt's tokens are the same for each verdict.
            ids = torch.cat([prompt, line.to(prompt.device)], dim=1)
            with torch.no_grad():
                logits = self.model(input_ids=ids, use_cache=False).logits[0, prompt.shape[1] - 1 : -1]
            likelihoods[verdict] = logits.float().log_softmax(-1).gather(1, ids[0, prompt.shape[1] :, None]).sum().item()
        numbers = ", ".join(f"{verdict} {value:.4f}" for verdict, value in likelihoods.items())
        best = max(likelihoods, key=likelihoods.__getitem__)
        return Reply(f"log-likelihoods: {numbers}\nVERDICT: {best}", 3 * prompt.shape[1], 0)
