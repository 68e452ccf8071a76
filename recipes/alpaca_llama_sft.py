"""Instruction tuning of Llama (or any causal language model) on Alpaca rows or chats; only the answers are trained on.

dsrecipes train alpaca_llama_sft --dataset my.json
"""

from transformers import PreTrainedTokenizerBase

from dsrecipes import EncodeOptions, RecipeBase, Row, Segments, encode_chats, encode_segments, instruction_record
from dsrecipes.data.chat_fit import joined_roles, leading_as_context, unanswered, weight_of
from dsrecipes.data.encode import weigh
from dsrecipes.data.parse import as_turns

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
"""Header note for rows that have some."""


class AlpacaLlamaSft(RecipeBase):
    """Instructions with answers, or chats.

    prompt_style alpaca uses Stanford's templates, which any tokenizer can encode; prompt_style chat uses the tokenizer's own
    chat template.
    """

    @staticmethod
    def format_row(row: Row) -> dict:
        """Return {"instruction", "input", "output"} or {"messages", perhaps "tools"}, whatever form the row has."""
        return instruction_record(row)

    @staticmethod
    def encode(records: list[dict], tokenizer: PreTrainedTokenizerBase, options: EncodeOptions) -> dict[str, list]:
        """Label the answers and the tokens that end them, with the weights of rows and turns."""
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
    """Convert a record to {"messages", "tools", "weight"}."""
    if "instruction" not in record:
        return record
    return {"messages": as_turns(record), "weight": record.get("weight")}


def _segments(record: dict) -> Segments:
    """Fill Stanford's template for each answer with the system's text and what the user wrote before that answer.

    Raises:
        ValueError: the row has tools, for which the templates have no form.
    """
    if "instruction" in record:
        return [(_prompt(record["instruction"], record["input"]), False), (record["output"], True)]
    # refused, since dropping them silently would train on answers to calls that nobody sees
    if record.get("tools") or any(turn.get("tool_calls") or turn["role"] == "tool" for turn in record["messages"]):
        raise ValueError("Stanford's templates have no form for tools; give --prompt_style chat")
    system: list[str] = []
    user: list[str] = []
    segments: Segments = []
    for turn in joined_roles(record["messages"]):
        if turn["role"] == "assistant":
            segments += [(_prompt("\n\n".join([*system, *user]), ""), False), (turn["content"], True)]
            # a template holds one instruction: earlier turns are not repeated in it
            user = []
        elif turn["role"] == "system":
            system.append(turn["content"])
        else:
            user.append(turn["content"])
    return segments


def _notes(record: dict, options: EncodeOptions) -> list[str]:
    """Lines for the header about this row."""
    if "messages" not in record:
        return []
    notes = unanswered(record["messages"])
    has_reasoning = any(turn.get("reasoning_content") for turn in record["messages"])
    return [NO_FORM, *notes] if has_reasoning and options.reasoning == "keep" else notes


def _prompt(instruction: str, more: str) -> str:
    return (WITH_INPUT if more else WITHOUT_INPUT).format(instruction=instruction, input=more)


def _weights(record: dict) -> list[float]:
    """The weight of each answer: the row's times the turn's."""
    row = weight_of(record, "the row")
    if "messages" not in record:
        return [row]
    # in the form in which _segments sees the turns, so that each weight meets its answer
    turns = joined_roles(leading_as_context(record["messages"]))
    return [row * weight_of(turn, f"turn {number}") for number, turn in enumerate(turns, 1) if turn["role"] == "assistant"]
