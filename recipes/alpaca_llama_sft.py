"""Llama (or any causal LM) on Alpaca instructions or chat messages; the loss is on the answers alone."""

from transformers import PreTrainedTokenizerBase

from dsrecipes.base import RecipeBase
from dsrecipes.data.encode import EncodeOptions, Segments, chat_segments, encode_segments
from dsrecipes.data.files import Row
from dsrecipes.data.formats import instruction_record
from dsrecipes.errors import UserError

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


class AlpacaLlamaSft(RecipeBase):
    """Rows of instructions and answers, or chats."""

    @staticmethod
    def format_row(row: Row) -> dict:
        """{"instruction", "input", "output"}, or {"messages", perhaps "tools"}; data/formats.py lists the forms of rows."""
        return instruction_record(row)

    @staticmethod
    def encode(records: list[dict], tokenizer: PreTrainedTokenizerBase, options: EncodeOptions) -> dict[str, list]:
        """Prompt and answer encoded apart; labels on the answer and its eos."""
        style = _chat if options.prompt_style == "chat" else _alpaca
        return encode_segments([style(record, tokenizer) for record in records], tokenizer)


def _alpaca(record: dict, tokenizer: PreTrainedTokenizerBase) -> Segments:
    if "messages" in record:
        record = _as_instruction(record["messages"])
    template = WITH_INPUT if record["input"] else WITHOUT_INPUT
    prompt = template.format(instruction=record["instruction"], input=record["input"])
    return [(prompt, False), (record["output"], True)]


def _as_instruction(messages: list[dict[str, str]]) -> dict:
    said = [turn["content"] for turn in messages if turn["role"] == "user"]
    answers = [turn["content"] for turn in messages if turn["role"] == "assistant"]
    system = [turn["content"] for turn in messages if turn["role"] == "system"]
    if len(answers) > 1:
        raise UserError(f"a chat of {len(answers)} answers has no place in Stanford's templates: give --prompt_style chat")
    return {"instruction": "\n\n".join([*system, said[0]]), "input": "", "output": answers[0]}


def _chat(record: dict, tokenizer: PreTrainedTokenizerBase) -> Segments:
    messages = record.get("messages") or [
        {"role": "user", "content": "\n\n".join(filter(None, (record["instruction"], record["input"])))},
        {"role": "assistant", "content": record["output"]},
    ]
    return chat_segments(messages, tokenizer)
