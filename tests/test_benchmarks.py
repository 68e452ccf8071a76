"""The benchmark's own checks: equal steps, and a contestant that trained something else is marked."""

from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import bench

    return bench


def test_steps_of_rows_in_turn_have_the_same_tokens(bench):
    draw = np.random.default_rng(0)
    rows = [{"input_ids": [0] * int(n), "number": i} for i, n in enumerate(draw.lognormal(4.5, 0.6, 2000).clip(8, 512))]
    ordered = bench.inputs.in_equal_steps(rows, 18)
    assert sorted(row["number"] for row in ordered) == list(range(2000))
    for start in range(0, 32 * 18, 18):
        assert sum(len(row["input_ids"]) for row in ordered[start : start + 18]) == pytest.approx(2048, rel=0.05)


def test_who_trained_something_else_is_marked(bench, capsys):
    same = {"losses": [10.85, 10.2], "held_out": 10.2, "tokens": [2040.0], "rows_equal": 1.0}
    others = {
        "worse": {"held_out": 10.5}, "elsewhere": {"losses": [9.0, 8.0]}, "fewer": {"tokens": [1500.0]},
        "other rows": {"rows_equal": 0.5},
    }  # fmt: skip
    found = {name: same | change for name, change in {"ours": {}, "a": {}, "b": {}, **others}.items()}
    bench.check(found, initial=10.86)
    assert [len(found[name]["faults"]) for name in ("ours", "a", "b")] == [0, 0, 0]
    assert "different result" in found["worse"]["faults"][0] and "1500 tokens a step" in found["fewer"]["faults"]
    assert len(found["elsewhere"]["faults"]) == 2 and "50% of its first rows" in found["other rows"]["faults"][0]
    assert capsys.readouterr().out.count("  ok\n") == 3
