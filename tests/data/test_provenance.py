"""Prepared rows are named by file and line, blocks of joined texts by the first and last row in them."""

from pathlib import Path

from dsrecipes.data.columns import ColumnWriter
from dsrecipes.data.provenance import RowSources


def written(folder: Path, places: list[str], tokens: list[int]) -> Path:
    with ColumnWriter(RowSources(folder / "train.arrow").path, piece=0) as writer:
        for start in range(0, len(places), 4):
            writer.write(RowSources.batch(places[start : start + 4], tokens[start : start + 4]))
    return folder / "train.arrow"


def test_rows_are_named_by_file(tmp_path):
    path = written(tmp_path, [f"a.jsonl, line {n}" for n in (1, 3, 4)] + ["b c.json, row 9", "row 2", "somewhere"], [1] * 6)
    assert RowSources(path).describe([2, 0, 3, 0]) == "a.jsonl, lines 1, 4; b c.json, row 9"
    assert RowSources(path).describe([4]) == "row 2"
    assert RowSources(tmp_path / "other.arrow").describe([4, 1]) == "prepared rows 1, 4"


def test_many_rows_are_counted(tmp_path):
    path = written(tmp_path, [f"a.csv, line {n}" for n in range(2, 102)], [5] * 100)
    assert RowSources(path).describe(range(100)).endswith(", 24, 25 and 76 more")


def test_a_block_is_named_by_the_rows_at_its_ends(tmp_path):
    # tokens 0-9 are of line 1, 10-13 of line 2, 14-39 of line 3, 40 of line 4
    path = written(tmp_path, [f"a.txt, line {n}" for n in (1, 2, 3, 4)], [10, 4, 26, 1])
    assert [RowSources(path).describe([block], 8) for block in range(6)] == [
        "a.txt, line 1", "a.txt, lines 1, 3", "a.txt, line 3", "a.txt, line 3", "a.txt, line 3", "a.txt, line 4",
    ]  # fmt: skip
