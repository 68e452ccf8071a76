"""Llama (or any causal LM) on Alpaca instructions or chat messages; the loss is on the answers alone."""

from transformers import PreTrainedTokenizerBase

from dsrecipes.base import RecipeBase
from dsrecipes.config.encoding import EncodeOptions
from dsrecipes.data.chat import encode_chats
from dsrecipes.data.chat_fit import joined_roles, leading_as_context, unanswered, weight_of
from dsrecipes.data.encode import Segments, encode_segments, weigh
from dsrecipes.data.parse import as_turns, instruction_record
from dsrecipes.data.rows import Row

WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
"""Stanford's template (github.com/tatsu-lab/stanford_alpaca, train.py, PROMPT_DICT)."""
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
"""The same source's template for rows with an empty input."""
NO_FORM = "Stanford's templates have no form for reasoning, which is not trained on"
"""Note of rows that have some."""


class AlpacaLlamaSft(RecipeBase):
    """Rows of instructions and answers, or chats."""

    @staticmethod
    def format_row(row: Row) -> dict:
        """{"instruction", "input", "output"}, or {"messages", perhaps "tools"}; data/formats.py lists the forms of rows."""
        return instruction_record(row)

    @staticmethod
    def encode(records: list[dict], tokenizer: PreTrainedTokenizerBase, options: EncodeOptions) -> dict[str, list]:
        """Labels on the answers and the tokens that end them; weights of rows and turns."""
        if options.prompt_style == "chat":
            return encode_chats([_as_chat(record) for record in records], tokenizer, options)
        chats = [_as_chat(record) if "messages" in record else record for record in records]
        batch = encode_segments([_segments(chat) for chat in chats], tokenizer)
        return weigh(batch, [_weights(chat) for chat in chats]) | {"notes": [_notes(chat, options) for chat in chats]}

    @staticmethod
    def prompt(record: dict, options: EncodeOptions) -> Segments | dict:
        """The chat, or Stanford's templates up to the last answer."""
        return _as_chat(record) if options.prompt_style == "chat" else _segments(record)[:-1]


def _as_chat(record: dict) -> dict:
    """The record as {"messages", "tools", "weight"}."""
    if "instruction" not in record:
        return record
    return {"messages": as_turns(record), "weight": record.get("weight")}


def _segments(record: dict) -> Segments:
    """Stanford's templates, one behind the other: each holds the text of the system and of the user before an answer.

    Raises:
        ValueError: tools, for which they have no form.
    """
    if "instruction" in record:
        return [(_prompt(record["instruction"], record["input"]), False), (record["output"], True)]
    if record.get("tools") or any(turn.get("tool_calls") or turn["role"] == "tool" for turn in record["messages"]):
        raise ValueError("Stanford's templates have no form for tools; give --prompt_style chat")
    system: list[str] = []
    said: list[str] = []
    segments: Segments = []
    for turn in joined_roles(record["messages"]):
        if turn["role"] == "assistant":
            segments += [(_prompt("\n\n".join([*system, *said]), ""), False), (turn["content"], True)]
            said = []
        else:
            (system if turn["role"] == "system" else said).append(turn["content"])
    return segments


def _notes(record: dict, options: EncodeOptions) -> list[str]:
    if "messages" not in record:
        return []
    reasoned = any(turn.get("reasoning_content") for turn in record["messages"])
    return [*([NO_FORM] if reasoned and options.reasoning == "keep" else []), *unanswered(record["messages"])]


def _prompt(instruction: str, more: str) -> str:
    return (WITH_INPUT if more else WITHOUT_INPUT).format(instruction=instruction, input=more)


def _weights(record: dict) -> list[float]:
    """Of each answer."""
    row = weight_of(record, "the row")
    if "messages" not in record:
        return [row]
    turns = joined_roles(leading_as_context(record["messages"]))
    return [row * weight_of(turn, f"turn {number}") for number, turn in enumerate(turns, 1) if turn["role"] == "assistant"]
