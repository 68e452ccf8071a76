"""How does a judge behind an OpenAI-compatible server reply?

huggingface_hub's InferenceClient sends the requests and reads the replies. What it lacks is here: it does not retry, its
HTTP errors do not show the server's message alone, and without a key it would send the user's Hugging Face token.
"""

from __future__ import annotations

import contextlib
import email.utils
import json
import os
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from dsrecipes.errors import UserError
from dsrecipes.evaluation.judge_models import TEMPERATURE, Reply

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

KEY = "DSRECIPES_JUDGE_KEY"
"""The environment variable with the server's key. No other key or token of the environment goes to a server."""
_WAITS = (1, 2, 4, 8, 16)
"""Seconds before each retry."""
_LONGEST_WAIT = 300
"""Seconds; a server that asks for more, as a daily limit does, ends the command, which can be resumed."""


def is_url(judge: str) -> bool:
    """Whether this names a server."""
    return judge.startswith(("http://", "https://"))


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
            raise UserError(
                "DSR510", f"--judge: give http(s)://HOST[:PORT]/v1 without user, password or query; a key goes into {KEY}"
            )
        self.url, self.model, self.timeout = url.rstrip("/"), model, timeout
        self._key = os.environ.get(KEY, "").strip()
        if not (self._key.isascii() and self._key.isprintable()):
            raise UserError("DSR511", f"{KEY}: has a character that no HTTP header can have; set it again")
        # Without a key the client would send the user's Hugging Face token to this server.
        self._client = huggingface_hub.InferenceClient(base_url=url, api_key=self._key or "none", timeout=timeout)

    def ask(self, prompt: str, attempt: int, max_new_tokens: int) -> Reply:
        """Reply to a prompt; transient faults (no connection, no answer in time, 429, 5xx) are retried after a while.

        Raises:
            UserError: the server refuses, or still fails.
        """
        # None marks the last attempt, which no retry follows.
        for pause in (*_WAITS, None):
            try:
                return self._send(prompt, attempt, max_new_tokens)
            except _TransientError as error:
                wait = error.retry_after if error.retry_after is not None else pause
                if pause is None or wait is None or wait > _LONGEST_WAIT:
                    demand = f"; it asks to wait {wait:.0f} s" if wait is not None and wait > _LONGEST_WAIT else ""
                    raise UserError(
                        "DSR512", f"--judge {self.url}: {error}{demand}. What was judged is kept: the same command resumes"
                    ) from None
                print(f"judge: {error}; retrying in {wait:.0f} s", file=sys.stderr)
                time.sleep(wait)
        raise AssertionError("the last pause is None")

    def _send(self, prompt: str, attempt: int, max_new_tokens: int) -> Reply:
        import httpx2
        from huggingface_hub.errors import HfHubHTTPError

        sampling: dict[str, Any] = {"temperature": TEMPERATURE, "seed": attempt} if attempt else {"temperature": 0.0}
        try:
            with _offline_switch_lifted():
                completion = self._client.chat_completion(
                    [{"role": "user", "content": prompt}], model=self.model, max_tokens=max_new_tokens, **sampling
                )
            # Some servers leave it out.
            usage = completion.usage
            text = completion.choices[0].message.content or ""
            counts = (usage.prompt_tokens, usage.completion_tokens) if usage else (None, None)
            return Reply(self._without_key(text), *counts)
        except HfHubHTTPError as error:
            raise self._classified(error) from None
        except (httpx2.TransportError, TimeoutError) as error:
            timed_out = isinstance(error, (httpx2.TimeoutException, TimeoutError))
            fault = "no answer in time" if timed_out else "no connection"
            raise _TransientError(f"{fault} ({self._without_key(str(error)) or type(error).__name__})") from None
        except (ValueError, TypeError, AttributeError, LookupError):
            raise UserError(
                "DSR514", f"--judge {self.url}: its answer is no chat completion; is this the address of an API (.../v1)?"
            ) from None

    def _classified(self, error: HfHubHTTPError) -> UserError | _TransientError:
        """A transient status, or a refusal with the server's message."""
        status = error.response.status_code
        fault = f"{status} {error.response.reason_phrase}".strip()
        message = self._without_key(_message(error.response.text))
        fault += f": {message}" if message else ""
        if status in (408, 429) or status >= 500:
            return _TransientError(fault, _retry_after(error.response.headers.get("retry-after")))
        if status in (401, 403):
            fault += f" (the key is taken from {KEY}, which is {'set' if self._key else 'not set'})"
        if status in (400, 404, 422):
            fault += " (--judge_model names the model, the address ends in /v1)"
        return UserError("DSR513", f"--judge {self.url}: {fault}")

    def _without_key(self, text: str) -> str:
        """Hide the key, which a server may send back."""
        return text.replace(self._key, "***") if self._key else text


class _TransientError(Exception):
    """A fault after which a retry may succeed; `retry_after`: seconds that the server asks for."""

    def __init__(self, fault: str, retry_after: float | None = None) -> None:
        super().__init__(fault)
        self.retry_after = retry_after


def _message(body: str) -> str:
    """The message in an error's body, in one line of at most 300 characters."""
    try:
        error = json.loads(body)
        error = error.get("error", error.get("detail", error.get("message", error)))
        error = error.get("message", error) if isinstance(error, dict) else error
    except (ValueError, AttributeError):
        # A proxy may answer with an HTML page instead of a message.
        error = "" if "<html" in body.lower() else body
    return " ".join(str(error).split())[:300]


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
def _offline_switch_lifted() -> Iterator[None]:
    """Let a request pass while HF_HUB_OFFLINE is set: it is about the hub, but the client would stop any request."""
    from huggingface_hub import constants, get_session

    if not constants.is_offline_mode():
        yield
        return
    # The session is shared with all of huggingface_hub, so its hooks are restored afterwards.
    session = get_session()
    before = session.event_hooks
    session.event_hooks = {**before, "request": []}
    try:
        yield
    finally:
        session.event_hooks = before
