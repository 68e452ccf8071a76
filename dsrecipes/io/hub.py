"""Why could a name not be loaded from the Hugging Face hub, and which errors mean damaged files?"""

from __future__ import annotations

_OFFLINE = {
    "OfflineModeIsEnabled",
    "LocalEntryNotFoundError",
    "ConnectionError",
    "ConnectError",
    "ConnectTimeout",
    "ReadTimeout",
    "MaxRetryError",
    "ProxyError",
}
"""Names of the errors that mean that the hub cannot be reached; importing their classes would import four libraries."""
_UNKNOWN = {"RepositoryNotFoundError", "DatasetNotFoundError", "RevisionNotFoundError"}


def hub_error(error: BaseException, name: str, kind: str, local: str) -> str | None:
    """Explain a failure of the hub in one sentence; None where the error has another cause.

    Args:
        error: what from_pretrained or load_dataset raised.
        name: the hub name that was requested.
        kind: `model`, `data set` or the like, for the message.
        local: what can be used instead, such as `a local folder`.
    """
    chain = _chain(error)
    names = {type(link).__name__ for link in chain}
    text = " ".join(str(link) for link in chain).lower()
    site = f"https://huggingface.co/{'datasets/' if kind == 'data set' else ''}{name}"
    # the hub answers 401 for missing names too, so that private ones stay secret: such an error may also say "gated"
    if "repository not found" in text and "GatedRepoError" not in names:
        return f"{kind} {name}: there is no such name on the hub ({site}), or it is private and needs `hf auth login`; use {local}"
    if "GatedRepoError" in names or any(part in text for part in ("gated repo", "403 client error", "401 client error")):
        return (
            f"{kind} {name} is gated or private: ask for access at {site}, then log in with `hf auth login`, or use {local}"
        )
    if names & _OFFLINE or any(part in text for part in ("couldn't connect", "offline mode", "couldn't reach")):
        return (
            f"{kind} {name} is a hub name, and the hub cannot be reached from here (no network, or HF_HUB_OFFLINE is set): "
            f"use {local}"
        )
    if names & _UNKNOWN or "not a valid model identifier" in text:
        return f"{kind} {name}: there is no such name on the hub ({site}) and no such file or folder here"
    return None


def _chain(error: BaseException) -> list[BaseException]:
    """List an error and its causes, outermost first."""
    # libraries wrap each other's errors, and only an inner one says that the network is missing
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    return chain


def damaged() -> tuple[type[Exception], ...]:
    """Return the classes of errors that transformers, peft and tokenizers raise for damaged files."""
    from pickle import UnpicklingError

    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    builtin = (
        OSError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        ArithmeticError,
        ImportError,
        RecursionError,
    )
    return (*builtin, SafetensorError, StrictDataclassError, UnpicklingError)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, preceded by its class where the text alone says little."""
    line = next((line for line in str(error).splitlines() if line.strip()), "")
    is_clear = isinstance(error, (OSError, ValueError, ImportError)) and line
    return line if is_clear else f"{type(error).__name__}: {line}"
