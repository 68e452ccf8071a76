"""What a resume compares: values instead of words, and no source text of the library."""

import json
import sys
import types

import pytest

from dsrecipes.errors import UserError
from dsrecipes.io.disk import write_whole
from dsrecipes.runs.checkpoint_manifest import write_manifest
from dsrecipes.train.identity import STATE_VERSION, _assignments, _own_code, _without_words, check_identity

CODE = """
class Mine:
    def encode(self, rows):
        return [row["text"] for row in rows]
"""


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint with the given terms."""

    def make(terms, file="rng_state.pth"):
        folder = tmp_path / "checkpoint-4"
        folder.mkdir(exist_ok=True)
        (folder / file).write_bytes(b"x")
        write_manifest(folder, {file: (1, "0")}, {"ranks": 1}, terms)
        return folder

    return make


def test_a_checkpoint_without_a_state_version_is_refused_with_what_to_do(checkpoint):
    folder = checkpoint({"recipe": "gpt2_clm", "code": "dsrecipes 0.1.0 (3f2a)"})
    with pytest.raises(UserError, match=r"earlier dsrecipes.*--model_name_or_path \[DSR375\]") as error:
        check_identity(folder, {"recipe": "gpt2_clm", "state_version": STATE_VERSION}, ["code", "state_version"])
    assert str(folder) in str(error.value)


def test_a_checkpoint_of_the_model_alone_is_refused(checkpoint):
    with pytest.raises(UserError, match="DSR374"):
        check_identity(checkpoint({"state_version": 1}, "model.safetensors"), {"state_version": 1}, [])


def test_differences_are_named_and_can_be_accepted(checkpoint):
    before = {"state_version": 1, "seed": 1, "data": "3f2a"}
    folder, now = checkpoint(before), {"state_version": 2, "seed": 1, "data": "9c41"}
    with pytest.raises(UserError, match=r"state_version is 1 there and 2 here; data is 3f2a there and 9c41 here.*DSR376"):
        check_identity(folder, now, [])
    assert check_identity(folder, now, ["data", "state_version", "seed"]) == ["data", "state_version"]
    with pytest.raises(UserError, match=r"sede: no such term \(did you mean seed\?\).*DSR377"):
        check_identity(folder, now, ["sede"])
    assert check_identity(folder, before, []) == []


def test_other_words_of_the_same_code_are_the_same():
    worded = CODE.replace("Mine:", 'Mine:\n    """Rows of mine."""\n').replace("rows):", "rows):  # the texts")
    assert _without_words(worded) == _without_words(CODE)
    assert _without_words(CODE.replace("text", "title")) != _without_words(CODE)
    assert _without_words("def a():\n    'nothing'\n") == "def a():\n    pass"


def test_only_code_of_a_users_own_file_counts(tmp_path, monkeypatch):
    from dsrecipes.recipes.gpt2_clm import Gpt2Clm

    assert _own_code(Gpt2Clm) is None
    path = tmp_path / "mine.py"
    hashes = []
    for text in (CODE, CODE + "# more words\n", CODE.replace("text", "title")):
        write_whole(path, text)
        module = types.ModuleType("mine")
        module.__file__ = str(path)
        monkeypatch.setitem(sys.modules, "mine", module)
        exec(compile(text, str(path), "exec"), vars(module))
        # inspect.getsource reads through this cache, which would return the first text
        __import__("linecache").checkcache(str(path))
        hashes.append(_own_code(module.Mine))
    assert hashes[0] == hashes[1] != hashes[2]


def test_optimizer_arguments_are_compared_as_values():
    assert _assignments("momentum=0.9, nesterov=True") == _assignments("nesterov=True,momentum=0.9")
    assert _assignments(None) is _assignments("") is None
    json.dumps(_assignments("a=1"))
