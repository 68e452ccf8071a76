"""Ours: seconds to read, tokenize, mask and pack rows; started by bench.py, in the same way as the others' --prepare.

.venv/bin/python benchmarks/prepare_ours.py --name ours --model .bench/model --data .bench/rows/FOLDER --out /tmp/o
"""

from __future__ import annotations

import time

from dsrecipes.recipes.alpaca_llama_sft import AlpacaLlamaSft
from meter import LENGTH, arguments, write_prepared
from transformers import AutoTokenizer

from dsrecipes.config.encoding import EncodeOptions
from dsrecipes.data.load import load_splits
from dsrecipes.data.prepare import prepare
from dsrecipes.data.sequences import Sequences
from dsrecipes.io.console import Console


def main() -> None:
    """Prepare once, with DSRECIPES_CACHE empty, and write the time."""
    args = arguments(__doc__, ("ours",))
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    began = time.perf_counter()
    split = prepare(
        AlpacaLlamaSft, load_splits(str(args.data / "alpaca.json")), tokenizer, EncodeOptions(LENGTH, "alpaca"),
        validation_split=0.0, seed=0, skip_bad_rows=True, console=Console(),
    )["train"]  # fmt: skip
    sequences = Sequences(split.path, LENGTH)
    write_prepared(args, time.perf_counter() - began, split.stats.rows, len(sequences))


if __name__ == "__main__":
    main()
