"""The run folder: whole checkpoints, which one to go on from, and folders that a run may not use."""

import json

import pytest
from tiny import small_disk

from dsrecipes.errors import UserError
from dsrecipes.runs.folder import (
    MANIFEST,
    RunFolder,
    check_output,
    default_path,
    find_checkpoint,
    is_whole,
    write_manifest,
)


def checkpoint(run, step, whole=True):
    path = run / "checkpoints" / f"checkpoint-{step}"
    (path / "global_step").mkdir(parents=True)
    (path / "weights.bin").write_bytes(b"w" * 100)
    (path / "global_step" / "optimizer.bin").write_bytes(b"o" * 50)
    if whole:
        write_manifest(path, {"ranks": 1, "zero": 2})
    return path


def test_a_checkpoint_is_whole_with_every_file_at_its_size(tmp_path):
    path = checkpoint(tmp_path, 5)
    assert is_whole(path) and json.loads((path / MANIFEST).read_text())["files"]["global_step/optimizer.bin"] == 50
    (path / "weights.bin").write_bytes(b"w" * 99)
    assert not is_whole(path)
    (path / "weights.bin").write_bytes(b"w" * 100)
    (path / "global_step" / "optimizer.bin").unlink()
    assert not is_whole(path) and not is_whole(tmp_path) and not is_whole(tmp_path / "none")
    for text in ("", "[]", '{"files": [1]}', '{"files"'):
        (path / MANIFEST).write_text(text)
        assert not is_whole(path)


def test_the_newest_whole_checkpoint_is_found(tmp_path):
    run = RunFolder(tmp_path)
    assert run.whole_checkpoints() == [] and find_checkpoint("auto", run) is None is find_checkpoint("auto", None)
    five, hundred = checkpoint(tmp_path, 5), checkpoint(tmp_path, 100)
    checkpoint(tmp_path, 200, whole=False)
    (tmp_path / "checkpoints" / "checkpoint-tmp").mkdir()
    assert run.whole_checkpoints() == [five, hundred]
    assert find_checkpoint("auto", run) == hundred == find_checkpoint("true", run) == find_checkpoint(str(tmp_path), None)
    assert find_checkpoint("step5", run) == five == find_checkpoint(str(five), None)


@pytest.mark.parametrize(
    ("asked", "parts"),
    [
        ("step7", ["checkpoint-7", "does not exist", "step5"]),
        ("step200", ["checkpoint-200", "is not whole", "cut off", "step5"]),
        ("no/such", ["no/such", "does not exist", "auto"]),
    ],
)
def test_a_checkpoint_that_cannot_be_taken(tmp_path, asked, parts):
    checkpoint(tmp_path, 5), checkpoint(tmp_path, 200, whole=False)
    with pytest.raises(UserError) as error:
        find_checkpoint(asked, RunFolder(tmp_path))
    assert all(part in str(error.value) for part in parts), error.value


def test_a_step_needs_a_run():
    with pytest.raises(UserError, match="--output_dir"):
        find_checkpoint("step5", None)


def test_an_existing_folder_is_never_overwritten_untold(tmp_path):
    run = tmp_path / "run"
    check_output(run, resuming=False, overwrite=False)
    run.mkdir()
    check_output(run, resuming=False, overwrite=False)  # empty
    (run / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"exists and is not empty.*--resume_from_checkpoint auto.*--overwrite_output_dir"):
        check_output(run, resuming=False, overwrite=False)
    check_output(run, resuming=True, overwrite=False)
    with pytest.raises(UserError, match=r"is no run folder \(no config.yaml"):
        check_output(run, resuming=False, overwrite=True)
    assert (run / "notes.txt").exists()
    (run / "config.yaml").write_text("recipe: gpt2_clm\n")
    check_output(run, resuming=False, overwrite=True)
    assert not run.exists()
    run.write_text("a file")
    with pytest.raises(UserError, match="there is a file of this name"):
        check_output(run, resuming=False, overwrite=False)
    with pytest.raises(UserError, match="is a file"):
        check_output(run / "below", resuming=False, overwrite=False)


def test_a_full_disk_is_told_before_anything_starts(tmp_path):
    with small_disk(tmp_path / "disk") as disk, pytest.raises(UserError, match=r"no space left on the disk \(\d MB free\)"):
        check_output(disk / "run", resuming=False, overwrite=False)


def test_a_folder_that_cannot_be_written(tmp_path):
    with (
        small_disk(tmp_path / "disk", "size=100m,ro") as disk,
        pytest.raises(UserError, match="no permission to write into"),
    ):
        check_output(disk / "run", resuming=False, overwrite=False)


def test_default_paths_do_not_meet(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = []
    for _ in range(3):
        paths.append(default_path("gpt2_clm"))
        paths[-1].mkdir(parents=True)
    assert len(set(paths)) == 3 and all(path.parts[:2] == ("runs", "gpt2_clm") for path in paths)
