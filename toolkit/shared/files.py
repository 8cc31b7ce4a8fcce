"""Files and folders that are written completely or not at all."""

import contextlib
import json
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError


def check_output_dir(output_dir: str | Path) -> None:
    """
    Call it before the work, so that a mistake costs no time.

    Raises:
        ValueError: if `output_dir` is a file, a folder that is not empty, or where nothing can be written.
    """
    output_dir = Path(output_dir)
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise ValueError(f"{output_dir} exists and is not empty: choose another `output_dir`.")
    place = output_dir.resolve()
    if not _must_stay(place):
        place = next(folder for folder in place.parents if folder.exists())
    if not os.access(place, os.W_OK):
        raise ValueError(f"{output_dir} cannot be written, because {place} is read-only: choose another `output_dir`.")


def _must_stay(folder: Path) -> bool:
    """Whether no other folder can take the place of this one: a mount point, or one in a folder that is read-only."""
    return folder.is_dir() and (folder.is_mount() or not os.access(folder.parent, os.W_OK))


@contextlib.contextmanager
def folder_written_whole(output_dir: str | Path) -> Iterator[Path]:
    """
    Gives a temporary folder to write into, which becomes `output_dir` when the block ends. After an error, Ctrl+C or
    SIGTERM nothing is left of it. If `output_dir` is a mount point, its files appear one by one at the end.

    Args:
        output_dir: a folder that does not exist yet, or is empty. Missing parent folders are created.

    Raises:
        ValueError: if `output_dir` is a file, or a folder that is not empty.
        OSError: if the block cannot write, also where it writes safetensors.
    """
    output_dir = Path(output_dir).resolve()
    check_output_dir(output_dir)
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    stays = _must_stay(output_dir)
    place = output_dir if stays else output_dir.parent
    with (
        _disk_errors(output_dir),
        _exit_on_sigterm(),
        tempfile.TemporaryDirectory(dir=place, prefix=f".{output_dir.name}-") as scratch,
    ):
        folder = Path(scratch) / output_dir.name
        folder.mkdir()
        yield folder
        if stays:
            for path in sorted(folder.iterdir()):
                path.replace(output_dir / path.name)
        else:
            if output_dir.exists():
                output_dir.rmdir()  # Windows does not put a folder in the place of another
            folder.replace(output_dir)


@contextlib.contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """An error of safetensors, which has a type of its own, becomes an `OSError` like any other of a full disk."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error


@contextlib.contextmanager
def _exit_on_sigterm() -> Iterator[None]:
    """SIGTERM raises `SystemExit` in the block, so that files are cleaned up, unless the program handles it itself."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def stop(number: int, frame: Any):
        # A second signal must not interrupt the clean-up.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """
    Gives a temporary file to write, `<path>.part`, which replaces `path` when the block ends. An error or a signal
    leaves `path` as it was; only a kill also leaves the unfinished `.part` file.
    """
    part = path.with_name(path.name + ".part")
    try:
        with _disk_errors(path):
            yield part
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_json(path: str | Path, content: Any) -> None:
    """Writes a JSON file in one step: nobody sees it half written. Missing folders are created."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    with written_whole(path) as part:
        part.write_text(text, encoding="utf-8")


def read_json(path: str | Path) -> Any:
    """
    Raises:
        ValueError: if the file is not JSON.
        OSError: if it cannot be read.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a JSON file: {error}") from error
