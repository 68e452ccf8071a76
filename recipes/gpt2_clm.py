"""Causal language modeling on plain text with GPT-2: documents are joined with eos and cut into blocks.

dsrecipes train gpt2_clm --dataset my.txt
"""

from collections.abc import Iterable

from transformers import PreTrainedTokenizerBase

from dsrecipes import EncodeOptions, RecipeBase, Row, Segments, encode_texts, text_record
from dsrecipes.data.documents import LineRows
from dsrecipes.data.files import FileRows


class Gpt2Clm(RecipeBase):
    """Every token is trained on; each evaluation reports the perplexity."""

    cut_into_blocks = True

    def load_rows(self) -> dict[str, Iterable[Row]]:
        """Load texts; WikiText from the hub, which has a row per line, is joined to documents again."""
        return {name: _as_documents(rows) for name, rows in super().load_rows().items()}

    @staticmethod
    def format_row(row: Row) -> dict:
        """Return the row's `text`; `end` is false for a piece of a longer document, which no eos follows."""
        return text_record(row)

    @staticmethod
    def encode(records: list[dict], tokenizer: PreTrainedTokenizerBase, options: EncodeOptions) -> dict[str, list]:
        """Encode texts; all tokens are labels."""
        return encode_texts(records, tokenizer)

    @staticmethod
    def prompt(record: dict, options: EncodeOptions) -> Segments:
        """The text itself, which the model continues."""
        return [(record["text"], True)]


def _as_documents(rows: Iterable[Row]) -> Iterable[Row]:
    # a .txt file is split into documents when it is read; `rows` is what --columns wraps
    is_file = isinstance(getattr(rows, "rows", rows), FileRows)
    return LineRows(rows) if not is_file and LineRows.fit(rows) else rows
