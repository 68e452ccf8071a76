"""Folders that a run may not use are refused."""

import pytest
from support.tiny import small_disk

from dsrecipes.config.layers import layer
from dsrecipes.config.parse import build_config
from dsrecipes.errors import UserError
from dsrecipes.launch.signals import StopSignals
from dsrecipes.runs.folder import check_output, default_path
from dsrecipes.train.run_folder import ClaimedFolder, claim_folder


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


def test_what_a_start_set_aside_survives_whatever_ends_it(tmp_path):
    config = build_config(layer({"recipe": "gpt2_clm", "profile": "starter"}))
    old = tmp_path / "checkpoints" / "checkpoint-5"
    old.mkdir(parents=True)
    (tmp_path / "config.yaml").write_text("recipe: gpt2_clm\n")
    signals = StopSignals(None)

    def start(overwrite: bool) -> ClaimedFolder:
        config.train["overwrite_output_dir"] = overwrite
        claimed = claim_folder(tmp_path, [], config, signals, main=True)
        (tmp_path / "ranks").mkdir()
        (tmp_path / "log.txt").write_text("starting")
        claimed.release()
        return claimed

    start(overwrite=True)  # killed while it loads, before it wrote its config.yaml
    check_output(tmp_path, resuming=False, overwrite=True)
    start(overwrite=True).restore()
    [kept] = tmp_path.glob(".replaced-*")
    assert (kept / "checkpoints" / "checkpoint-5").is_dir() and (tmp_path / "log.txt").is_file()
    # a run that did start, but could not delete all of what it had replaced
    old.mkdir(parents=True)
    start(overwrite=False).restore()
    assert old.is_dir() and kept.is_dir()
    start(overwrite=True).delete_replaced()
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != ".lock") == ["log.txt", "ranks"]


def test_a_folder_that_cannot_be_set_aside_stays_as_it_was(tmp_path):
    config = build_config(layer({"recipe": "gpt2_clm", "profile": "starter", "overwrite_output_dir": True}))
    (tmp_path / "config.yaml").write_text("recipe: gpt2_clm\n")
    (tmp_path / "log.txt").write_text("mine")
    with small_disk(tmp_path / "model"), pytest.raises(UserError, match="DSR360"):  # a mount point cannot be renamed
        claim_folder(tmp_path, [], config, StopSignals(None), main=True)
    assert {path.name for path in tmp_path.iterdir()} - {".lock"} == {"config.yaml", "log.txt", "model"}


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
