"""Write predictions and a contact sheet while they are computed, and check beforehand that they can be written."""

import contextlib
import os
import sys
import time
from pathlib import Path

from ..shared.images import BadImages
from .classify import Predictions
from .contact_sheet import SHEET_ENDINGS, write_contact_sheet
from .inputs import is_address
from .outputs import FORMATS, WRITERS, Prediction, open_output


def write_predictions(
    predictions: Predictions,
    output: Path | None,
    output_format: str,
    contact_sheet: Path | None = None,
    max_contact_sheet: int = 500,
    title: str = "",
) -> int:
    """
    Writes each prediction when it comes, and then a summary on standard error. Every process must call it; the first
    one writes.

    Args:
        predictions: what to write.
        output: the file to write; None for standard output.
        output_format: a key of `WRITERS`.
        contact_sheet: an HTML or PNG file for small pictures with their answers.
        max_contact_sheet: how many files the sheet shows, the first ones.
        title: the title of the sheet.

    Returns:
        How many files could not be classified.
    """
    start = time.perf_counter()
    bad, shown, num_classified = BadImages(), [], 0
    writer = WRITERS[output_format](predictions.files, predictions.num_answers)
    is_main = predictions.state.is_main_process
    with open_output(output) if is_main else contextlib.nullcontext(lambda text: None) as write:
        write(writer.header())
        for prediction in predictions:
            write(writer.row(prediction))
            num_classified += prediction.reason is None
            bad.add(prediction.records())
            if len(shown) < max_contact_sheet:
                shown.append(prediction)
        summary = f"{num_classified} of {len(predictions)} files classified"
        if is_main and contact_sheet:
            write_sheet(contact_sheet, shown, title, summary, len(predictions))
    if is_main:
        print(f"{summary} in {time.perf_counter() - start:.1f} s", bad.summary(), sep="\n", file=sys.stderr)
    return len(predictions) - num_classified


def write_sheet(path: Path, shown: list[Prediction], title: str, summary: str, num_files: int) -> None:
    if len(shown) < num_files:
        summary += f"; the first {len(shown)} are shown"
    write_contact_sheet(path, shown, title, summary)


def choose_format(output: Path | None, output_format: str | None) -> str:
    """The format that was asked for, or that of the file's ending; a table on standard output."""
    if output_format or output is None:
        return output_format or "table"
    if output.suffix.lower() not in FORMATS:
        raise ValueError(f"`output={output}` ends in none of {', '.join(FORMATS)}: give `format` too.")
    return FORMATS[output.suffix.lower()]


def check_targets(output: Path | None, contact_sheet: Path | None) -> None:
    """Raises a `ValueError` for files that cannot be written."""
    if contact_sheet is not None and contact_sheet.suffix.lower() not in SHEET_ENDINGS:
        raise ValueError(f"`contact_sheet={contact_sheet}` must end in {', '.join(SHEET_ENDINGS)}.")
    for name, path in {"output": output, "contact_sheet": contact_sheet}.items():
        if path is None:
            continue
        if path.exists() and not path.is_file():
            raise ValueError(f"`{name}={path}` is not a file that can be replaced: give another name.")
        if not path.absolute().parent.is_dir():
            raise ValueError(f"`{name}={path}`: there is no folder {path.absolute().parent}: create it first.")
    if output and contact_sheet and output.absolute() == contact_sheet.absolute():
        raise ValueError(f"`output` and `contact_sheet` are both {output}: give two names.")


def check_not_overwritten(files: list[str], targets: list[Path | None]) -> None:
    paths = {str(path.absolute()) for path in targets if path}
    if overwritten := [file for file in files if not is_address(file) and os.path.abspath(file) in paths]:
        raise ValueError(f"{overwritten[0]} is one of the images and would be overwritten: write to another file.")
