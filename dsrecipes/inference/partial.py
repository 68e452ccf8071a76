"""Answers that outlive a kill: appended to OUT.partial as they come, and put in order into OUT at the end."""

from __future__ import annotations

from pathlib import Path

from dsrecipes.errors import UserError
from dsrecipes.inference.job_file import Json, ResumableJsonl, json_lines, text_in
from dsrecipes.io.disk import write_whole


class PartialAnswers(ResumableJsonl):
    """Answers by index. Without an `out` nothing is written."""

    def __init__(self, out: Path | None, job: Json) -> None:
        """As ResumableJsonl."""
        super().__init__(out and out.with_name(f"{out.name}.partial"), "generate", job)
        self.out = out
        self.done: dict[int, str] = {}

    def take(self, line: Json) -> None:
        """Keep an answer."""
        self.done[line["index"]] = text_in(line, "answer")

    def finish(self, rows: list[Json]) -> None:
        """Write the rows to OUT, and remove OUT.partial."""
        if self.out is None or self.path is None:
            return
        try:
            write_whole(self.out, json_lines(rows))
            self.path.unlink()
        except OSError as error:
            raise UserError(
                f"{self.out}: cannot be written ({error.strerror}); mend that, and the same command goes on"
            ) from error
