"""Rows and files in the formats that are in use, as the records that a recipe trains on."""

import json

import pandas
import pyarrow
import pyarrow.parquet
import pytest
from dsrecipes.recipes.alpaca_llama_sft import AlpacaLlamaSft
from dsrecipes.recipes.gpt2_clm import Gpt2Clm
from support.tiny import SHARED, needs_shared, write_rows

from dsrecipes.config.schema import DataConfig
from dsrecipes.config.values import parse_columns
from dsrecipes.data.load import load_splits
from dsrecipes.data.parse import instruction_record, with_answer
from dsrecipes.data.records import Records
from dsrecipes.data.renamed import renamed
from dsrecipes.data.row import located
from dsrecipes.data.usage import ColumnUsage
from dsrecipes.errors import UserError


def turns_of(text):
    """Parse `S:..|U:..|A:..|T:..` as turns."""
    roles = {"S": "system", "U": "user", "A": "assistant", "T": "tool"}
    return [{"role": roles[turn[0]], "content": turn[2:]} for turn in text.split("|")]


def chat(text, **changes):
    """Build the record of a chat; turn2={...} adds to a turn, other changes to the record."""
    turns = turns_of(text)
    for key in [key for key in changes if key.startswith("turn")]:
        turns[int(key[4:])] |= changes.pop(key)
    return {"messages": turns} | changes


def alpaca(instruction, output, context=""):
    return {"instruction": instruction, "input": context, "output": output}


def read(path, recipe=AlpacaLlamaSft, columns=None, skip=False):
    """Return {split: records} of a file, and what was counted."""
    records, seen = {}, ColumnUsage()
    for name, rows in renamed(load_splits(str(path)), columns or {}).items():
        source = Records(recipe.format_row, rows, skip)
        records[name] = [record for _, record in source]
        seen.merge(source.seen)
    return records, seen


# ---- the files of cases/rows ----

CALL = {"type": "function", "function": {"name": "w", "arguments": {"c": "Oslo"}}}
TOOL = {"type": "function", "function": {"name": "w", "parameters": {}}}
PENGUINS = "U:Where do penguins live?|A:In the cold south.|U:And bears?|A:In the north."
CASES = {
    "bot_role.jsonl": [chat("U:ping|A:pong")],
    "columns.json": [alpaca("Say a", "a"), alpaca("Say b", "b")],
    "consec.jsonl": [chat("U:Hi|U:are you there|A:Yes|A:I am here"), chat("U:Hi|A:Yes")],
    "contentparts.jsonl": [chat("U:Hi there|A:Hello")],
    "dev_role.jsonl": [chat("S:Be brief|U:M?|A:m")],
    "dolly.jsonl": [alpaca("Sky is", "blue", "the sky")],
    "excel.csv": [alpaca('Say "a"', "line 1\nline 2"), alpaca("Say b", "b")],
    "history.json": [chat("U:Penguins?|A:South.|U:And bears?|A:North.")],
    "lol.json": [chat("U:foo?|A:bar")] * 2,
    "messages_empty.jsonl": [chat("U:a|A:b")],
    "model_role.jsonl": [chat("U:ping|A:pong")],
    "multi.jsonl": [chat(PENGUINS), chat("U:2+2?|A:4")],
    "multi1.jsonl": [chat(PENGUINS)],
    "multisys.jsonl": [chat("S:Be brief.|" + PENGUINS)],
    "nan_row.csv": [alpaca("Say a", "a"), alpaca("Say b", "b"), alpaca("Say c", "c")],
    "nulls.jsonl": [alpaca("Say a", "a"), alpaca("Say d", "d")],
    "prompt_completion.jsonl": [alpaca("Sky is", " blue")],
    "reasoning.jsonl": [chat("U:2+2?|A:4", turn1={"reasoning_content": "two and two"})],
    "semi.csv": [alpaca("Say a", "a"), alpaca("Say b", "b")],
    "sep.csv": [alpaca("Say a", "a")],
    "starts_asst.jsonl": [chat("S:You are Tom.|A:Hi, I am Tom.|U:ping|A:pong")],
    "surrogate.jsonl": [alpaca("b", "c")],
    "sys_column.jsonl": [chat("S:Answer in pirate speech.|U:Hello?|A:Arr.")],
    "system.json": [chat("S:Answer in French.|U:Say hello|A:Bonjour")],
    "tools.jsonl": [
        chat("U:Weather in Oslo?|A:|T:4 C|A:It is 4 C.", turn1={"tool_calls": [CALL]}, turn2={"tool_call_id": "1"}, tools=[TOOL])
    ],
    "unnamed2.csv": [alpaca("Say a", "a"), alpaca("Say b", "b")],
    "weight.jsonl": [chat("U:Hi|A:bad|U:again|A:good", turn1={"weight": 0.0})],
    "wrapped_train.json": [alpaca("Say a", "a"), alpaca("Say b", "b")],
}  # fmt: skip
REFUSED = {
    "messages_empty.jsonl": "line 1: field 'messages' must be a list of turns .* found an empty list",
    "nulls.jsonl": "line 2: field 'output' is missing",
    "surrogate.jsonl": r"line 1: field 'instruction' holds half of a surrogate pair \(.*ud83d, character 7\)",
}


@needs_shared
def test_every_file_of_the_cases():
    folder = SHARED / "cases" / "rows"
    others = {"strings.json": 5, "long.jsonl": 8, "toolcall_text.jsonl": 1}
    assert {path.name for path in folder.iterdir()} == CASES.keys() | others.keys()
    for name, expected in CASES.items():
        assert read(folder / name, skip=name in REFUSED)[0] == {"train": expected}, name
    for name, count in others.items():
        assert len(read(folder / name, Gpt2Clm if name == "strings.json" else AlpacaLlamaSft)[0]["train"]) == count
    for name, problem in REFUSED.items():
        with pytest.raises(UserError, match=f"{name}, {problem}"):
            read(folder / name)
    assert read(folder / "dolly.jsonl")[1].describe() == [
        "Alpaca rows (instruction, context, response)", "unused columns: category",
    ]  # fmt: skip


# ---- forms of rows ----

TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
ROWS = {
    "query": ({"query": "q", "response": "a"}, alpaca("q", "a")),
    "question": ({"question": "2+2?", "answer": 4}, alpaca("2+2?", "4")),
    "question with context": ({"context": "c", "question": "q", "answer": True}, alpaca("q", "true", "c")),
    "problem": ({"problem": "q", "solution": "a", "source": "x"}, alpaca("q", "a")),
    "capitals": ({"Question": "q", "Answer": "a"}, alpaca("q", "a")),
    "inputs and targets": ({"inputs": "q", "targets": "a"}, alpaca("q", "a")),
    "other formats' columns are empty": ({"messages": None, "prompt": "p", "completion": "c", "text": ""}, alpaca("p", "c")),
    "chat next to its prompt": ({"prompt": "q", "messages": TURNS}, chat("U:q|A:a")),
    "TRL": ({"prompt": TURNS + TURNS[:1], "completion": TURNS[1:]}, chat("U:q|A:a|U:q|A:a", turn1={"weight": 0.0})),
    "turns and text": ({"prompt": [{"role": "user", "content": "q"}], "response": "a"}, chat("U:q|A:a")),
    "system and input": ({"system": "s", "instruction": "i", "input": "x", "output": "o"}, chat("S:s|U:i\n\nx|A:o")),
    "system_prompt": ({"system_prompt": "s", "question": "q", "response": "a"}, chat("S:s|U:q|A:a")),
    "no system": ({"system": "", "history": [], "tools": "null", "instruction": "i", "output": "o"}, alpaca("i", "o")),
    "system prompt twice": ({"system": "s", "messages": turns_of("S:s|U:q|A:a")}, chat("S:s|U:q|A:a")),
    "history of turns": ({"history": TURNS, "prompt": "p", "response": "r"}, chat("U:q|A:a|U:p|A:r")),
    "history in a table": ({"history": '[["q", "a"]]', "instruction": "i", "output": "o"}, chat("U:q|A:a|U:i|A:o")),
    "a row's weight": ({"instruction": "i", "output": "o", "weight": 2}, alpaca("i", "o") | {"weight": 2.0}),
    "a chat's weight": ({"messages": TURNS, "weight": "0.5"}, chat("U:q|A:a", weight=0.5)),
    "weight 1": ({"messages": TURNS, "weight": 1.0}, chat("U:q|A:a")),
    "JSON text": ({"messages": json.dumps(TURNS)}, chat("U:q|A:a")),
    "struct of lists": ({"messages": {"role": ["user", "assistant"], "content": ["q", "a"]}}, chat("U:q|A:a")),
    "letter case": ({"conversations": [{"from": "Human", "value": "q"}, {"from": " GPT ", "value": "a"}]}, chat("U:q|A:a")),
    "speakers": ({"dialogue": [{"speaker": "user", "text": "q"}, {"speaker": "AI", "text": "a"}]}, chat("U:q|A:a")),
    "roles as keys": ({"conversation": [{"human": "q", "assistant": "a"}]}, chat("U:q|A:a")),
    "pairs": ({"conversation": [["q", "a"], ["r", "b"]]}, chat("U:q|A:a|U:r|A:b")),
    "roles and texts": ({"messages": [["user", "q"], ["assistant", "a"]]}, chat("U:q|A:a")),
    "train": ({"messages": [TURNS[0], TURNS[1] | {"train": False}, *TURNS]}, chat("U:q|A:a|U:q|A:a", turn1={"weight": 0.0})),
    "numbers": ({"messages": [{"role": "user", "content": 1}, {"role": "assistant", "content": 2.5}]}, chat("U:1|A:2.5")),
    "thinking": ({"messages": [TURNS[0], TURNS[1] | {"thinking": "t"}]}, chat("U:q|A:a", turn1={"reasoning_content": "t"})),
    "<think> stays": ({"messages": turns_of("U:q|A:<think>t</think>a")}, chat("U:q|A:<think>t</think>a")),
    "ShareGPT tools": (
        {
            "tools": json.dumps([TOOL["function"]]),
            "conversations": [
                {"from": "human", "value": "q"}, {"from": "function_call", "value": '{"name": "w", "arguments": {"c": "Oslo"}}'},
                {"from": "observation", "value": "4 C"}, {"from": "gpt", "value": "a"},
            ],
        },
        chat("U:q|A:|T:4 C|A:a", turn1={"tool_calls": [CALL]}, tools=[TOOL]),
    ),
    "old OpenAI": (
        {"messages": [TURNS[0], {"role": "assistant", "content": None, "function_call": {"name": "w", "arguments": '{"c": "Oslo"}'}},
                      {"role": "function", "name": "w", "content": {"t": 4}}, TURNS[1]]},
        chat('U:q|A:|T:{"t": 4}|A:a', turn1={"tool_calls": [CALL]}, turn2={"name": "w"}),
    ),
    "ipython": ({"messages": [*TURNS, {"role": "ipython", "content": [1, 2]}, TURNS[1]]}, chat("U:q|A:a|T:[1, 2]|A:a")),
    "an id of a call": (
        {"messages": [TURNS[0], {"role": "assistant", "tool_calls": [{"id": "c1", "name": "w", "arguments": ""}]}]},
        chat("U:q|A:", turn1={"tool_calls": [{"id": "c1", "type": "function", "function": {"name": "w", "arguments": {}}}]}),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_a_row_becomes_a_record(name):
    row, record = ROWS[name]
    before = json.dumps(row)
    assert instruction_record(row) == record == ColumnUsage().format(AlpacaLlamaSft.format_row, row)
    assert json.dumps(row) == before  # a row is read more than once


WRONG = {
    "preference": ({"prompt": "p", "chosen": "a", "rejected": "b"}, r"preference row .*--columns completion=chosen"),
    "preference of chats": ({"prompt": "p", "chosen": TURNS, "rejected": TURNS}, "--columns messages=chosen"),
    "preference alone": ({"chosen": TURNS, "rejected": TURNS}, "--columns messages=chosen"),
    "a turn": (TURNS[0], "a single turn, where a row must be a whole chat"),
    "text": ({"text": "x"}, r"the row has text; expected one of: messages; instruction, output; .*gpt2_clm.*--columns"),
    "nothing": ({}, "the row has nothing"),
    "no answer": ({"prompt": "p"}, r"field 'completion' is missing \(the row has: prompt\)"),
    "null question": ({"instruction": None, "input": "c", "output": "c"}, "field 'instruction' is missing"),
    "weight": ({"instruction": "i", "output": "o", "weight": "5 kg"}, "field 'weight' must be a weight .*found '5 kg'"),
    "tools": ({"messages": TURNS, "tools": "weather"}, "field 'tools' is text, but not JSON"),
    "object": ({"instruction": "i", "output": {"x": 1}}, "field 'output' must be text, found dict"),
    "tool": ({"messages": TURNS, "tools": [3]}, "field 'tools': tool 1 must be an object"),
    "history": ({"instruction": "i", "output": "o", "history": [["q"]]}, "history: turn 1 must be an object"),
    "call": (
        {"conversations": [{"from": "function_call", "value": "w()"}]},
        "conversations: turn 1 has tool calls: .*not JSON",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_faulty_row_gets_a_message_with_what_was_expected(name):
    row, problem = WRONG[name]
    with pytest.raises(ValueError, match=problem):
        instruction_record(row)


def test_a_text_recipe_takes_texts_and_names_the_recipe_for_others():
    assert [Gpt2Clm.format_row(row)["text"] for row in ({"text": "a"}, {"content": "b"}, {"Document": "c", "id": 1})] == [
        "a",
        "b",
        "c",
    ]
    with pytest.raises(ValueError, match="Alpaca rows.*recipe alpaca_llama_sft .*--columns text=COLUMN"):
        Gpt2Clm.format_row({"instruction": "i", "output": "o"})
    with pytest.raises(ValueError, match="chats.*alpaca_llama_sft"):
        Gpt2Clm.format_row({"messages": TURNS})
    with pytest.raises(ValueError, match=r"field 'text' is missing \(the row has: title\)"):
        Gpt2Clm.format_row({"title": "t"})


def test_an_answer_is_added_to_rows_without_one():
    for row, column in (
        ({"prompt": "p"}, "completion"),
        ({"query": "q", "response": ""}, "response"),
        ({"instruction": "i"}, "output"),
    ):
        assert with_answer(row, "x") == (row | {column: "x"}, False)
    complete, answered = with_answer({"conversations": [{"from": "human", "value": "q"}]}, "x")
    assert instruction_record(complete) == chat("U:q|A:x") and not answered
    assert instruction_record(with_answer({"messages": [["user", "q"]]}, "x")[0]) == chat("U:q|A:x")
    for row in ({"question": "q", "answer": 4}, {"messages": TURNS}, {"title": "t"}):
        assert with_answer(row, "x") == (row, True)


# ---- shapes of files ----

PAIR = [{"instruction": "i", "output": "o"}, {"instruction": "j", "output": "p"}]
FRAME = pandas.DataFrame(PAIR)
FILES = {
    "columns of lists": {"instruction": ["i", "j"], "output": ["o", "p"]},
    "one column too": {"messages": [TURNS, TURNS]},
    "one chat": {"messages": TURNS, "tools": []},
    "pandas": json.loads(FRAME.to_json()),
    "records": json.loads(FRAME.to_json(orient="records")),
    "split": json.loads(FRAME.to_json(orient="split")),
    "table": json.loads(FRAME.to_json(orient="table")),
    "index": json.loads(FRAME.to_json(orient="index")),
    "data": {"version": 1, "data": PAIR},
    "rows": {"rows": PAIR, "features": []},
    "splits": {"train": PAIR, "dev": PAIR[:1], "test": {"instruction": ["i"], "output": ["o"]}, "version": "1"},
    "splits in data": {"data": {"train": PAIR, "validation": PAIR[:1]}},
    "lists of turns": [TURNS, TURNS],
    "splits of chats": {"train": [TURNS], "valid": [TURNS]},
}
CHATS = ("one column too", "one chat", "lists of turns", "splits of chats")


# of a big file only the first level is searched for splits
SIZES = [(name, big) for name in FILES for big in (False, True) if not (big and name == "splits in data")]


@pytest.mark.parametrize(("name", "big"), SIZES)
def test_a_json_file_of_each_shape(name, big, tmp_path, monkeypatch):
    monkeypatch.setattr("dsrecipes.data.json_files._BIG", 0 if big else 1 << 30)
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(FILES[name], indent=1))
    records, seen = read(path)
    sizes = {split: len(values) for split, values in records.items()}
    expected = {
        "splits": {"train": 2, "validation": 1, "test": 1}, "splits in data": {"train": 2, "validation": 1},
        "splits of chats": {"train": 1, "validation": 1}, "one chat": {"train": 1},
    }  # fmt: skip
    assert sizes == expected.get(name, {"train": 2})
    assert records["train"][0] == (chat("U:q|A:a") if name in CHATS else alpaca("i", "o")) and not seen.unused
    places = [place for rows in load_splits(str(path)).values() for place, _ in located(rows)]
    assert len(set(places)) == sum(sizes.values())


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ({"instruction": ["a", "b"], "output": ["c"]}, r"different lengths \(instruction 2, output 1\)"),
        ({"a": {"x": 1}, "b": {"x": 2}}, "rows cannot be told from columns.*orient"),
        (
            {"columns": ["instruction", "output"], "data": [["a"]]},
            r"row 1: expected 2 values \(instruction, output\), found 1 values",
        ),
        ({"instruction": "a", "output": "b"}, r"found an object \(instruction, output\)"),
        ([["a", "b"]], "row 1: expected an object with named fields.*found a list of text"),
        ([PAIR], r"row 1: a list of objects that are not turns \(instruction, output\)"),
        (3, "expected a list of rows, found a number"),
        ({"train": PAIR, "extra": PAIR}, "lists of rows train, extra, which are not all splits"),
    ],
)
def test_json_of_another_shape_is_refused(value, problem, tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps(value))
    with pytest.raises(UserError, match=f"rows.json.*{problem}"):
        read(tmp_path / "rows.json")


def test_lines_that_are_lists_or_texts(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, (TURNS, {"messages": TURNS}))))
    assert read(tmp_path / "a.jsonl")[0]["train"] == [chat("U:q|A:a")] * 2
    (tmp_path / "b.jsonl").write_text('"one"\n"two"\n')
    assert [record["text"] for record in read(tmp_path / "b.jsonl", Gpt2Clm)[0]["train"]] == ["one", "two"]


def test_structs_of_lists_and_of_arrow(tmp_path):
    rows = [
        {"messages": TURNS, "tools": None},
        {"messages": [TURNS[0], {"role": "assistant", "content": None, "tool_calls": [CALL]}, *turns_of("T:4|A:a")], "tools": [TOOL | {"type": "function"}]},
    ]  # fmt: skip
    rows[1]["tools"] = [{"type": "function", "function": {"name": "w", "parameters": {"type": "object"}}}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    expected = chat("U:q|A:|T:4|A:a", turn1={"tool_calls": [CALL]}, tools=rows[1]["tools"])
    assert read(tmp_path / "a.parquet")[0]["train"] == [chat("U:q|A:a"), expected]  # without the nulls of Arrow
    lists = {"messages": [{"role": ["user", "assistant"], "content": ["q", "a"]}]}
    pyarrow.parquet.write_table(pyarrow.table(lists), tmp_path / "b.parquet")
    assert read(tmp_path / "b.parquet")[0]["train"] == [chat("U:q|A:a")]


def test_a_hub_data_set_has_no_nulls_of_arrow():
    from datasets import Dataset

    turns = [TURNS[0], TURNS[1] | {"tool_calls": [CALL]}, {"role": "tool", "content": "4"}, TURNS[1]]
    rows = Dataset.from_list([{"messages": turns}, {"messages": TURNS}])
    records = [record for _, record in Records(AlpacaLlamaSft.format_row, rows, False)]
    assert records == [chat("U:q|A:a|T:4|A:a", turn1={"tool_calls": [CALL]}), chat("U:q|A:a")]


def test_files_of_splits_in_a_folder(tmp_path):
    (tmp_path / "all.json").write_text(json.dumps({"train": PAIR, "test": PAIR[:1]}))
    (tmp_path / "dataset_info.json").write_text("{}")
    write_rows(tmp_path / "train.jsonl", PAIR)
    assert {name: len(rows) for name, rows in read(tmp_path)[0].items()} == {"train": 4, "test": 1}


# ---- --columns, and what is counted ----


def test_columns_under_other_names(tmp_path):
    path = write_rows(
        tmp_path / "a.jsonl", [{"q": "i", "a": 4, "output": "old", "n": {"c": "x", "d": 1}}, {"q": "j", "a": "p"}]
    )
    records, seen = read(path, columns={"prompt": "q", "output": "a", "context": "n.c"})
    assert records["train"] == [alpaca("i", "4", "x"), alpaca("j", "p")]
    assert seen.describe() == [
        "prompts and completions (prompt, output, context)",
        "unused columns: n (in 1 row), output (replaced by --columns) (in 1 row)",
    ]
    with pytest.raises(UserError, match=r"--columns output=anser: .*a.jsonl .*'anser'.*q, a, output, n.*DSR130"):
        read(path, columns={"output": "anser"})
    chats = write_rows(tmp_path / "b.jsonl", [{"messages": TURNS, "question": "i", "reply": "o"}])
    assert read(chats, columns={"answer": "reply"})[0]["train"] == [alpaca("i", "o")]  # what is mapped is what is trained on
    assert read(chats, Gpt2Clm, {"text": "reply"})[0]["train"] == [{"text": "o", "end": True}]
    both = write_rows(tmp_path / "c.jsonl", [{"instruction": "i", "q": "p", "a": "o"}])
    assert read(both, columns={"prompt": "q", "completion": "a"})[0]["train"] == [alpaca("p", "o")]
    with pytest.raises(UserError, match=r"--columns instrution=.*\(did you mean instruction\?\).*DSR131"):
        read(both, columns={"instrution": "q", "output": "a"})


def test_columns_as_flag_and_mapping():
    expected = {"prompt": "question", "output": "answer"}
    for value in (["prompt=question,output=answer"], ["prompt=question", "output=answer"], expected, [json.dumps(expected)]):
        assert parse_columns(value) == DataConfig(columns=value).columns == expected
    for value in (["prompt"], ["=a"], ["a=b,a=c"], ["a="], {"prompt": None}, {"prompt": ["a"]}):
        with pytest.raises(UserError, match="DSR062"):
            DataConfig(columns=value)
    with pytest.raises(UserError, match='columns {"prompt": .*not JSON'):
        DataConfig(columns=['{"prompt": "a"'])


@pytest.mark.parametrize("orient", ["split", "table"])
def test_an_index_of_pandas_that_is_no_number_is_a_column(orient, tmp_path):
    frame = pandas.DataFrame({"instruction": ["i"], "output": ["o"]}, index=["a"])
    frame.to_json(tmp_path / "a.json", orient=orient)
    assert read(tmp_path / "a.json")[1].describe()[1:] == ["unused columns: index"]


def test_formats_and_unused_columns_are_counted_and_merged():
    rows = [{"instruction": "i", "output": "o", "id": 0}, {"messages": [TURNS[0] | {"time": 5}, TURNS[1]], "source": ""}]
    parts = [ColumnUsage(), ColumnUsage()]
    for part, row in zip(parts, rows, strict=True):
        part.format(AlpacaLlamaSft.format_row, row)
    parts[0].merge(parts[1])
    parts[0].merge(ColumnUsage(**json.loads(json.dumps(vars(parts[1])))))
    assert parts[0].describe() == [
        "2 chats (messages), 1 Alpaca rows (instruction, output)",
        "unused columns: id (in 1 row), messages.time (in 2 rows)",
    ]


def test_the_columns_of_a_users_own_recipe_are_observed():
    own = ColumnUsage()
    for row in ({"title": "t", "body": "b", "id": 3}, {"title": "t", "body": None, "id": 0}):
        own.format(lambda row: {"text": row["title"] + (row.get("body") or "")}, row)
    assert own.describe() == ["rows (title, body)", "unused columns: id"]
    whole = ColumnUsage()
    assert whole.format(lambda row: row, {"a": 1}) == {"a": 1} and whole.format(lambda row: {**row}, {"a": 1}) == {"a": 1}
    assert whole.format(lambda row: row | {"b": 2}, {"a": 1}) == {"a": 1, "b": 2} and not whole.unused
