"""report.html: every section, nothing from a network, hostile and torn files, several runs, both languages, a browser."""

import json
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import pytest
import yaml
from support.tiny import refusal

from dsrecipes.cli import main
from dsrecipes.errors import UserError
from dsrecipes.reporting import charts
from dsrecipes.reporting.report import PAGE, language, report, words

SECTIONS = ["result", "configuration", "data", "curves", "evaluation", "attached", "verification", "environment"]
HOSTILE = "</script><script>alert(1)</script><b>"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Page(HTMLParser):
    """What a report holds: elements with attributes, and the text outside scripts and styles."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.text, self._open = [], "", None
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._open = tag

    def handle_endtag(self, tag):
        self._open = None

    def handle_data(self, data):
        if self._open not in ("script", "style"):
            self.text += data

    def every(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


def run_folder(path, **config):
    path.mkdir(parents=True)
    values = {
        "recipe": "gpt2_clm",
        "profile": "full",
        "model_name_or_path": "m",
        "learning_rate": 0.001,
        "lora_target_modules": ["a"],
    }
    (path / "config.yaml").write_text(yaml.safe_dump(values | config))
    lines = [
        {
            "step": n,
            "time": 60.0 * n,
            "loss": 4 - n / 10,
            "grad_norm": 1.5,
            "learning_rate": 1e-3 / n,
            "tokens_per_second": 900.5,
        }
        for n in range(1, 11)
    ]
    lines[4]["loss"] = "nan"
    lines.append({"step": 10, "time": 601.0, "eval_loss": 2.75, "eval_perplexity": 15.6})
    (path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    stats = {
        "rows": 10,
        "kept": 8,
        "dropped": {"longer than 64 tokens": 2},
        "tokens": 500,
        "supervised": 400,
        "tail": 7,
        "sequences": 6,
    }
    lengths = {"edges": [10, 20, 30], "counts": [5, 3]}
    (path / "data.json").write_text(json.dumps({"train": stats | {"lengths": lengths}}))
    told = {"engine": "plain PyTorch", "packages": {"torch": "2.13.0"}, "origins": {"learning_rate": "flag"}}
    (path / "environment.json").write_text(json.dumps(told))
    by = {"physics": {"accuracy": 0.5, "questions": 4}, "music": {"accuracy": 0.25, "questions": 8}}
    (path / "metrics.json").write_text(json.dumps({"step": 10, "train_loss": 3.0, "eval_accuracy_by_subject": by}))
    return path


def test_a_report_has_every_section_and_loads_nothing(tmp_path):
    path = report(run_folder(tmp_path / "run"), lang="en")
    assert path == tmp_path / "run" / "report.html" and path.stat().st_size < 6_000_000
    page = Page(path)
    assert [attrs["id"] for attrs in page.every("section")] == SECTIONS
    assert page.every("html")[0]["lang"] == "en"
    ids = {attrs["id"] for _, attrs in page.tags if "id" in attrs}
    for tag, attrs in page.tags:
        assert "src" not in attrs and not any(name.startswith("on") for name in attrs), (tag, attrs)
        if "href" in attrs:
            assert attrs["href"][1:] in ids, attrs
        for name in ("aria-labelledby", "aria-describedby"):
            assert attrs.get(name) is None or attrs[name] in ids
    assert "link" not in dict(page.tags) and "default-src 'none'" in str(page.every("meta"))
    assert len(page.every("table")) == len(page.every("caption"))
    for part in (
        "longer than 64 tokens",
        "flag",
        "plain PyTorch",
        "physics",
        "2.75",
        "Not verified",
        "not finite numbers, where the line has gaps: 1.",
    ):
        assert part in page.text, part


def test_what_comes_from_files_is_text(tmp_path):
    run = run_folder(tmp_path / "<b>run", model_name_or_path=HOSTILE)
    (run / "samples.jsonl").write_text(json.dumps({"prompt": HOSTILE, HOSTILE: "x"}) + "\n")
    (run / "VERIFIED.json").write_text(json.dumps({HOSTILE: {"sha256": HOSTILE}}))
    page = Page(report(run))
    assert len(page.every("script")) == 4 and not page.every("b")
    assert page.text.count(HOSTILE) > 4


def test_a_run_that_died_can_be_reported(tmp_path):
    run = run_folder(tmp_path / "run")
    (run / "metrics.json").unlink()
    (run / "data.json").write_text('{"train": {"rows"')
    with (run / "log.jsonl").open("a") as log:
        log.write('[1]\n{"step": 11, "lo')
    text = Page(report(run, lang="en")).text
    for part in ("not finished", "no metrics.json", "no data.json", "data.json cannot be read"):
        assert part in text, part
    for name in ("data.json", "environment.json", "log.jsonl"):
        (run / name).unlink()
    text = Page(report(run, lang="en")).text
    assert "Nothing was logged yet" in text and "no environment.json" in text


def test_several_runs_lie_side_by_side(tmp_path):
    runs = [run_folder(tmp_path / "a" / "x", learning_rate=0.001), run_folder(tmp_path / "b" / "x", learning_rate=0.25)]
    with pytest.raises(UserError, match="--out.*DSR562"):
        report(runs)
    page = Page(report(runs, out=tmp_path / "both.html"))
    assert "What differs between the runs" in page.text and str(runs[1]) in page.text and "0.25" in page.text
    differs = page.text[page.text.index("What differs") : page.text.index("The same run again")]
    assert "learning_rate" in differs and "model_name_or_path" not in differs.partition("Configuration of")[0]


def test_attached_json_of_any_form_is_tables(tmp_path):
    (tmp_path / "c.json").write_text(
        json.dumps({"difference": 0.125, "pairs": [{"id": 1, "deep": {"a": [1]}}, {"id": 2}], "none": []})
    )
    (tmp_path / "l.json").write_text(json.dumps([{"n": n, "text": "x" * 5000} for n in range(500)]))
    path = report(run_folder(tmp_path / "run"), attach=[tmp_path / "c.json", tmp_path / "l.json"], lang="en")
    text = Page(path).text
    assert "0.125" in text and '{"a": [1]}' in text and "of 500 rows" in text and "(+3,000)" in text
    assert path.stat().st_size < 6_000_000


def test_a_long_run_stays_small_and_keeps_its_spikes(tmp_path):
    points = [(n, 1.0) for n in range(50_000)]
    points[12_345] = (12_345, 99.0)
    points[40_000] = (40_000, None)
    kept = charts.thin(points, 4000)
    assert len(kept) <= 4000 and (12_345, 99.0) in kept and kept == sorted(kept)
    run = run_folder(tmp_path / "run")
    keys = ("loss", "grad_norm", "learning_rate", "tokens_per_second", "peak_memory_gb", "eval_loss", "eval_accuracy")
    with (run / "log.jsonl").open("w") as log:
        for n in range(20_000):
            log.write(json.dumps({"step": n} | dict.fromkeys(keys, 1 / (n + 3))) + "\n")
    assert report(run).stat().st_size < 6_000_000


def test_only_its_own_file_is_replaced(tmp_path, capfd):
    run = run_folder(tmp_path / "run")
    assert report(run) == report(run)
    (tmp_path / "mine.html").write_text("<p>mine</p>")
    for argv, part in (
        ([run, "--out", tmp_path / "mine.html"], "DSR564"),
        ([run, "--out", tmp_path], "DSR563"),
        ([run, "--out", tmp_path / "none" / "x.html"], "DSR563"),
        ([tmp_path / "none"], "no such run folder"),
        ([tmp_path], "no config.yaml"),
        ([run, run, "--out", tmp_path / "x.html"], "DSR561"),
        ([run, "--attach", tmp_path / "mine.html"], "DSR560"),
        ([run, "--lang", "fr"], "--lang"),
    ):
        assert part in refusal(main, ["report", *argv], capfd)
    assert (tmp_path / "mine.html").read_text() == "<p>mine</p>" and not list(tmp_path.rglob("*.partial"))


def test_both_languages_say_everything(tmp_path, monkeypatch):
    table = yaml.safe_load((PAGE / "words.yaml").read_text(encoding="utf-8"))
    assert all(set(each) == {"en", "zh-TW"} and all(each.values()) for each in table.values())
    assert words("en").keys() == words("zh-TW").keys()
    page = Page(report(run_folder(tmp_path / "run"), lang="zh-TW"))
    assert page.every("html")[0]["lang"] == "zh-TW" and "驗證損失" in page.text and "Not verified" not in page.text
    for locale, expected in (("zh_TW.UTF-8", "zh-TW"), ("en_US.UTF-8", "en"), ("C", "en"), ("zh_CN.UTF-8", "en")):
        monkeypatch.setenv("LC_ALL", locale)
        assert language() == expected


def test_it_imports_no_torch(tmp_path):
    code = "import sys; from dsrecipes.cli import main; main(sys.argv[1:]); assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code, "report", run_folder(tmp_path / "run")], check=True)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_a_browser_draws_every_chart_and_complains_of_nothing(tmp_path):
    path = report(run_folder(tmp_path / "run", model_name_or_path=HOSTILE))
    flags = (
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", "--enable-logging=stderr", "--virtual-time-budget=5000",
        f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", path.as_uri(),
    )  # fmt: skip
    seen = subprocess.run([CHROMIUM, *flags], capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in seen.stderr, seen.stderr
    (tmp_path / "dom.html").write_text(seen.stdout)
    drawn = [attrs for attrs in Page(tmp_path / "dom.html").every("div") if "js-plotly-plot" in attrs.get("class", "")]
    assert len(drawn) == 5  # lengths, loss, learning rate, gradient norm, speed
    assert "Share chart" not in "".join(str(attrs) for attrs in Page(tmp_path / "dom.html").every("button"))
