"""
Checkpoints and results that are either complete or ignored. The last file written into a checkpoint lists all of its
files with their sizes. If a process is killed or the disk is full, the earlier checkpoints stay as they are. The files
of a finished run are written in a folder of their own, and move when all of them are on the disk.
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
UNFINISHED = ".unfinished"
# What `torch.save` says when it cannot write.
TORCH_CANNOT_WRITE = re.compile("PytorchStreamWriter|inline_container|iostream")


class CheckpointError(RuntimeError):
    """
    A checkpoint or the results cannot be written. The message says why, and names the last complete checkpoint.
    """


def step_of(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """The folders `checkpoint-<step>` in the order of their steps, complete or not."""
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted((path for path in folders if path.is_dir()), key=step_of)


def sizes_of(folder: Path) -> dict[str, int]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    return {str(path.relative_to(folder)): path.stat().st_size for path in files}


def is_complete(folder: Path) -> bool:
    """Whether every file of the checkpoint exists in full."""
    try:
        expected = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return expected.items() <= sizes_of(folder).items()


def find_last_checkpoint(output_dir: str | Path) -> Path | None:
    """The complete checkpoint with the most steps, or None. Incomplete ones are ignored with a warning."""
    for folder in reversed(list_checkpoints(output_dir)):
        if is_complete(folder):
            return folder
        logger.warning(f"{folder} is incomplete and ignored: the run was probably killed while it wrote it.")
    return None


@contextlib.contextmanager
def write_checkpoint(folder: Path, *, is_main_process: bool, wait_for_everyone, keep: int | None) -> Iterator[None]:
    """
    The block writes the files of a checkpoint into `folder`, in every process. After the block the checkpoint is
    complete, and only the last `keep - 1` of the earlier ones remain.

    Args:
        folder: `checkpoint-<step>` in the output folder.
        is_main_process: whether this process does the work that only one process may do.
        wait_for_everyone: called where processes have to wait for each other.
        keep: the number of checkpoints to keep. None or 0 keeps all.

    Raises:
        CheckpointError: if the block fails to write. The incomplete folder is removed, as after any other error.
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
    except (OSError, RuntimeError, SafetensorError) as error:
        if is_main_process:
            remove(folder)
        if not cannot_write(error):
            raise
        raise cannot_be_written(folder, folder.parent, error) from error
    if is_main_process:
        remove_earlier(folder, keep)


def remove_earlier(folder: Path, keep: int | None):
    """Removes the checkpoints before `folder` but for the last `keep - 1`; None or 0 keeps all."""
    earlier = [path for path in list_checkpoints(folder.parent) if step_of(path) < step_of(folder)]
    for old in earlier[: max(len(earlier) - keep + 1, 0)] if keep else []:
        remove(old)


@contextlib.contextmanager
def write_results(output_dir: Path, *, is_main_process: bool, wait_for_everyone) -> Iterator[Path]:
    """
    The block writes the files of a finished run into the folder that it gets, in every process. After the block they
    are in `output_dir`; after an error none of them is.

    Args:
        output_dir: the output folder. The folder of the block has the same name.
        is_main_process, wait_for_everyone: as for `write_checkpoint`.

    Raises:
        CheckpointError: if the block fails to write.
    """
    folder = output_dir / UNFINISHED / output_dir.resolve().name
    try:
        if is_main_process:
            remove(folder.parent)  # of a run that was killed here
            folder.mkdir(parents=True)
        wait_for_everyone()
        yield folder
        wait_for_everyone()
        if is_main_process:
            sync(folder)
            for file in folder.iterdir():
                os.replace(file, output_dir / file.name)
    except (OSError, RuntimeError, SafetensorError) as error:
        if not cannot_write(error):
            raise
        raise cannot_be_written(output_dir, output_dir, error) from error
    finally:
        if is_main_process:
            remove(folder.parent)


def cannot_write(error: Exception) -> bool:
    """Whether an error comes from the disk. PyTorch reports a full disk as a RuntimeError, like many other things."""
    return not isinstance(error, RuntimeError) or TORCH_CANNOT_WRITE.search(str(error)) is not None


def cannot_be_written(folder: Path, output_dir: Path, error: Exception) -> CheckpointError:
    last = find_last_checkpoint(output_dir)
    kept = f"The last complete checkpoint is {last}" if last else "There is no complete checkpoint"
    reason = str(error).partition("\n")[0] or type(error).__name__
    return CheckpointError(
        f"{folder} cannot be written: {reason}. {kept}. Free some disk space and run the same command again."
    )


def sync(folder: Path):
    """Waits until all files of a folder are on the disk."""
    for name in sizes_of(folder):
        with open(folder / name, "rb") as file:
            os.fsync(file.fileno())


def mark_complete(folder: Path):
    """Writes the list of files into a checkpoint, once all of them are on the disk."""
    sizes = sizes_of(folder)
    sync(folder)
    draft = folder / (MANIFEST + ".part")
    with open(draft, "w", encoding="utf-8") as file:
        json.dump({"files": sizes}, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, folder / MANIFEST)


def remove(folder: Path):
    """Removes a checkpoint, first its list of files: without it, the rest does not count."""
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def check_finite_weights(model: "nn.Module", step: int):
    """Raises a `FloatingPointError` if a weight is not finite: that checkpoint must not replace a good one."""
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise FloatingPointError(
                f"The weights {name} are not finite at step {step}, so this checkpoint is not written"
            )
