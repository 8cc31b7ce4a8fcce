"""Files and folders are written completely or not at all."""

import os
import resource
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from safetensors.torch import save_file

from hpool_vit.toolkit.shared.figures import save_figure
from hpool_vit.toolkit.shared.files import check_output_dir, folder_written_whole, read_json, write_json, written_whole


WRITING = """\
import signal, sys, time
from hpool_vit.toolkit.shared.files import folder_written_whole

# A shell that runs the tests in the background has its programs ignore Ctrl+C.
signal.signal(signal.SIGINT, signal.default_int_handler)
with folder_written_whole(sys.argv[1]) as folder:
    (folder / "half").touch()
    print("writing", flush=True)
    time.sleep(60)
"""


def write(output_dir: Path):
    with folder_written_whole(output_dir) as folder:
        (folder / "weights").touch()


def test_a_folder_appears_when_it_is_complete(tmp_path):
    output_dir = tmp_path / "new" / "model"
    with folder_written_whole(output_dir) as folder:
        (folder / "weights").touch()
        assert folder.name == "model" and not output_dir.exists()
    assert [file.name for file in output_dir.iterdir()] == ["weights"]
    assert list(output_dir.parent.iterdir()) == [output_dir]


def test_a_name_without_a_folder_is_in_the_current_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("model")
    assert [file.name for file in (tmp_path / "model").iterdir()] == ["weights"]


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "model").mkdir()
    write(tmp_path / "model")
    assert [str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*")] == ["model", "model/weights"]


def test_a_mount_point_is_filled_in_place(tmp_path, monkeypatch):
    mounted = tmp_path / "mounted"
    mounted.mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda self: self == mounted)
    before = mounted.stat().st_ino
    with folder_written_whole(mounted) as folder:
        (folder / "more").mkdir()
        (folder / "more" / "file").touch()
        (folder / "other").touch()
    assert sorted(path.name for path in mounted.iterdir()) == ["more", "other"]
    assert (mounted / "more" / "file").is_file() and mounted.stat().st_ino == before
    assert list(tmp_path.iterdir()) == [mounted]


@pytest.mark.parametrize("exists", [True, False])
def test_a_folder_where_nothing_can_be_written_is_refused_before_the_work(exists, tmp_path, monkeypatch):
    output_dir = tmp_path / "read-only" / "new"
    output_dir.parent.mkdir()
    read_only = {output_dir.parent}
    if exists:
        output_dir.mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: path not in read_only)
    if exists:  # it can be filled, although it cannot be replaced
        check_output_dir(output_dir)
        read_only.add(output_dir)
    with pytest.raises(ValueError, match=r"new cannot be written, because .* is read-only: choose another"):
        check_output_dir(output_dir)


@pytest.mark.parametrize("error", [OSError("No space left"), KeyboardInterrupt()], ids=["error", "Ctrl+C"])
def test_nothing_is_left_after_an_error(error, tmp_path):
    with pytest.raises(type(error)), folder_written_whole(tmp_path / "model") as folder:
        (folder / "half").touch()
        raise error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("written", [folder_written_whole, written_whole])
def test_a_full_disk_is_the_same_error_where_safetensors_writes(written, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with (
            pytest.raises(OSError, match=r"model cannot be written: .*[Ff]ile too large"),
            written(tmp_path / "model") as path,
        ):
            save_file({"weights": torch.zeros(100_000)}, path / "weights" if path.is_dir() else path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_an_empty_folder_stays_empty_after_an_error(tmp_path):
    (tmp_path / "model").mkdir()
    with pytest.raises(OSError), folder_written_whole(tmp_path / "model") as folder:
        (folder / "half").touch()
        raise OSError
    assert list(tmp_path.rglob("*")) == [tmp_path / "model"]


def test_what_is_in_the_way_stays_as_it_is(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("x")
    for taken in (tmp_path / "thesis", tmp_path / "thesis" / "thesis.tex"):
        with pytest.raises(ValueError, match="exists and is not empty: choose another"):
            check_output_dir(taken)
        with pytest.raises(ValueError, match="exists and is not empty: choose another"):
            write(taken)
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "thesis", tmp_path / "thesis" / "thesis.tex"]
    assert (tmp_path / "thesis" / "thesis.tex").read_text() == "x"


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, -signal.SIGINT)])
def test_nothing_is_left_by_a_program_that_is_ended(number, status, tmp_path):
    command = [sys.executable, "-c", WRITING, tmp_path / "model"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout.readline() == b"writing\n" and list(tmp_path.rglob("half"))
        process.send_signal(number)
        assert process.wait(30) == status
    assert not list(tmp_path.iterdir())


def test_sigterm_does_afterwards_what_it_did_before(tmp_path):
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    with folder_written_whole(tmp_path / "model"):
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_program_that_handles_sigterm_itself_goes_on_doing_so(tmp_path):
    received = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        with folder_written_whole(tmp_path / "model"):
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert received == [signal.SIGTERM] and (tmp_path / "model").is_dir()


def test_a_thread_can_write_a_folder(tmp_path):
    with ThreadPoolExecutor() as pool:
        pool.submit(write, tmp_path / "model").result()
    assert (tmp_path / "model" / "weights").is_file()


def test_a_file_replaces_the_earlier_one_only_when_it_is_complete(tmp_path):
    path = tmp_path / "answers.csv"
    path.write_text("earlier")
    with pytest.raises(OSError), written_whole(path) as part:
        part.write_text("half")
        raise OSError
    assert path.read_text() == "earlier" and os.listdir(tmp_path) == ["answers.csv"]
    with written_whole(path) as part:
        part.write_text("new")
        assert path.read_text() == "earlier"
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["answers.csv"]


def test_json_is_written_with_its_folders_and_read_again(tmp_path):
    path = tmp_path / "new" / "record.json"
    write_json(path, {"name": "ü", "sizes": (1, 2)})
    assert read_json(path) == {"name": "ü", "sizes": [1, 2]} and os.listdir(path.parent) == ["record.json"]
    path.write_bytes(b"\xff{")
    with pytest.raises(ValueError, match=r"record\.json is not a JSON file"):
        read_json(path)


def test_a_figure_that_cannot_be_written_leaves_the_earlier_one(tmp_path):
    save_figure(Figure(figsize=(2, 2)), tmp_path / "curves.png")
    before = (tmp_path / "curves.png").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(OSError):
            save_figure(Figure(figsize=(9, 9)), tmp_path / "curves.png")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "curves.png").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]


@pytest.mark.parametrize("name", ["curves.png", "curves.svg", "curves.PDF"])
def test_the_ending_decides_the_format_of_a_figure(name, tmp_path):
    save_figure(Figure(figsize=(1, 1)), tmp_path / name)
    start = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}
    assert (tmp_path / name).read_bytes().startswith(start[(tmp_path / name).suffix.lower()])
