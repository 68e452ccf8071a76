"""How do runs become one HTML page? Configuration, data, curves, evaluation, verification, environment.

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
from dsrecipes.runs.figures import FIGURES, chart_titles

LANGUAGES = ("en", "zh-TW")
PAGE = Path(__file__).with_name("page")
_MARK = '<meta name="generator" content="dsrecipes report">'
"""In the head of every report: a file without it is not ours to replace."""
_ROOM = 400_000
"""Characters of attached files in a report, shared by the files."""


def main(argv: list[str]) -> int:
    """Write the report that the flags describe, and print its path."""
    parser = CommandParser(
        "report", "Write one HTML page about a run, or about several side by side. It loads nothing from a network."
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders, finished or not, or `last`")
    parser.add_argument("--out", metavar="FILE.html", help="the file to write (default for one run: RUN/report.html)")
    parser.add_argument("--lang", choices=LANGUAGES, help="language (default: that of the locale)")
    parser.add_argument(
        "--attach", nargs="+", default=[], metavar="FILE", help="JSON or JSONL files to show as tables: comparisons, samples"
    )
    args = parser.parse_args(argv)
    print(report(args.runs, out=args.out, lang=args.lang, attach=args.attach))
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
        out: the file to write; by default report.html in the run folder, where there is one run.
        lang: `en` or `zh-TW`; by default that of the locale.
        attach: JSON or JSONL files, shown as tables.

    Raises:
        UserError: no such run or file, or `out` exists and is not a report.
    """
    recorded = open_recorded([runs] if isinstance(runs, (str, Path)) else list(runs))
    if out is None and len(recorded) > 1:
        raise UserError("DSR562", "several runs: name the file with --out FILE.html")
    path = user_path(out) if out else recorded[0].folder.page
    _check_target(path)
    text = render(recorded, lang or language(), [user_path(name) for name in attach])
    try:
        write_whole(path, text)
    except OSError as error:
        raise UserError("DSR563", f"{path} cannot be written: {error.strerror}") from error
    return path


def language() -> str:
    """The language of the locale: Traditional Chinese where that is written, else English."""
    names = (os.environ.get(key) for key in ("LC_ALL", "LC_MESSAGES", "LANG"))
    name = next((name for name in names if name), "").replace("-", "_")
    return "zh-TW" if name.startswith(("zh_TW", "zh_HK", "zh_MO", "zh_Hant")) else "en"


def words(lang: str) -> dict[str, str]:
    """The texts of the page in a language: those of words.yaml, and the names of figures and charts."""
    import yaml

    table = yaml.safe_load((PAGE / "words.yaml").read_text(encoding="utf-8"))
    texts = {key: by_language[lang] for key, by_language in table.items()}
    titles = {f"chart_{name}": title for name, title in chart_titles(lang).items()}
    return texts | titles | {key: figure.label(lang) for key, figure in FIGURES.items()}


def _check_target(path: Path) -> None:
    """Refuse a path where no report can be written, or where another file would be lost (UserError)."""
    if path.is_dir():
        raise UserError("DSR563", f"--out {path}: this is a folder; give the name of a file")
    if not path.parent.is_dir():
        raise UserError("DSR563", f"--out {path}: there is no folder {path.parent}")
    if path.is_file():
        with path.open(encoding="utf-8", errors="replace") as file:
            # The mark is in the head of the page, and a report can have many megabytes.
            if _MARK not in file.read(2000):
                raise UserError(
                    "DSR564", f"{path}: this file was not written by `dsrecipes report`; choose another name with --out"
                )


def render(runs: list[RecordedRun], lang: str, attached: list[Path]) -> str:
    """The page's HTML."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    text = words(lang)
    # autoescape: names and values come from files of the run, which may hold markup. StrictUndefined: a text that
    # words.yaml lacks is an error, not an empty cell.
    page = Environment(
        loader=FileSystemLoader(PAGE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page.filters["show"] = _show
    page.globals |= {"t": text, "lang": lang, "mark": Markup(_MARK), "several": len(runs) > 1}
    # report.js draws the charts from JSON, and the template prints the same numbers as tables for those without it.
    drawn = [*charts.lengths(runs), *charts.curves(runs)]
    return page.get_template("report.html.jinja").render(
        runs=runs,
        title=" · ".join(dict.fromkeys(map(_title, runs))),
        result=tables.by_run([(run.name, _result(run, text)) for run in runs]),
        config=tables.by_run([(run.name, run.config) for run in runs]),
        differing=tables.differing(tables.by_run([(run.name, _settings(run)) for run in runs])),
        sources=_sources(runs, text),
        charts=drawn,
        drawn=[{"key": c.key, "kind": c.kind, "series": [vars(series) for series in c.series]} for c in drawn],
        metrics=tables.by_run([(run.name, run.metrics) for run in runs]),
        nested=tables.nested([(run.name, run.metrics) for run in runs]),
        environment=tables.by_run([(run.name, _environment(run)) for run in runs]),
        attached=_attached(runs, attached),
        verified=[(run, tables.tables(run.verified, "VERIFIED.json", _ROOM // len(runs))) for run in runs],
        written=time.strftime("%Y-%m-%d %H:%M"),
        version=version("dsrecipes"),
        **{name: Markup((PAGE / f"report.{name}").read_text(encoding="utf-8")) for name in ("css", "js")},  # our own files
        plotly=Markup(get_plotlyjs()),
    )


def _title(run: RecordedRun) -> str:
    return f"{run.config.get('recipe')}: {run.config.get('model_name_or_path')}"


def _result(run: RecordedRun, text: dict[str, str]) -> dict[str, Any]:
    """The values that a reader looks for first, by their names: from metrics.json, else the last ones of the log."""
    times = [line["time"] for line in run.log if is_number(line.get("time"))]
    values: dict[str, Any] = {
        "state": text["finished"] if run.metrics else text["unfinished"],
        "steps": run.last("step"),
    }
    for key, figure in FIGURES.items():
        if figure.in_result:
            values[key] = run.metrics.get(figure.final or key, run.last(key))
    values["minutes"] = (max(times) - min(times)) / 60 if times else None
    return {text[key]: value for key, value in values.items() if value is not None}


def _settings(run: RecordedRun) -> dict[str, Any]:
    """The configuration and the machine's part of it, with lists as text, so that each fills a cell."""
    settings = {
        key: value if tables.is_plain(value) else json.dumps(value, ensure_ascii=False) for key, value in run.config.items()
    }
    return settings | {key: run.environment.get(key) for key in ("engine", "precision", "ranks", "device")}


def _environment(run: RecordedRun) -> dict[str, Any]:
    """environment.json as plain values, the versions of packages last."""
    values = {
        key: ", ".join(map(str, value)) if isinstance(value, list) else value
        for key, value in run.environment.items()
        if key != "origins"
    }
    return values | as_mapping(run.environment.get("packages"))


def _sources(runs: list[RecordedRun], text: dict[str, str]) -> tables.Table:
    """A row for each data set of each split, where a run has several."""
    keys = ("kept", "tokens", "supervised", "rows_an_epoch", "tokens_an_epoch")
    several = len(runs) > 1
    rows = [
        [*([run.name] if several else []), text.get(split, split), name, *(facts.get(key) for key in keys)]
        for run in runs
        for split, stats in run.splits.items()
        for name, facts in as_mapping(stats.get("sources")).items()
        if isinstance(facts, dict)
    ]
    heads = [*(["run"] if several else []), "split", "source", *keys]
    return tables.Table("", [text[head] for head in heads], rows, len(rows))


def _attached(runs: list[RecordedRun], attached: list[Path]) -> list[tuple[str, list[tables.Table]]]:
    """Tables of the JSON files given by --attach, then of those in the run folders."""
    files = [(str(path), path) for path in attached]
    files += [(path.name if len(runs) == 1 else f"{run.name}/{path.name}", path) for run in runs for path in run.others]
    result = []
    for name, path in files:
        try:
            result.append((name, tables.tables(read_json(path), path.stem, _ROOM // len(files))))
        except UserError as error:
            # The user named an attached file and must learn of the fault; one in the run folder gets a note on the page.
            if path in attached:
                raise
            next(run for run in runs if path in run.others).notes.append(error.message)
    return result


def _show(value: Any) -> str:
    """A value as text: five digits, thousands separated."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return f"{value:,}"
    if is_number(value):
        return f"{value:,.5g}" if abs(value) < 1e5 else f"{value:,.0f}"
    return str(value)
