"""Say in plain words what went wrong with a name of the Hugging Face hub."""

from __future__ import annotations


def hub_error(error: BaseException, name: str, kind: str, local: str) -> str | None:
    """A hub failure in one sentence, or None where it is something else."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    names = {type(each).__name__ for each in chain}
    text = " ".join(str(each) for each in chain).lower()
    site = f"https://huggingface.co/{'datasets/' if kind == 'data set' else ''}{name}"
    if "repository not found" in text and "GatedRepoError" not in names:
        return f"{kind} {name}: there is no such name on the hub ({site}), or it is private and needs `hf auth login`; use {local}"
    if "GatedRepoError" in names or "gated repo" in text or "403 client error" in text or "401 client error" in text:
        return (
            f"{kind} {name} is gated or private: ask for access at {site}, then log in with `hf auth login`, or use {local}"
        )
    offline = {
        "OfflineModeIsEnabled",
        "LocalEntryNotFoundError",
        "ConnectionError",
        "ConnectError",
        "ConnectTimeout",
        "ReadTimeout",
        "MaxRetryError",
        "ProxyError",
    }
    if names & offline or "couldn't connect" in text or "offline mode" in text or "couldn't reach" in text:
        return f"{kind} {name} is a hub name, and the hub cannot be reached from here (no network, or HF_HUB_OFFLINE is set): use {local}"
    if (
        names & {"RepositoryNotFoundError", "DatasetNotFoundError", "RevisionNotFoundError"}
        or "not a valid model identifier" in text
    ):
        return f"{kind} {name}: there is no such name on the hub ({site}) and no such file or folder here"
    return None


def damaged() -> tuple[type[Exception], ...]:
    """What transformers, peft and tokenizers raise for files that are not what they should be."""
    from pickle import UnpicklingError

    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    return (
        OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, ImportError, RecursionError,
        SafetensorError, StrictDataclassError, UnpicklingError,
    )  # fmt: skip


def first_line(error: BaseException) -> str:
    """The first line of what an error says, and its kind where that says little."""
    line = next((line for line in str(error).splitlines() if line.strip()), "")
    plain = isinstance(error, (OSError, ValueError, ImportError)) and line
    return line if plain else f"{type(error).__name__}: {line}"
