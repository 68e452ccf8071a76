"""Reading files as rows: every kind of file, and a message with the place for every kind of damage."""

import csv
import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest
from dsrecipes.recipes.alpaca_llama_sft import AlpacaLlamaSft
from support.tiny import SHARED, needs_shared

from dsrecipes.data.files import FileRows
from dsrecipes.data.load import load_splits
from dsrecipes.data.row import fingerprint, located
from dsrecipes.errors import UserError

ROWS = [{"a": "1", "text": 'eins\nzwei, "drei"'}, {"a": "", "text": "水"}]


def write(path, rows):
    """Write `rows` in the form of the file's suffix."""
    kind = path.name.removesuffix(".gz").rsplit(".", 1)[1]
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif kind in ("csv", "tsv"):
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0], delimiter="\t" if kind == "tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    else:
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        path.write_text("[" + ",\n".join(lines) + "]" if kind == "json" else "\n\n".join(lines), encoding="utf-8")
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(path.read_bytes()))
    return path


@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "tsv", "parquet"])
def test_rows_of_each_kind_of_file(tmp_path, kind, packed):
    path = write(tmp_path / f"rows.{kind}{packed}", ROWS)
    rows = load_splits(str(path))["train"]
    assert list(rows) == ROWS == list(rows)  # twice: files are read again at each pass
    places = [place for place, _ in located(rows)]
    assert places[0].startswith(f"{path}, ") and places[0] != places[1]


def test_the_place_of_a_row_is_its_line(tmp_path):
    jsonl = write(tmp_path / "a.jsonl", ROWS)
    assert [place for place, _ in FileRows((jsonl,)).located()] == [f"{jsonl}, line 1", f"{jsonl}, line 3"]
    table = write(tmp_path / "a.csv", [*ROWS, ROWS[0]])
    assert [place.rsplit(" ", 1)[1] for place, _ in FileRows((table,)).located()] == ["2", "4", "5"]


def test_variations_of_json(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"version": 1, "data": ROWS}))
    assert list(FileRows((path,))) == ROWS
    path.write_text("\ufeff" + "\n".join(map(json.dumps, ROWS)))  # JSON lines under the name .json, with a BOM
    assert list(FileRows((path,))) == ROWS


BIG = {
    "list": json.dumps(ROWS * 9), "indented": json.dumps(ROWS * 9, indent=2), "spaces": " [\n\r\t{} ,{}\n ] \n", "empty": "[]",
    "escapes": '[{"a": "\\ud83d\\ude00 \\ud800 \\u0000 \\\\ \\" \u6c34 \U0001f600"}]' , "marked": "[{}, {}]",
    "numbers": '[{"a": NaN, "b": [-Infinity, Infinity, 1e999, -0.0, 1E3, 12345678901234567890123, true, null]}]',
    "twice": '[{"a": 1, "a": {"b": [], "b": {}}}]', "data": '{"version": [1, {"data": [2]}], "data": [{"a": 1}], "end": "]"}',
    "lines": '\n{"a": 1}\n\n{"a": 2}', "nested": '[{"a": ' + "[" * 60 + "]" * 60 + "}]",
    "number": "12", "object": '{"a": [1]}', "other rows": '[{}, 3, {}]', "other data": '{"data": {"a": 1}}', "no value": "[{},]",
    "no comma": '[{} {"a": 1}]', "cut": '[{"a": 1}, {"a": "b', "cut word": '[{"a": 1}, {"a": tru', "not closed": "[{}, {}", "nothing": "",
    "more": "[{}]\n]", "a second list": '[{"a": 1}]\n\n[{"a": 2}]', "a line end in text": '[{"a": "b\nc"}]', "no escape": '[{"a": "\\x"}]',
    "no key": "{data: []}", "no colon": '{"data" []}', "no end": '{"data": [{}]', "deep": '[{"a": ' + "[" * 200_000,
}  # fmt: skip


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-8 gz"])
@pytest.mark.parametrize("name", BIG)
def test_a_big_json_file_has_the_rows_and_errors_of_a_small_one(tmp_path, monkeypatch, name, encoding):
    path = tmp_path / ("rows.json.gz" if "gz" in encoding else "rows.json")
    raw = BIG[name].encode("utf-8-sig" if name == "marked" else encoding.split()[0])
    path.write_bytes(gzip.compress(raw) if "gz" in encoding else raw)

    def read():
        rows = []
        try:
            rows.extend(FileRows((path,)).located())
        except UserError as error:
            return [] if "not JSON" in str(error) else rows, str(error)
        return rows, None

    # small files are parsed by json.loads, which the reader of big files must match, wherever its pieces are cut
    (small, problem), problems = read(), []
    for piece in (1, 7, 1 << 20):
        monkeypatch.setattr("dsrecipes.data.json_files._BIG", 0)
        monkeypatch.setattr("dsrecipes.io.json_stream._PIECE", piece)
        rows, big_problem = read()
        assert repr(rows) == repr(small)  # NaN is unequal to itself
        assert (big_problem is None) == (problem is None)
        problems.append(big_problem)
    assert len(set(problems)) == 1
    if problem and "not JSON" in problem:
        assert "not JSON" in problems[0] and problem.rpartition("(")[2][:9] == problems[0].rpartition("(")[2][:9]
    elif problem:
        assert problems[0] == problem


def test_the_place_of_an_error_in_a_big_json_file(tmp_path, monkeypatch):
    monkeypatch.setattr("dsrecipes.data.json_files._BIG", 0)
    monkeypatch.setattr("dsrecipes.io.json_stream._PIECE", 5)
    path = tmp_path / "rows.json"
    path.write_text('[{"a": 1},\n {"b": "some text"},\n\n  {"a": }]')
    rows_read = []
    with pytest.raises(UserError, match=r"rows.json, line 4, column 9: .*\[DSR005\]"):
        rows_read.extend(FileRows((path,)).located())
    assert [place.rsplit(", ")[1] for place, _ in rows_read] == ["row 1", "row 2"]
    path.write_bytes(b'[{"a": 1},\n{"a": "\xe9"}]')
    with pytest.raises(UserError, match=r"byte 0xe9 in line 2.*DSR116"):
        list(FileRows((path,)))


def test_text_is_cut_into_pieces_and_nothing_is_lost(tmp_path):
    text = " = One = \n" + "line of words\r\n" * 2000 + "\n = = Section = = \nmore\n\n = Two = \nthe end"
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode())
    rows = list(FileRows((path,)))
    assert "".join(row["text"] for row in rows) == text.replace("\r\n", "\n")
    assert [row["end"] for row in rows].count(True) == 2 and rows[-1]["end"] and len(rows) > 3
    assert rows[-1]["text"].startswith(" = Two = ")


def test_a_document_cut_at_its_last_blank_line_still_ends(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(" = One = \n" + "words " * 1000 + "\n \n = Two = \n" + "words " * 1000 + "\n\n")
    assert [row["end"] for row in FileRows((path,))] == [False, True, False, True]


@needs_shared
def test_wikitext_has_its_documents():
    path = SHARED / "wikitext-2" / "valid.txt"
    rows = list(FileRows((path,)))
    text = path.read_text(encoding="utf-8")
    assert "".join(row["text"] for row in rows) == text.removeprefix(" \n")  # a blank line before the first title
    titles = sum(line.startswith(" = ") and not line.startswith(" = =") for line in text.splitlines())
    assert sum(row["end"] for row in rows) == titles == 60


def gz_cut(raw: bytes) -> bytes:
    return gzip.compress(raw * 400)[:-20]


GOOD = b'{"a": 1}\n'
DAMAGED = [
    ("x.json", b'[{"a": 1},\n{"a": }]', ["x.json, line 2, column 7", "DSR005"]),
    ("x.json", b'{"a": 1}', ["x.json", "found an object", "DSR119"]),
    ("x.json", b'[{"a": 1}, [2]]', ["x.json, row 2", "found a list", "DSR123"]),
    ("x.json", b"", ["x.json", "DSR118"]),
    ("x.json", b"[" * 200_000, ["x.json", "too deeply", "DSR005"]),
    ("x.jsonl", GOOD + b"\n" + b'{"a": 1', ["x.jsonl, line 3, column", "DSR005"]),
    ("x.jsonl", GOOD + b"3\n", ["x.jsonl, line 2", "found a number", "DSR123"]),
    ("x.jsonl", GOOD + b"nul\n", ["x.jsonl, line 2", "DSR005"]),
    ("x.jsonl", GOOD * 2 + '{"a": "é"}'.encode("latin-1"), ["x.jsonl", "DSR116", "0xe9", "line 3"]),
    ("x.csv", b"a,b\n1,2\n1,2,3\n", ["x.csv, line 3", "3 fields", "2 columns", "DSR129"]),
    ("x.csv", b'a,b\n1,2\n"1,2\n', ["x.csv, line 3", "DSR127"]),
    ("x.tsv", b'a\tb\n"1" one\t2\t3\n', ["x.tsv, line 2: not CSV (a quote inside a cell must be doubled)", "DSR127"]),
    ("x.csv", b"a,b,\n1\n", ["x.csv, line 2: 1 field where the header has 2 columns", "DSR129"]),
    ("x.csv", b"a,a\n1,2\n", ["x.csv, line 1", "DSR128"]),
    ("x.csv", "a,b\n1,2\n請問台灣的首都在哪裡,2\n".encode("big5"), ["x.csv", "DSR116", "line 3", "iconv -f BIG5"]),
    ("x.csv", "a,b\n请问中国的首都在哪里,2\n".encode("gbk"), ["x.csv", "DSR116", "line 2", "iconv -f GB18030"]),
    ("x.csv", "a,b\r\n1,2\r\ncafé,2\r\n".encode("latin-1"), ["DSR116", "0xe9 in line 3", "iconv -f CP1252"]),
    ("x.csv", "a,b\r1,2\rcafé,2\r".encode("latin-1"), ["DSR116", "0xe9 in line 3"]),
    ("x.csv", "a,b\n1,2\n".encode("utf-16-le"), ["x.csv", "DSR117"]),
    ("x.tsv", "a\tb\n1\t2\n".encode("utf-16")[:-1], ["x.tsv", "damaged utf-16", "DSR116"]),
    ("x.csv", b"sep=;\r\na;b\r\n1;2\r\n3\r\n", ["x.csv, line 4: 1 field where", "2 columns", "semicolons", "DSR129"]),
    ("x.csv", b"a,b\r1,2\r3,4,5\r", ["x.csv, line 3: 3 fields", "2 columns", "DSR129"]),
    ("x.csv", b'a,b\n"1\n1",2\n,,\n3,4,5\n', ["x.csv, line 5: 3 fields", "DSR129"]),
    ("x.csv", b"a, b,b\n1,2,3\n", ["x.csv, line 1", "'b' appears twice", "DSR128"]),
    ("x.parquet", b"PAR1 this is none PAR1", ["x.parquet", "DSR122"]),
    ("x.parquet", b"", ["x.parquet", "DSR122"]),
    ("x.txt", b"one\ntwo \xff\n", ["x.txt", "DSR116", "0xff", "line 2"]),
    ("x.jsonl.gz", GOOD, ["x.jsonl.gz", "DSR115"]),
    ("x.jsonl.gz", gz_cut(GOOD), ["x.jsonl.gz", "DSR115"]),
    ("x.parquet.gz", gz_cut(GOOD), ["x.parquet.gz", "DSR115"]),
    ("x.csv.gz", gzip.compress(b"a,b\n1,\xe9\n"), ["x.csv.gz", "DSR116", "line 2"]),
    ("x.xml", b"<a/>", ["x.xml", "DSR110", ".jsonl"]),
]


PAIR = [{"a": "1", "b": "2"}, {"a": "3", "b": "4"}]
TABLES = {
    "semicolons": ("x.csv", b"\xef\xbb\xbfa;b\r\n1;2\r\n3;4\r\n", PAIR, [2, 3]),
    "semicolons, commas inside": ("x.csv", b"a;b\n1,5;2\n3,5;4\n", [{"a": "1,5", "b": "2"}, {"a": "3,5", "b": "4"}], [2, 3]),
    "commas, semicolons inside": ("x.csv", b"a,b\n1;5,2;\n3;5,4\n", [{"a": "1;5", "b": "2;"}, {"a": "3;5", "b": "4"}], [2, 3]),
    "a semicolon in a column name": ("x.csv", b"a,b;c\n1,2\n", [{"a": "1", "b;c": "2"}], [2]),
    "tabs": ("x.csv", b"a\tb\n1\t2\n3\t4\n", PAIR, [2, 3]),
    "bars": ("x.csv", b"a|b\n1|2\n3|4\n", PAIR, [2, 3]),
    "tsv with commas": ("x.tsv", b"a\tb\n1, one\t2\n", [{"a": "1, one", "b": "2"}], [2]),
    "tsv that is csv": ("x.tsv", b"a,b\n1,2\n3,4\n", PAIR, [2, 3]),
    "packed tsv": ("x.tsv.gz", gzip.compress(b"a\tb\n1\t2\n3\t4\n"), PAIR, [2, 3]),
    "sep=": ("x.csv", b"sep=,\r\na,b\r\n1,2\r\n3,4\r\n", PAIR, [3, 4]),
    "sep=^": ("x.csv", b'"SEP=^"\na^b\n1^2\n3^4\n', PAIR, [3, 4]),
    "empty rows": ("x.csv", b"\n,\na,b\n1,2\n,\n3,4\n , \n,,,\n", PAIR, [4, 6]),
    "padded rows": ("x.csv", b"a,b,,\n1,2,,\n3,4,,,,\n", PAIR, [2, 3]),
    "the index of pandas": ("x.csv", b",a,b\n0,1,2\n1,3,4\n", PAIR, [2, 3]),
    "spaces in the header": ("x.csv", b"a, b\n1,2\n3,4\n", PAIR, [2, 3]),
    "old Macs": ("x.csv", b"a,b\r1,2\r3,4\r", PAIR, [2, 3]),
    "quoted line ends": ("x.csv", b'a;b\r\n"1;\r\n1";2\r\n3;4\r\n', [{"a": "1;\r\n1", "b": "2"}, PAIR[1]], [2, 4]),
    "missing values": ("x.csv", b"a,b\nnan,NaN\nnull,N/A\nNA,\n", [{"a": "nan", "b": "NaN"}, {"a": "null", "b": "N/A"}, {"a": "NA", "b": ""}], [2, 3, 4]),
    "Unicode text of Excel": ("x.csv", "\ufeffa\tb\r\n1\t2\r\n3\t4\r\n".encode("utf-16-le"), PAIR, [2, 3]),
    "UTF-32": ("x.csv", "a,b\n1,2\n3,4\n".encode("utf-32"), PAIR, [2, 3]),
    "JSON lines in UTF-16": ("x.jsonl", '{"a": "1", "b": "2"}\n{"a": "3", "b": "4"}'.encode("utf-16"), PAIR, [1, 2]),
    "one column": ("x.csv", b'a\n"1, 2; 3"\n4\n', [{"a": "1, 2; 3"}, {"a": "4"}], [2, 3]),
    "a header that ends with a comma": ("x.csv", b"a,b,\n1,2\n3,4\n", PAIR, [2, 3]),
    "a header that ends with a semicolon": ("x.csv", b"a;b;\n1;2\n3;4\n", PAIR, [2, 3]),
    "a header that ends with a tab": ("x.csv", b"a\tb\t\n1\t2\n3\t4\n", PAIR, [2, 3]),
    "an empty cell under such a header": ("x.csv", b"a,x,b,\n1,,2\n", [{"a": "1", "x": "", "b": "2"}], [2]),
    "sep= padded": ("x.csv", b"sep=;;\r\na;b\r\n1;2\r\n3;4\r\n", PAIR, [3, 4]),
    "sep= quoted and padded": ("x.csv", b'"sep=,",\r\na,b\r\n1,2\r\n3,4\r\n', PAIR, [3, 4]),
    "tsv, plain quotes": ("x.tsv", b'a\tb\n"1" one\t2\n"ok"\t4\n', [{"a": '"1" one', "b": "2"}, {"a": "ok", "b": "4"}], [2, 3]),
    "tsv, quotes that would merge rows": ("x.tsv", b'a\tb\n"1\t2\n3"\t4\n', [{"a": '"1', "b": "2"}, {"a": '3"', "b": "4"}], [2, 3]),
    "tsv, a quote that never ends": ("x.tsv", b'a\tb\n"1\t2\n3\t4\n', [{"a": '"1', "b": "2"}, PAIR[1]], [2, 3]),
    "tsv, quoted": ("x.tsv", b'a\tb\n"1\t1"\t2\n3\t"4\n""4"""\n', [{"a": "1\t1", "b": "2"}, {"a": "3", "b": '4\n"4"'}], [2, 3]),
    "a header alone": ("x.csv", b"a;b\n", [], []),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_tables_as_spreadsheets_of_all_countries_write_them(tmp_path, name):
    file, raw, rows, lines = TABLES[name]
    (tmp_path / file).write_bytes(raw)
    located_rows = list(located(load_splits(str(tmp_path / file))["train"]))
    assert [row for _, row in located_rows] == rows
    assert [place for place, _ in located_rows] == [f"{tmp_path / file}, line {line}" for line in lines]


@needs_shared
@pytest.mark.parametrize("name", ["semi", "sep", "excel", "unnamed2", "nan_row"])
def test_the_tables_of_others_train(name):
    rows = load_splits(str(SHARED / "cases" / "rows" / f"{name}.csv"))["train"]
    records = [AlpacaLlamaSft.format_row(row) for row in rows]
    assert records and all(record["input"] == "" and record["output"] for record in records)


@pytest.mark.parametrize(("name", "raw", "parts"), DAMAGED, ids=[f"{case[0]}-{index}" for index, case in enumerate(DAMAGED)])
def test_a_damaged_file_says_where(tmp_path, name, raw, parts):
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(UserError) as error:
        list(load_splits(str(tmp_path / name))["train"])
    assert all(part in str(error.value) for part in parts) and "\n" not in str(error.value), error.value


def test_the_fingerprint_is_of_the_bytes(tmp_path):
    path = write(tmp_path / "rows.jsonl", ROWS)
    before = fingerprint(FileRows((path,)))
    assert before == fingerprint(load_splits(str(path))["train"])
    path.write_bytes(path.read_bytes().replace(b"eins", b"Eins"))
    assert fingerprint(FileRows((path,))) != before
    assert fingerprint([{"a": 1}]) == fingerprint([{"a": 1}]) != fingerprint([{"a": 2}])
