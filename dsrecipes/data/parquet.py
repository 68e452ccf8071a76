"""How do Parquet files become rows? pyarrow is imported when the first such file is read."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dsrecipes.data.decode import open_bytes
from dsrecipes.data.row import Row, without_nulls
from dsrecipes.errors import UserError

_ROWS = 1024
"""Rows that are Python objects at a time."""


def read_parquet(path: Path) -> Iterator[tuple[str, Row]]:
    """Yield the rows of a file with their places."""
    import pyarrow.parquet

    with parquet_readable(path):
        number = 0
        # Parquet is read from its end, and gzip cannot seek, so a .gz is unpacked into memory
        source: Any = io.BytesIO(open_bytes(path).read()) if path.name.endswith(".gz") else path
        # in batches, because a row group takes many times its size as Python objects
        for batch in pyarrow.parquet.ParquetFile(source).iter_batches(_ROWS):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", without_nulls(row)


@contextlib.contextmanager
def parquet_readable(path: Path) -> Iterator[None]:
    """Turn what reading Parquet raises into a UserError."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:  # damaged, or a value that Python has no type for
        message = str(error).splitlines()[0]
        raise UserError("DSR122", f"{path}: not a Parquet file that can be read ({message})") from None
