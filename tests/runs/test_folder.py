"""Folders that a run may not use are refused."""

import pytest
from support.tiny import small_disk

from dsrecipes.errors import UserError
from dsrecipes.runs.folder import check_output, default_path


def test_an_existing_folder_is_overwritten_only_on_request(tmp_path):
    run = tmp_path / "run"
    check_output(run, resuming=False, overwrite=False)
    run.mkdir()
    check_output(run, resuming=False, overwrite=False)  # empty
    (run / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"--resume_from_checkpoint auto.*--overwrite_output_dir.*DSR335"):
        check_output(run, resuming=False, overwrite=False)
    check_output(run, resuming=True, overwrite=False)
    with pytest.raises(UserError, match=r"no config.yaml.*DSR336"):
        check_output(run, resuming=False, overwrite=True)
    assert (run / "notes.txt").exists()
    (run / "config.yaml").write_text("recipe: gpt2_clm\n")
    check_output(run, resuming=False, overwrite=True)
    assert (run / "notes.txt").exists(), "deleted only once the run can start"
    run = tmp_path / "file"
    run.write_text("a file")
    with pytest.raises(UserError, match="DSR337"):
        check_output(run, resuming=False, overwrite=False)
    with pytest.raises(UserError, match="file is a file.*DSR337"):
        check_output(run / "below", resuming=False, overwrite=False)


def test_a_full_disk_is_refused_before_anything_starts(tmp_path):
    with small_disk(tmp_path / "disk") as disk, pytest.raises(UserError, match=r"\(\d MB free\).*DSR338"):
        check_output(disk / "run", resuming=False, overwrite=False)


def test_a_folder_that_cannot_be_written(tmp_path):
    with (
        small_disk(tmp_path / "disk", "size=100m,ro") as disk,
        pytest.raises(UserError, match="no permission.*DSR337"),
    ):
        check_output(disk / "run", resuming=False, overwrite=False)


def test_default_paths_do_not_meet(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = []
    for _ in range(3):
        paths.append(default_path("gpt2_clm"))
        paths[-1].mkdir(parents=True)
    assert len(set(paths)) == 3 and all(path.parts[:2] == ("runs", "gpt2_clm") for path in paths)
