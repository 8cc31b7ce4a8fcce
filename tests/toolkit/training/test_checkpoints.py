"""Checkpoints are either complete or ignored."""

import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import tiny_model
from safetensors.torch import save_file

from hpool_vit.toolkit.training.checkpoints import (
    CheckpointError,
    check_finite_weights,
    find_last_checkpoint,
    is_complete,
    list_checkpoints,
    remove_earlier,
    step_of,
    write_checkpoint,
    write_results,
)


def write(folder: Path, files: dict[str, bytes], keep: int | None = None):
    with write_checkpoint(folder, is_main_process=True, wait_for_everyone=lambda: None, keep=keep):
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)


def test_a_checkpoint_is_complete_once_all_its_files_are_written(tmp_path):
    folder = tmp_path / "checkpoint-3"
    with write_checkpoint(folder, is_main_process=True, wait_for_everyone=lambda: None, keep=None):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"weights")
        assert not is_complete(folder)
        assert find_last_checkpoint(tmp_path) is None
    assert is_complete(folder)
    assert find_last_checkpoint(tmp_path) == folder


def test_the_last_checkpoint_is_the_one_with_the_most_steps(tmp_path):
    for step in (9, 100, 20):
        write(tmp_path / f"checkpoint-{step}", {"a": b"1"})
    (tmp_path / "checkpoint-200.txt").write_text("no folder")
    (tmp_path / "checkpoint-best").mkdir()
    assert [folder.name for folder in list_checkpoints(tmp_path)] == [
        "checkpoint-9",
        "checkpoint-20",
        "checkpoint-100",
    ]
    assert find_last_checkpoint(tmp_path).name == "checkpoint-100"


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "model.safetensors").write_bytes(b"weig"),
        lambda folder: (folder / "ema" / "model.safetensors").unlink(),
        lambda folder: (folder / "complete.json").write_text('{"files": {'),
        lambda folder: (folder / "complete.json").unlink(),
    ],
    ids=["truncated file", "missing file", "half a list", "no list"],
)
def test_a_damaged_checkpoint_is_ignored_with_a_warning(tmp_path, damage, caplog):
    files = {"model.safetensors": b"weights", "ema/model.safetensors": b"average"}
    write(tmp_path / "checkpoint-1", files)
    write(tmp_path / "checkpoint-2", files)
    damage(tmp_path / "checkpoint-2")
    assert find_last_checkpoint(tmp_path) == tmp_path / "checkpoint-1"
    assert len(caplog.messages) == 1 and "checkpoint-2 is incomplete" in caplog.messages[0]


def test_only_as_many_checkpoints_as_asked_for_remain(tmp_path):
    for step in (1, 2, 3, 4):
        write(tmp_path / f"checkpoint-{step}", {"a": b"1"}, keep=2)
    assert [folder.name for folder in list_checkpoints(tmp_path)] == ["checkpoint-3", "checkpoint-4"]
    write(tmp_path / "checkpoint-5", {"a": b"1"}, keep=1)
    assert [folder.name for folder in list_checkpoints(tmp_path)] == ["checkpoint-5"]


def test_a_run_that_was_killed_before_it_removed_old_checkpoints_removes_them_when_it_resumes(tmp_path):
    for step in (1, 2, 3, 4):
        write(tmp_path / f"checkpoint-{step}", {"a": b"1"}, keep=None)
    remove_earlier(tmp_path / "checkpoint-3", keep=2)
    assert [step_of(folder) for folder in list_checkpoints(tmp_path)] == [2, 3, 4]
    remove_earlier(tmp_path / "checkpoint-4", keep=None)
    assert [step_of(folder) for folder in list_checkpoints(tmp_path)] == [2, 3, 4]


def test_files_of_a_killed_run_do_not_mix_with_the_new_ones(tmp_path):
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    (folder / "left over").write_text("half")
    write(folder, {"a": b"1"})
    assert sorted(path.name for path in folder.iterdir()) == ["a", "complete.json"]


def test_a_disk_that_refuses_to_write_is_reported_and_the_earlier_checkpoint_stays(tmp_path):
    write(tmp_path / "checkpoint-1", {"a": b"1"})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"checkpoint-2 cannot be written: .*[Ff]ile too large") as error:
            write(tmp_path / "checkpoint-2", {"model": bytes(1_000_000)}, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "The last complete checkpoint is" in str(error.value) and "checkpoint-1" in str(error.value)
    assert not (tmp_path / "checkpoint-2").exists()
    assert is_complete(tmp_path / "checkpoint-1")


def results(output_dir: Path):
    return write_results(output_dir, is_main_process=True, wait_for_everyone=lambda: None)


def test_the_results_of_a_run_appear_together_under_the_name_of_its_folder(tmp_path):
    output_dir = tmp_path / "ants"
    write(output_dir / "checkpoint-1", {"a": b"1"})
    (output_dir / "README.md").write_text("of an earlier run")
    with results(output_dir) as folder:
        assert folder.name == "ants"
        (folder / "README.md").write_text("new")
        (folder / "weights").write_bytes(b"new")
        assert (output_dir / "README.md").read_text() == "of an earlier run"
    assert (output_dir / "README.md").read_text() == "new"
    assert sorted(path.name for path in output_dir.iterdir()) == ["README.md", "checkpoint-1", "weights"]


@pytest.mark.parametrize(
    "save",
    [
        lambda path: path.write_bytes(bytes(1_000_000)),
        lambda path: torch.save(torch.zeros(250_000), path),
        lambda path: save_file({"weights": torch.zeros(250_000)}, path),
    ],
    ids=["file", "torch", "safetensors"],
)
def test_results_that_the_disk_refuses_leave_nothing_and_name_the_last_checkpoint(save, tmp_path):
    write(tmp_path / "checkpoint-1", {"a": b"1"})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        message = r"cannot be written: .*The last complete checkpoint is .*-1\. Free"
        with pytest.raises(CheckpointError, match=message), results(tmp_path) as folder:
            (folder / "README.md").write_text("card")
            save(folder / "weights")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_an_error_of_another_kind_is_not_taken_for_a_full_disk(tmp_path):
    with pytest.raises(RuntimeError, match="out of memory"), results(tmp_path):
        raise RuntimeError("out of memory")
    assert not list(tmp_path.iterdir())


def test_nor_is_it_in_a_checkpoint_which_is_removed(tmp_path):
    folder = tmp_path / "checkpoint-1"
    keywords = {"is_main_process": True, "wait_for_everyone": lambda: None, "keep": None}
    with pytest.raises(RuntimeError, match=r"^out of memory$"), write_checkpoint(folder, **keywords):
        folder.mkdir()
        raise RuntimeError("out of memory")
    assert not list(tmp_path.iterdir())


WRITER = """
import sys
from pathlib import Path
from hpool_vit.toolkit.training.checkpoints import write_checkpoint

for step in range(1, 10_000):
    folder = Path(sys.argv[1]) / f"checkpoint-{step}"
    with write_checkpoint(folder, is_main_process=True, wait_for_everyone=lambda: None, keep=2):
        folder.mkdir()
        for name in ("model", "optimizer", "state"):
            (folder / name).write_bytes(str(step).encode() * 200_000)
    print(step, flush=True)
"""


@pytest.mark.slow
def test_a_process_killed_at_any_moment_leaves_a_checkpoint_that_is_whole(tmp_path):
    for number in range(4):
        folder = tmp_path / str(number)
        folder.mkdir()
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(folder)], stdout=subprocess.PIPE, text=True)
        for _ in range(2):
            last_line = process.stdout.readline()
        time.sleep(0.013 * number)
        process.kill()
        rest, _ = process.communicate()
        steps = [int(line) for line in [last_line, *rest.split()]]
        last = find_last_checkpoint(folder)
        # The last one reported, or the next one if the kill came before its report.
        assert int(last.name.split("-")[1]) in (steps[-1], steps[-1] + 1)
        step = last.name.split("-")[1].encode()
        assert all((last / name).read_bytes() == step * 200_000 for name in ("model", "optimizer", "state"))


def test_weights_that_are_not_finite_are_not_worth_a_checkpoint():
    model = tiny_model()
    check_finite_weights(model, 1)
    with torch.no_grad():
        model.classifier.bias[1] = float("nan")
    with pytest.raises(FloatingPointError, match=r"classifier\.bias are not finite at step 7"):
        check_finite_weights(model, 7)
