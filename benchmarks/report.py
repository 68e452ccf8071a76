"""What bench.py found, as tables (Markdown) and a picture.

report.write(result, Path("x.md"), Path("x.png"))
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

Json = dict[str, Any]


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table; the first column is text, the others are numbers."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return ["", *("| " + " | ".join(row) + " |" for row in [head, rule, *rows]), ""]


def middle(values: list[float], form: str) -> str:
    """Median, and the least and greatest where there are several."""
    text = format(statistics.median(values), form)
    return text if len(values) == 1 else f"{text} ({format(min(values), form)} to {format(max(values), form)})"


def step_table(part: Json) -> list[str]:
    """Throughput, and whether the result is the same."""
    rows = [
        [
            name,
            middle(own["rates"], ",.0f"),
            f"{own['ratio']:.2f}" if "ratio" in own else "",
            f"{statistics.mean(own['tokens']):,.0f}",
            f"{own['losses'][0]:.3f}",
            f"{own['held_out']:.3f}",
            "; ".join(own["faults"]) or "same",
        ]
        for name, own in part["contestants"].items()
    ]
    head = ["contestant", "useful tokens/s", "ours / theirs", "tokens a step", "first loss", "held-out loss", "result"]
    rounds = max(len(own["rates"]) for own in part["contestants"].values())
    return [
        f"## Throughput: median (least to greatest) of {rounds} interleaved round(s)",
        "",
        f"{part['steps']} steps a run, of which the first {part['warmup']} are not timed. Held-out loss before training: "
        f"{part['initial_held_out']:.3f}; it is taken on the same rows, one at a time, after the last step. "
        "The ratio is taken in each round; its median is shown."
        + (f" Arithmetic limit, measured before each round: {middle(part['limits'], ',.0f')}." if "limits" in part else ""),
        *table(head, rows),
    ]


def zero_table(part: Json) -> list[str]:
    """Time, bytes held and bytes sent."""
    mega = lambda count: f"{count / 1e6:,.1f}"  # noqa: E731
    rows = []
    for key, own in part.items():
        stage, ranks = key.split("-")
        held = [mega(own["held"][name]) for name in ("parameters", "gradients", "optimizer", "buffers")]
        rows.append([f"ZeRO-{stage}", ranks, f"{own['seconds']:.2f}", *held, mega(sum(own["sent"].values()))])
    head = ["stage", "ranks", "s a step", "parameters", "gradients", "optimizer", "buffers", "sent a step"]
    return ["## ZeRO stages: seconds, and MB (1e6 bytes) that rank 0 holds before the update and sends", *table(head, rows)]


def prepare_table(part: Json) -> list[str]:
    """Preparation of all rows."""
    rows = [
        [name, middle(own["seconds"], ".1f"), f"{max(own['bytes']) / 1e9:.2f}", f"{own['rows']:,}", f"{own['sequences']:,}"]
        for name, own in part.items()
    ]
    head = ["", "seconds", "peak memory, GB", "rows", "packed sequences"]
    return ["## Preparation of all rows: read, tokenize, mask, pack; nothing cached", *table(head, rows)]


def startup_table(part: Json) -> list[str]:
    """Start-up."""
    rows = []
    for name, seconds in part.items():
        ratio = statistics.median(theirs / mine for theirs, mine in zip(seconds, part["ours"], strict=True))
        rows.append([name, middle(seconds, ".1f"), f"{ratio:.2f}"])
    return [
        "## Start-up: from the command to the end of the first optimizer step, data prepared before",
        "",
        "The ratio is taken in each round; its median is shown.",
        *table(["", "seconds", "theirs / ours"], rows),
    ]


def vocabulary_table(part: Json) -> list[str]:
    """Peak memory with a large vocabulary."""
    rows = [[name, f"{peak:.2f}"] for name, peak in part.items()]
    return ["## Vocabulary of 128,256 tokens: most memory resident, four sequences of 512", *table(["", "GB"], rows)]


TABLES = {
    "step": step_table,
    "zero": zero_table,
    "prepare": prepare_table,
    "startup": startup_table,
    "vocabulary": vocabulary_table,
}


def heading(result: Json) -> list[str]:
    """Machine, date, versions, rows."""
    machine, rows = result["machine"], result["inputs"]
    lines = [
        f"# Benchmark of {result['date']} on {result['host']}",
        "",
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory'] / 2**30:.0f} GiB, {machine['system']}; 2 threads, fp32. "
        f"Rows: {', '.join(rows['files'])}, {rows['rows']:,} of them used; left out: "
        + ", ".join(f"{count} {why}" for why, count in rows["dropped"].items())
        + ".",
        "",
        "Ours: " + versions(result["versions"]) + ".",
    ]
    seen: dict[str, str] = {}
    for name, own in result.get("step", {}).get("contestants", {}).items():
        if name.startswith(("trl-", "lf-")):
            seen.setdefault(versions(own["versions"]), name.split("-")[0])
    return [*lines, *(f"\n{name}: {text}." for text, name in seen.items()), ""]


def versions(found: dict[str, str]) -> str:
    """Names and versions."""
    return ", ".join(f"{name} {version}" for name, version in found.items())


def draw(part: Json, picture: Path, title: str) -> None:
    """Useful tokens a second as bars, with the ratio to ours."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    order = sorted(part["contestants"].items(), key=lambda each: statistics.median(each[1]["rates"]))
    names = [name for name, _ in order]
    rates = [statistics.median(own["rates"]) for _, own in order]
    low = [rate - min(own["rates"]) for rate, (_, own) in zip(rates, order, strict=True)]
    high = [max(own["rates"]) - rate for rate, (_, own) in zip(rates, order, strict=True)]
    colors = {"ours": "#d1495b", "trl": "#2e86ab", "lf": "#66a182"}
    shades = [colors.get(name.split("-")[0], "#9a9a9a") for name in names]
    figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.45 * len(names)), layout="constrained")
    axes.barh(names, rates, color=shades, xerr=[low, high], error_kw={"elinewidth": 1, "capsize": 3, "ecolor": "#333333"})
    for index, (_, own) in enumerate(order):
        behind = f"   ours is {own['ratio']:.2f}x" if "ratio" in own and names[index] != "ours" else ""
        fault = "   different result" if own["faults"] else ""
        axes.text(max(own["rates"]), index, f"  {rates[index]:,.0f}{behind}{fault}", va="center", fontsize=9)
    axes.set_xlim(0, max(max(own["rates"]) for _, own in order) * 1.35)
    axes.set_xlabel("useful tokens a second (padding not counted)")
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture, dpi=150)
    pyplot.close(figure)


def write(result: Json, file: Path, picture: Path) -> None:
    """Write the tables of the parts that there are, and the picture of the throughput."""
    lines = heading(result)
    if "step" in result:
        machine = result["machine"]
        draw(result["step"], picture, f"{result['date']}, {machine['cpu']}, 2 threads, fp32, 2,048 useful tokens a step")
        lines += [f"![useful tokens a second]({picture.name})", ""]
    for part, make in TABLES.items():
        if part in result:
            lines += make(result[part])
    file.write_text("\n".join(lines).rstrip() + "\n")
