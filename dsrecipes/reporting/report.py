"""One HTML file about one run or several: configuration, data, curves, evaluation, verification, environment.

dsrecipes report last
dsrecipes report runs/a runs/b --out both.html --lang zh-TW
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dsrecipes.errors import UserError
from dsrecipes.io.arguments import CommandParser
from dsrecipes.io.disk import write_whole
from dsrecipes.io.paths import user_path
from dsrecipes.reporting import charts, tables
from dsrecipes.reporting.recorded import RecordedRun, as_mapping, is_number, open_recorded, read_json

LANGUAGES = ("en", "zh-TW")
PAGE = Path(__file__).with_name("page")
_MARK = '<meta name="generator" content="dsrecipes report">'
"""Stands in the head of every report: a file without it is not ours to replace."""
_ROOM = 400_000
"""Characters of attached files in a report, shared by the files."""


def main(argv: list[str]) -> int:
    """Write the report that the flags ask for, and say where it is."""
    parser = CommandParser("report", "One HTML file about a run, or several side by side; it needs no network.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders, finished or not, or `last`")
    parser.add_argument("--out", metavar="FILE.html", help="where to write (default for one run: RUN/report.html)")
    parser.add_argument("--lang", choices=LANGUAGES, help="language (default: the locale's)")
    parser.add_argument(
        "--attach", nargs="+", default=[], metavar="FILE", help="JSON or JSONL files to show as tables: comparisons, samples"
    )
    asked = parser.parse_args(argv)
    print(report(asked.runs, out=asked.out, lang=asked.lang, attach=asked.attach))
    return 0


def report(
    runs: Sequence[str | Path] | str | Path,
    *,
    out: str | Path | None = None,
    lang: str | None = None,
    attach: Sequence[str | Path] = (),
) -> Path:
    """Write one self-contained HTML file and return its path.

    Args:
        runs: one run folder or several, finished or not; `last` is the newest finished one under runs/.
        out: the file; report.html in the run folder where there is one run.
        lang: `en` or `zh-TW`; that of the locale where it is not given.
        attach: JSON or JSONL files, shown as tables.

    Raises:
        UserError: no such run or file, or the place holds a file that is no report.
    """
    found = open_recorded([runs] if isinstance(runs, (str, Path)) else list(runs))
    if out is None and len(found) > 1:
        raise UserError("several runs: name the file with --out FILE.html")
    path = user_path(out) if out else found[0].folder.page
    _check_place(path)
    text = render(found, lang or language(), [user_path(each) for each in attach])
    try:
        write_whole(path, text)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error
    return path


def language() -> str:
    """The language of the locale: Traditional Chinese where it is used, else English."""
    names = (os.environ.get(key) for key in ("LC_ALL", "LC_MESSAGES", "LANG"))
    name = next((name for name in names if name), "").replace("-", "_")
    return "zh-TW" if name.startswith(("zh_TW", "zh_HK", "zh_MO", "zh_Hant")) else "en"


def words(lang: str) -> dict[str, str]:
    """The text of the page in a language."""
    import yaml

    table = yaml.safe_load((PAGE / "words.yaml").read_text(encoding="utf-8"))
    return {key: each[lang] for key, each in table.items()}


def _check_place(path: Path) -> None:
    if path.is_dir():
        raise UserError(f"--out {path}: this is a folder; give the name of a file")
    if not path.parent.is_dir():
        raise UserError(f"--out {path}: there is no folder {path.parent}")
    if path.is_file():
        with path.open(encoding="utf-8", errors="replace") as file:
            if _MARK not in file.read(2000):
                raise UserError(f"{path}: this file was not written by `dsrecipes report`; choose another name with --out")


def render(runs: list[RecordedRun], lang: str, attached: list[Path]) -> str:
    """The page's HTML."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    text = words(lang)
    page = Environment(
        loader=FileSystemLoader(PAGE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page.filters |= {"show": _show, "number": is_number}
    page.globals |= {"t": text, "lang": lang, "mark": Markup(_MARK), "several": len(runs) > 1}
    drawn = [*charts.lengths(runs), *charts.curves(runs)]
    return page.get_template("report.html.jinja").render(
        runs=runs,
        title=" · ".join(
            dict.fromkeys(f"{run.config.get('recipe')}: {run.config.get('model_name_or_path')}" for run in runs)
        ),
        result=tables.by_run([(run.name, _result(run, text)) for run in runs]),
        config=tables.by_run([(run.name, run.config) for run in runs]),
        differing=tables.differing(tables.by_run([(run.name, _settings(run)) for run in runs])),
        sources=_sources(runs, text),
        charts=drawn,
        drawn=[{"key": c.key, "kind": c.kind, "series": [vars(each) for each in c.series]} for c in drawn],
        metrics=tables.by_run([(run.name, run.metrics) for run in runs]),
        nested=tables.nested([(run.name, run.metrics) for run in runs]),
        environment=tables.by_run([(run.name, _environment(run)) for run in runs]),
        attached=_attached(runs, attached),
        verified=[(run, tables.tables(run.verified, "VERIFIED.json", _ROOM // len(runs))) for run in runs],
        written=time.strftime("%Y-%m-%d %H:%M"),
        version=version("dsrecipes"),
        **{name: Markup((PAGE / f"report.{name}").read_text(encoding="utf-8")) for name in ("css", "js")},  # ours, no run's
        plotly=Markup(get_plotlyjs()),
    )


def _result(run: RecordedRun, text: dict[str, str]) -> dict[str, Any]:
    """The figures that a reader looks for first."""
    keys = ("eval_loss", "eval_perplexity", "eval_accuracy", "eval_macro_f1", "eval_pearson")
    told = {key: run.metrics.get(key, run.last(key)) for key in keys}
    told |= {"test_accuracy": run.metrics.get("test_accuracy"), "tokens_per_second": run.last("tokens_per_second")}
    told["peak_memory_gb"] = run.last("peak_memory_gb")
    times = [line["time"] for line in run.log if is_number(line.get("time"))]
    values = {
        "state": text["finished"] if run.metrics else text["unfinished"],
        "steps": run.last("step"),
        "loss": run.metrics.get("train_loss", run.last("loss")),
        **told,
        "minutes": (max(times) - min(times)) / 60 if times else None,
    }
    return {text[key]: value for key, value in values.items() if value is not None}


def _settings(run: RecordedRun) -> dict[str, Any]:
    """The configuration with lists as text, so that they fill a cell; the machine's part of it, too."""
    return {
        key: value if tables.is_plain(value) else json.dumps(value, ensure_ascii=False) for key, value in run.config.items()
    } | {key: run.environment.get(key) for key in ("engine", "precision", "ranks", "device")}


def _environment(run: RecordedRun) -> dict[str, Any]:
    packages = run.environment.get("packages")
    told = {
        key: ", ".join(map(str, v)) if isinstance(v, list) else v for key, v in run.environment.items() if key != "origins"
    }
    return told | (packages if isinstance(packages, dict) else {})


def _sources(runs: list[RecordedRun], text: dict[str, str]) -> tables.Table:
    """A row for each data set of each split, where a run has several."""
    keys = ("kept", "tokens", "supervised", "rows_an_epoch", "tokens_an_epoch")
    rows = [
        [*([run.name] if len(runs) > 1 else []), text.get(split, split), name, *(facts.get(key) for key in keys)]
        for run in runs
        for split, held in run.splits.items()
        for name, facts in as_mapping(held.get("sources")).items()
        if isinstance(facts, dict)
    ]
    heads = [*(["run"] if len(runs) > 1 else []), "split", "source", *keys]
    return tables.Table("", [text[head] for head in heads], rows, len(rows))


def _attached(runs: list[RecordedRun], attached: list[Path]) -> list[tuple[str, list[tables.Table]]]:
    """Tables of the JSON files that were named, and of those that lie in the run folders."""
    files = [(str(path), path) for path in attached]
    files += [(path.name if len(runs) == 1 else f"{run.name}/{path.name}", path) for run in runs for path in run.others]
    result = []
    for name, path in files:
        try:
            result.append((name, tables.tables(read_json(path), path.stem, _ROOM // len(files))))
        except UserError as error:
            if path in attached:
                raise
            next(run for run in runs if path in run.others).notes.append(str(error))
    return result


def _show(value: Any) -> str:
    """A value as a reader wants it: five digits, thousands apart."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.5g}" if is_number(value) and abs(value) < 1e5 else f"{value:,.0f}" if is_number(value) else str(value)
