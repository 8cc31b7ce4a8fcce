"""What the model says about each file, as CSV, JSON lines, or a table."""

import contextlib
import csv
import io
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..shared.console import one_line
from ..shared.files import written_whole


FORMATS = {".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".txt": "table"}
SCORE_DIGITS = 6
WIDEST_NAME = 60


@dataclass
class Prediction:
    """
    What the model says about one file.

    Args:
        file: its name as it was given, or found in a folder.
        answers: dictionaries of `label` and `score`, the best first; empty for a bad file.
        reason: why the file is bad; None if it is not.
        note: what had to be converted.
        thumbnail: a small picture for the contact sheet, as a JPEG.
    """

    file: str
    answers: list[dict[str, Any]] = field(default_factory=list)
    reason: str | None = None
    note: str | None = None
    thumbnail: bytes | None = None

    def records(self) -> list[dict[str, str]]:
        """The record of a bad or converted file for `BadImages`; empty for any other."""
        kind, reason = ("skipped", self.reason) if self.reason else ("converted", self.note)
        return [{"name": one_line(self.file), "kind": kind, "reason": one_line(reason)}] if reason else []


class CsvFormat:
    """One row per file: its name, the best `label` and `score`, the next best ones, and the `error` of a bad file."""

    def __init__(self, files: list[str], top_k: int):
        self.top_k = top_k

    def header(self) -> str:
        ranks = ["", *(f"_{rank}" for rank in range(2, self.top_k + 1))]
        return self._row("file", *(f"{name}{rank}" for rank in ranks for name in ("label", "score")), "error")

    def row(self, prediction: Prediction) -> str:
        cells = [
            cell for answer in prediction.answers for cell in (answer["label"], round(answer["score"], SCORE_DIGITS))
        ]
        cells += [""] * (2 * self.top_k - len(cells))
        return self._row(prediction.file, *cells, prediction.reason or "")

    @staticmethod
    def _row(*cells: Any) -> str:
        line = io.StringIO()
        csv.writer(line, lineterminator="\n").writerow(cells)
        return line.getvalue()


class JsonLinesFormat:
    """One object per file: `file`, and `answers` with `label` and `score`, or the `error` of a bad file."""

    def __init__(self, files: list[str], top_k: int):
        """Nothing to prepare; the formats are made alike."""

    def header(self) -> str:
        return ""

    def row(self, prediction: Prediction) -> str:
        answers = [
            {"label": answer["label"], "score": round(answer["score"], SCORE_DIGITS)} for answer in prediction.answers
        ]
        content = {"error": prediction.reason} if prediction.reason else {"answers": answers}
        return json.dumps({"file": prediction.file, **content}, ensure_ascii=False) + "\n"


class TableFormat:
    """Aligned lines for reading. Long names lose their beginning, and control characters become spaces."""

    def __init__(self, files: list[str], top_k: int):
        self.width = min(max((len(one_line(file)) for file in files), default=0), WIDEST_NAME)

    def header(self) -> str:
        return ""

    def row(self, prediction: Prediction) -> str:
        name = one_line(prediction.file)
        name = name if len(name) <= self.width else "…" + name[len(name) - self.width + 1 :]
        if prediction.reason:
            return f"{name:<{self.width}}  bad: {one_line(prediction.reason)}\n"
        answers = "  ".join(f"{answer['score']:6.1%} {one_line(answer['label'])}" for answer in prediction.answers)
        return f"{name:<{self.width}}  {answers}\n"


WRITERS = {"csv": CsvFormat, "jsonl": JsonLinesFormat, "table": TableFormat}


@contextlib.contextmanager
def open_output(path: Path | None) -> Iterator[Callable[[str], Any]]:
    """Gives a function that writes text to standard output, or to a file that appears when it is complete."""
    if path is None:
        # A letter that the terminal cannot show must not stop the command.
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="backslashreplace")
        # In a terminal, lines go above the progress bar.
        yield partial(tqdm.write, end="") if sys.stdout.isatty() else sys.stdout.write
        sys.stdout.flush()
        return
    # Bytes of a name that are not UTF-8 become \udc.., as JSON writes them.
    text = {"encoding": "utf-8", "errors": "backslashreplace", "newline": ""}
    with written_whole(path) as part, open(part, "w", **text) as file:
        yield file.write
