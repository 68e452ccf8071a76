"""Who judges: a local model folder, or a server that speaks OpenAI's chat completions."""

from __future__ import annotations

import contextlib
import email.utils
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

from dsrecipes.errors import UserError

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError
    from torch import Tensor
    from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

KEY = "DSRECIPES_JUDGE_KEY"
"""The environment variable with the server's key. No other key or token of the environment goes to a server."""
TEMPERATURE = 0.7
"""Of an attempt after the first, which is greedy."""
_WAITS = (1, 2, 4, 8, 16)
"""Seconds before a request that failed is sent again."""
_LONGEST_WAIT = 300


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


def is_url(judge: str) -> bool:
    """Whether this names a server."""
    return judge.startswith(("http://", "https://"))


def fingerprint(folder: Path) -> str:
    """A hash of the files directly in a folder: of each its name, size, first and last MiB."""
    digest = hashlib.sha256()
    for path in sorted(each for each in folder.iterdir() if each.is_file()):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(1 << 20))
            file.seek(max(0, size - (1 << 20)))
            digest.update(file.read())
    return digest.hexdigest()


def judge_folder(name: str) -> Path:
    """The judge's folder: a path, or the hub name of the SmolLM2 that the package index carries.

    Raises:
        UserError: no such folder, or no chat model in it.
    """
    from dsrecipes.model.hub import CARRIED, local_model

    folder = Path(local_model(name) if name == CARRIED else name).expanduser()
    if not (folder / "config.json").is_file():
        hint = "; it is a run: `dsrecipes export` makes a folder of it" if (folder / "config.yaml").is_file() else ""
        raise UserError(f"--judge {name}: no folder with a model (config.json), and no http:// or https:// address{hint}")
    return folder


class LocalJudge:
    """A model folder, asked through its chat template."""

    def __init__(self, folder: Path, by_likelihood: bool = False) -> None:
        """Load it: on the GPU where there is one.

        Args:
            by_likelihood: it writes nothing; the verdict is the likeliest of the three lines that a reply may end with,
                as the model's whole reply. A small model that never keeps to the form has an opinion then.

        Raises:
            UserError: no causal language model, no chat template, damaged files.
        """
        import torch
        from safetensors import SafetensorError
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        gpu = torch.cuda.is_available()
        dtype = torch.bfloat16 if gpu and torch.cuda.is_bf16_supported(including_emulation=False) else None
        self.folder, self.by_likelihood = folder, by_likelihood
        try:
            self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
            if not self.tokenizer.chat_template:
                raise UserError(f"--judge {folder}: its tokenizer has no chat template; take an instruction-tuned model")
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or (torch.float16 if gpu else torch.float32))
        except (OSError, ValueError, SafetensorError) as error:
            raise UserError(f"--judge {folder}: cannot be loaded: {str(error).splitlines()[0]}") from error
        self.model: PreTrainedModel = model.to("cuda" if gpu else "cpu").eval()

    def ask(self, prompt: str, attempt: int, max_new_tokens: int) -> Reply:
        """A reply.

        Raises:
            UserError: prompt and reply have no room in the model's positions.
        """
        asked = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
        ).to(self.model.device)
        count = asked["input_ids"].shape[1]
        room = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
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

        from dsrecipes.model.load import pad_id

        count = asked["input_ids"].shape[1]
        own = self.model.generation_config
        sampling: dict[str, Any] = {"do_sample": True, "temperature": TEMPERATURE} if attempt else {"do_sample": False}
        settings = GenerationConfig(
            max_new_tokens=max_new_tokens, eos_token_id=(own and own.eos_token_id) or self.tokenizer.eos_token_id,
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


class ServerJudge:
    """An OpenAI-compatible server, through huggingface_hub's client."""

    def __init__(self, url: str, model: str | None, timeout: float) -> None:
        """Nothing is sent yet.

        Raises:
            UserError: an address with a key or a query in it, or a key that no header can hold.
        """
        import huggingface_hub

        try:
            parts = urlsplit(url)
            usable = parts.hostname and parts.port != 0 and not (parts.username or parts.password or parts.query)
        except ValueError:
            usable = False
        if not usable:
            raise UserError(f"--judge: give http(s)://HOST[:PORT]/v1 without user, password or query; a key goes into {KEY}")
        self.url, self.model, self.timeout = url.rstrip("/"), model, timeout
        self._key = os.environ.get(KEY, "").strip()
        if not (self._key.isascii() and self._key.isprintable()):
            raise UserError(f"{KEY}: holds a character that no HTTP header can; set it again")
        # without a key the client would send the user's Hugging Face token to whatever server this is
        self._client = huggingface_hub.InferenceClient(base_url=url, api_key=self._key or "none", timeout=timeout)

    def ask(self, prompt: str, attempt: int, max_new_tokens: int) -> Reply:
        """A reply; what may pass (no connection, no answer in time, 429, 5xx) is tried again after a while.

        Raises:
            UserError: the server refuses, or still fails.
        """
        for pause in (*_WAITS, None):
            try:
                return self._send(prompt, attempt, max_new_tokens)
            except _Passing as fault:
                wait = fault.retry_after if fault.retry_after is not None else pause
                if pause is None or wait is None or wait > _LONGEST_WAIT:
                    told = f"; it asks to wait {wait:.0f} s" if wait is not None and wait > _LONGEST_WAIT else ""
                    raise UserError(
                        f"--judge {self.url}: {fault}{told}. What was judged is kept: the same command goes on from there"
                    ) from None
                print(f"judge: {fault}; trying again in {wait:.0f} s", file=sys.stderr)
                time.sleep(wait)
        raise AssertionError

    def _send(self, prompt: str, attempt: int, max_new_tokens: int) -> Reply:
        import httpx2
        from huggingface_hub.errors import HfHubHTTPError

        sampling = {"temperature": TEMPERATURE, "seed": attempt} if attempt else {"temperature": 0.0}
        try:
            with _hub_switch_lifted():
                told = self._client.chat_completion(
                    [{"role": "user", "content": prompt}], model=self.model, max_tokens=max_new_tokens, **sampling
                )
            usage = told.usage
            text = told.choices[0].message.content or ""
            counts = (usage.prompt_tokens, usage.completion_tokens) if usage else (None, None)
            return Reply(self._without_key(text), *counts)
        except HfHubHTTPError as error:
            raise self._explained(error) from None
        except (httpx2.TransportError, TimeoutError) as error:
            what = "no answer in time" if isinstance(error, (httpx2.TimeoutException, TimeoutError)) else "no connection"
            raise _Passing(f"{what} ({self._without_key(str(error)) or type(error).__name__})") from None
        except (ValueError, TypeError, AttributeError, LookupError):
            raise UserError(
                f"--judge {self.url}: its answer is no chat completion; is this the address of an API (.../v1)?"
            ) from None

    def _explained(self, error: HfHubHTTPError) -> UserError | _Passing:
        """A status that may pass, or a refusal in the server's words."""
        status = error.response.status_code
        what = f"{status} {error.response.reason_phrase}".strip()
        told = self._without_key(_message(error.response.text))
        what += f": {told}" if told else ""
        if status in (408, 429) or status >= 500:
            return _Passing(what, _retry_after(error.response.headers.get("retry-after")))
        if status in (401, 403):
            what += f" (the key is taken from {KEY}, which is {'set' if self._key else 'not set'})"
        if status in (400, 404, 422):
            what += " (--judge_model names the model, the address ends in /v1)"
        return UserError(f"--judge {self.url}: {what}")

    def _without_key(self, text: str) -> str:
        """A server may send back what it was sent."""
        return text.replace(self._key, "***") if self._key else text


class _Passing(Exception):
    """A fault that may pass."""

    def __init__(self, what: str, retry_after: float | None = None) -> None:
        super().__init__(what)
        self.retry_after = retry_after


def _message(body: str) -> str:
    """The message in an error's body, in one line of at most 300 characters."""
    try:
        told = json.loads(body)
        told = told.get("error", told.get("detail", told.get("message", told)))
        told = told.get("message", told) if isinstance(told, dict) else told
    except (ValueError, AttributeError):
        told = "" if "<html" in body.lower() else body
    return " ".join(str(told).split())[:300]


def _retry_after(header: str | None) -> float | None:
    """Seconds to wait, of a number or an HTTP date."""
    if not header:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    except ValueError:
        return None


@contextlib.contextmanager
def _hub_switch_lifted() -> Iterator[None]:
    """HF_HUB_OFFLINE keeps requests from the hub; the hub's client would hold back those to a judge as well."""
    from huggingface_hub import constants, get_session

    if not constants.is_offline_mode():
        yield
        return
    session = get_session()
    before = session.event_hooks
    session.event_hooks = {**before, "request": []}
    try:
        yield
    finally:
        session.event_hooks = before
