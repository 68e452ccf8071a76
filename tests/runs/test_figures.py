"""The one list of figures: an entry is enough to see a new key of log.jsonl in the bar, the footer's list and the report."""

import json
import re

import yaml
from transformers import TrainerControl, TrainerState

from dsrecipes.io.console import Console
from dsrecipes.reporting.report import report, words
from dsrecipes.runs.figures import FIGURES, Figure, chart_titles
from dsrecipes.runs.folder import RunFolder
from dsrecipes.runs.log import read_log
from dsrecipes.train.recorder import Recorder


def record(folder: RunFolder, **logs: float) -> None:
    recorder = Recorder(folder, Console(), 0, False)
    state, control = TrainerState(global_step=0, max_steps=1, epoch=0.5, is_world_process_zero=True), TrainerControl()
    recorder.on_train_begin(None, state, control)
    state.global_step = 1
    recorder.on_step_end(None, state, control)
    recorder.on_log(None, state, control, logs)
    recorder.on_train_end(None, state, control)
    recorder.board.close()


def test_one_entry_shows_a_new_figure_everywhere(tmp_path, monkeypatch, capfd):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    gpu_power = Figure(en="Power", zh="功率", unit="W", bar="{:.0f} W", chart="gpu_power", in_result=True)
    monkeypatch.setitem(FIGURES, "gpu_power", gpu_power)
    folder = RunFolder(tmp_path)
    folder.config.write_text(yaml.safe_dump({"recipe": "gpt2_clm", "model_name_or_path": "m"}))
    record(folder, loss=2.0, gpu_power=312.5)
    assert read_log(folder.log)[0]["gpu_power"] == 312.5
    assert "312 W" in capfd.readouterr().out
    board = EventAccumulator(str(folder.tensorboard))
    board.Reload()
    assert "train/gpu_power" in board.Tags()["scalars"]
    for lang, name in (("en", "Power (W)"), ("zh-TW", "功率（W）")):
        page = report(tmp_path, lang=lang).read_text("utf-8")
        assert re.search(rf'<th scope="row">{re.escape(name)}</th>\s*<td[^>]*>312.5</td>', page)
        assert re.search(rf'<h3 id="title-\d">{re.escape(name)}</h3>', page)
        charts = json.loads(re.search(r'id="charts-data">(.*?)</script>', page)[1])
        assert [chart["key"] for chart in charts] == ["loss", "gpu_power"]


def test_the_shown_figures_and_charts_have_names_in_both_languages():
    assert list(chart_titles("en")) == list(chart_titles("zh-TW")) and chart_titles("en")["loss"] == "Loss (nats)"
    for lang in ("en", "zh-TW"):
        text = words(lang)
        assert all(text[key] == figure.label(lang) != "" for key, figure in FIGURES.items())
    assert all(figure.bar.format(1.0) for figure in FIGURES.values() if figure.bar)
