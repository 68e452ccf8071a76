"""GPT-2 as a causal language model on plain text: documents joined with eos and cut into blocks."""

from collections.abc import Iterable

from transformers import PreTrainedTokenizerBase

from dsrecipes.base import RecipeBase
from dsrecipes.config.encoding import EncodeOptions
from dsrecipes.data.documents import LineRows
from dsrecipes.data.encode import Segments, encode_texts
from dsrecipes.data.files import FileRows
from dsrecipes.data.parse import text_record
from dsrecipes.data.rows import Row


class Gpt2Clm(RecipeBase):
    """Every token is trained on; perplexity is reported at each evaluation."""

    cut_into_blocks = True

    def load_rows(self) -> dict[str, Iterable[Row]]:
        """Texts; the hub's WikiText, a row a line, as the documents it was cut from."""
        return {
            name: LineRows(rows) if not isinstance(getattr(rows, "rows", rows), FileRows) and LineRows.fit(rows) else rows
            for name, rows in super().load_rows().items()
        }

    @staticmethod
    def format_row(row: Row) -> dict:
        """A row's `text`; `end` false (a piece of a longer document) leaves out the eos behind it."""
        return text_record(row)

    @staticmethod
    def encode(records: list[dict], tokenizer: PreTrainedTokenizerBase, options: EncodeOptions) -> dict[str, list]:
        """Text as ids, all of them labels."""
        return encode_texts(records, tokenizer)

    @staticmethod
    def prompt(record: dict, options: EncodeOptions) -> Segments:
        """The text itself, which the model continues."""
        return [(record["text"], True)]
