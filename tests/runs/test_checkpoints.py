"""Checkpoints: one that differs from what was saved, or would run code, is reported and not loaded."""

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dsrecipes.errors import UserError
from dsrecipes.runs.checkpoint_integrity import find_damage, first_intact
from dsrecipes.runs.checkpoint_manifest import MANIFEST, find_problem, hash_files, is_complete, list_files, write_manifest
from dsrecipes.runs.folder import RunFolder, find_checkpoints

MADE_BY, CONTRACT = {"ranks": 1, "zero": 2}, {"seed": 42}


def checkpoint(run: Path, step: int, whole: bool = True) -> Path:
    """A checkpoint with one file of each kind that a real one has."""
    path = run / "checkpoints" / f"checkpoint-{step}"
    (path / f"global_step{step}").mkdir(parents=True)
    save_file({"weight": torch.arange(64.0)}, path / "model.safetensors")
    torch.save({"exp_avg": torch.ones(64)}, path / f"global_step{step}" / "bf16_optim_states.pt")
    torch.save({"numpy": np.random.default_rng(0).bit_generator.state, "cpu": torch.get_rng_state()}, path / "rng_state.pth")
    (path / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    (path / "latest").write_text(f"global_step{step}")
    if whole:
        write_manifest(path, hash_files(path, list_files(path)), MADE_BY, CONTRACT)
    return path


def flip(path: Path, position: int) -> None:
    """Flip one bit of a byte."""
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


KINDS = ("model.safetensors", "global_step5/bf16_optim_states.pt", "rng_state.pth", "trainer_state.json", "latest", MANIFEST)


@pytest.mark.parametrize("name", KINDS)
def test_one_bit_of_any_file_is_found_and_the_file_named(tmp_path, name):
    path = checkpoint(tmp_path, 5)
    assert is_complete(path) and find_damage(path) is None
    middle = (path / name).stat().st_size // 2
    flip(path / name, middle)
    problem = find_problem(path) or find_damage(path)
    assert problem is not None and name in problem
    flip(path / name, middle)
    assert is_complete(path) and find_damage(path) is None


def test_each_rank_checks_a_part_of_the_files_and_together_all(tmp_path):
    path = checkpoint(tmp_path, 5)
    for name in list_files(path):
        flip(path / name, 3)
        problems = [find_damage(path, part, 2) for part in range(2)]
        (problem,) = [text for text in problems if text is not None]
        assert name in problem
        flip(path / name, 3)


@pytest.mark.parametrize("name", KINDS)
def test_a_missing_shorter_or_further_file_is_found_by_its_name_and_size(tmp_path, name):
    path = checkpoint(tmp_path, 5)
    with (path / name).open("rb+") as file:
        file.truncate((path / name).stat().st_size // 2)
    assert name in find_problem(path)
    (path / name).unlink()
    assert f"{name} is missing" in find_problem(path)


def test_a_file_that_was_not_saved_is_found(tmp_path):
    path = checkpoint(tmp_path, 5)
    torch.save({}, path / "scaler.pt")
    assert find_problem(path) == f"scaler.pt is not in its {MANIFEST.split('.')[0]}"
    (path / "scaler.pt").unlink()
    # a link passes a check that looks at regular files only
    (path / "scheduler.pt").symlink_to(path / "latest")
    assert "scheduler.pt" in find_problem(path)


@pytest.mark.parametrize(
    "text", ["", "[]", '{"files": [1]}', '{"files"', '{"checksum": 1}', "[" * 5000, '{"checksum": "x"}']
)
def test_a_damaged_manifest_is_refused(tmp_path, text):
    path = checkpoint(tmp_path, 5)
    (path / MANIFEST).write_text(text)
    assert MANIFEST in find_problem(path)


class Canary:
    """A pickle of it makes a folder when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth", "training_args.bin", "global_step5/x_optim_states.pt"])
def test_a_pickle_that_runs_code_is_refused_though_its_manifest_matches(tmp_path, name):
    path = checkpoint(tmp_path, 5)
    torch.save({"state": Canary(tmp_path / "canary")}, path / name)
    write_manifest(path, hash_files(path, list_files(path)), MADE_BY, CONTRACT)
    assert is_complete(path)
    assert find_damage(path) == f"{name} would run posix.mkdir when it is loaded"
    # a bare pickle, without the zip format of torch.save
    (path / name).write_bytes(pickle.dumps(Canary(tmp_path / "canary")))
    write_manifest(path, hash_files(path, list_files(path)), MADE_BY, CONTRACT)
    assert "is not a file of torch.save" in find_damage(path)
    assert not (tmp_path / "canary").exists()


def test_the_newest_complete_checkpoint_is_taken_and_damaged_ones_are_reported(tmp_path):
    run, reports = RunFolder(tmp_path), []
    assert find_checkpoints("auto", run, reports.append) == [] == find_checkpoints("auto", None, reports.append)
    five, hundred, newest = checkpoint(tmp_path, 5), checkpoint(tmp_path, 100), checkpoint(tmp_path, 150)
    checkpoint(tmp_path, 200, whole=False)
    (tmp_path / "checkpoints" / "writing" / "checkpoint-250").mkdir(parents=True)
    assert run.complete_checkpoints() == [five, hundred, newest]
    for requested in ("auto", "true", str(tmp_path)):
        assert find_checkpoints(requested, run, reports.append) == [newest, hundred, five]
    assert len(reports) == 3 and "checkpoint-200: manifest.json is missing" in reports[0] and "[DSR343]" in reports[0]
    assert find_checkpoints("step5", run, reports.append) == [five] == find_checkpoints(str(five), None, reports.append)
    flip(newest / "model.safetensors", 100)
    reports.clear()
    assert first_intact([newest, hundred, five], find_damage, reports.append) == hundred
    assert len(reports) == 1 and "checkpoint-150: model.safetensors is damaged" in reports[0]
    with pytest.raises(UserError, match=r"checkpoint-150: model.safetensors is damaged.*DSR340"):
        first_intact([newest], find_damage, reports.append)
    assert newest.is_dir() and (tmp_path / "checkpoints" / "checkpoint-200").is_dir()


@pytest.mark.parametrize(
    ("requested", "parts"),
    [
        ("step7", ["checkpoint-7", "does not exist", "step5"]),
        ("step200", ["checkpoint-200", "manifest.json is missing: a save was cut off", "step5"]),
        ("no/such", ["--resume_from_checkpoint no/such: does not exist", "step5"]),
        ("/usr", ["--resume_from_checkpoint /usr: neither a checkpoint nor a run folder", "step5"]),
        ("x" * 300, ["--resume_from_checkpoint xxx", "File name too long"]),
    ],
)
def test_a_checkpoint_that_cannot_be_taken(tmp_path, requested, parts):
    checkpoint(tmp_path, 5), checkpoint(tmp_path, 200, whole=False)
    with pytest.raises(UserError) as error:
        find_checkpoints(requested, RunFolder(tmp_path), print)
    assert all(part in str(error.value) for part in (*parts, "DSR339" if len(requested) < 300 else "")), error.value


def test_a_run_whose_checkpoints_are_all_damaged_does_not_restart(tmp_path):
    checkpoint(tmp_path, 5, whole=False)
    with pytest.raises(UserError, match=r"\(checkpoint-5: manifest.json is missing.*DSR340"):
        find_checkpoints("auto", RunFolder(tmp_path), print)


def test_a_step_needs_a_run():
    with pytest.raises(UserError, match="--output_dir.*DSR339"):
        find_checkpoints("step5", None, print)
