"""log.jsonl and the curve: what is kept on resuming, and what is drawn."""

import json
import math

import pytest
from transformers import TrainerControl, TrainerState

from dsrecipes.io.console import Console
from dsrecipes.runs.curve import draw_curve
from dsrecipes.runs.folder import RunFolder
from dsrecipes.runs.log import read_log, truncate_log
from dsrecipes.train.recorder import Recorder


def test_lines_after_the_resumed_step_are_removed(tmp_path):
    log = tmp_path / "log.jsonl"
    lines = [{"step": step, "loss": 1 / step} for step in (1, 2, 3, 4)] + [{"step": 4, "eval_loss": 0.5}]
    # the last line was cut off when the run was killed
    log.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 5, "lo')
    assert read_log(log) == lines
    truncate_log(log, 3)
    assert read_log(log) == lines[:3]
    truncate_log(log, 0)
    assert read_log(log) == []
    truncate_log(tmp_path / "none.jsonl", 3)
    assert not (tmp_path / "none.jsonl").exists()


def test_what_is_logged_reaches_file_board_and_bar(tmp_path, capfd):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, console = RunFolder(tmp_path), Console()
    recorder = Recorder(folder, console, 0, False)
    state, control = TrainerState(global_step=0, max_steps=3, epoch=0.5, is_world_process_zero=True), TrainerControl()
    recorder.on_train_begin(None, state, control)
    for step, logs in enumerate(
        ({"loss": 2.0, "learning_rate": 1e-3, "grad_norm": 0.5, "tokens_per_second": 1234.5, "peak_memory_gb": 1.5},
         {"loss": math.nan, "grad_norm": None}, {"eval_loss": 1.5, "eval_perplexity": math.exp(1.5)}), 1
    ):  # fmt: skip
        state.global_step = step
        recorder.on_step_end(None, state, control)
        recorder.on_log(None, state, control, logs)
    recorder.on_log(None, state, control, {"train_runtime": 3.0})
    recorder.on_train_end(None, state, control)
    recorder.board.close()
    # Python reads NaN, which is no JSON and which other parsers refuse
    lines = [json.loads(line, parse_constant=pytest.fail) for line in folder.log.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3] and all({"epoch", "time"} <= set(line) for line in lines)
    assert (lines[0]["loss"], lines[1]["loss"], lines[2]["eval_loss"]) == (2.0, "nan", 1.5)
    board = EventAccumulator(str(folder.tensorboard))
    board.Reload()
    assert {"train/loss", "train/learning_rate", "train/tokens_per_second", "eval/loss"} <= set(board.Tags()["scalars"])
    shown = capfd.readouterr().out
    assert "3/3" in shown and "eval 1.500" in shown and "lr 1.0e-03" in shown and "1,23" in shown


@pytest.mark.parametrize(
    "lines",
    [
        [{"step": s, "loss": 3 / s} for s in range(1, 20)] + [{"step": 10, "eval_loss": 1.0}],
        [{"step": 1, "loss": "nan"}],
        [],
    ],
)
def test_the_curve_is_a_picture(tmp_path, lines):
    log, picture = tmp_path / "log.jsonl", tmp_path / "curve.png"
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    draw_curve(log, picture, "title $with_ ^signs")
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and picture.stat().st_size > 5000
