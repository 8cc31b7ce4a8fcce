"""
Checkpoints that are complete or ignored: a folder counts once a list of its files and their sizes stands in it, which
is written last. A process killed at any moment, or a full disk, leaves the earlier ones as they are.
"""

import contextlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError


if TYPE_CHECKING:
    from torch import nn

logger = logging.getLogger(__name__)

MANIFEST = "complete.json"


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; the message says why, and which one is the last that is complete."""


def step_of(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """The folders `checkpoint-<step>` in order of their steps, complete or not."""
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted((path for path in folders if path.is_dir()), key=step_of)


def sizes_of(folder: Path) -> dict[str, int]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    return {str(path.relative_to(folder)): path.stat().st_size for path in files}


def is_complete(folder: Path) -> bool:
    """Whether every file of the checkpoint is there in full."""
    try:
        expected = json.loads((folder / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return expected.items() <= sizes_of(folder).items()


def find_last_checkpoint(output_dir: str | Path) -> Path | None:
    """The complete checkpoint with the most steps, or None; half-written ones are ignored with a warning."""
    for folder in reversed(list_checkpoints(output_dir)):
        if is_complete(folder):
            return folder
        logger.warning(f"{folder} is incomplete, probably from a run that was killed while writing it: ignored.")
    return None


@contextlib.contextmanager
def write_checkpoint(folder: Path, *, is_main_process: bool, wait_for_everyone, keep: int | None) -> Iterator[None]:
    """
    The block writes the files of a checkpoint into `folder`, on every process; behind it the checkpoint is complete,
    and of the earlier ones the last `keep - 1` remain.

    Args:
        folder: `checkpoint-<step>` in the output folder.
        is_main_process: whether this process does what only one must do.
        wait_for_everyone: called where processes have to wait for each other.
        keep: how many checkpoints to keep; None or 0: all.

    Raises:
        CheckpointError: if the block fails to write; the half-written folder is removed.
    """
    if is_main_process:
        # Files of a run that was killed here must not mix with the new ones.
        remove(folder)
    wait_for_everyone()
    try:
        yield
        wait_for_everyone()
        if is_main_process:
            mark_complete(folder)
    # torch reports a full disk as a RuntimeError.
    except (OSError, RuntimeError, SafetensorError) as error:
        if is_main_process:
            remove(folder)
        last = find_last_checkpoint(folder.parent)
        kept = f"The last complete checkpoint is {last}" if last else "There is no complete checkpoint"
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise CheckpointError(
            f"{folder} could not be written: {reason}. {kept}. Make room on the disk and run the same command again."
        ) from error
    if is_main_process and keep:
        earlier = [path for path in list_checkpoints(folder.parent) if step_of(path) < step_of(folder)]
        for old in earlier[: max(len(earlier) - keep + 1, 0)]:
            remove(old)


def mark_complete(folder: Path):
    """Lists the files of a checkpoint in it, once they are all on the disk."""
    sizes = sizes_of(folder)
    for name in sizes:
        with open(folder / name, "rb") as file:
            os.fsync(file.fileno())
    draft = folder / (MANIFEST + ".part")
    with open(draft, "w") as file:
        json.dump({"files": sizes}, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, folder / MANIFEST)


def remove(folder: Path):
    """Removes a checkpoint, which stops counting as one before the first of its other files goes."""
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def check_finite_weights(model: "nn.Module", step: int):
    """Raises `FloatingPointError` if a weight is not finite: such a checkpoint must not replace a good one."""
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise FloatingPointError(
                f"The weights `{name}` are not finite at step {step}: this checkpoint is not written"
            )
