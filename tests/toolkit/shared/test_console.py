"""`examples/command_line.py`: errors of one line, folders that are written whole, and values of flags."""

import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from helpers import EXAMPLES

from hpool_vit.toolkit.shared.console import hub_id, one_line, parse_value, run
from hpool_vit.toolkit.shared.files import check_output_dir, folder_written_whole


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


def test_what_is_wrong_with_the_input_ends_a_program_with_one_line(capsys):
    def fail():
        raise FileNotFoundError(2, "No such file", "photo.jpg")

    with pytest.raises(SystemExit, match=r"^error: .*No such file: 'photo.jpg'$"):
        run(fail)
    with pytest.raises(ZeroDivisionError):
        run(lambda: 1 / 0)
    run(lambda: print("done"))
    assert capsys.readouterr().out == "done\n"


def test_a_line_holds_any_text():
    assert one_line("  a\tb\r\n\x00c\u2028d\udcff ") == "a b c d"
    assert one_line(7) == "7"


class TestFolders:
    def test_a_folder_appears_when_it_is_complete(self, tmp_path):
        output_dir = tmp_path / "new" / "model"
        with folder_written_whole(output_dir) as folder:
            (folder / "weights").touch()
            assert folder.name == "model" and not output_dir.exists()
        assert [file.name for file in output_dir.iterdir()] == ["weights"]
        assert list(output_dir.parent.iterdir()) == [output_dir]

    def test_a_name_without_a_folder_is_in_the_current_one(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        write("model")
        assert [file.name for file in (tmp_path / "model").iterdir()] == ["weights"]

    def test_an_empty_folder_is_filled(self, tmp_path):
        (tmp_path / "model").mkdir()
        write(tmp_path / "model")
        assert [str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*")] == ["model", "model/weights"]

    @pytest.mark.parametrize("error", [OSError("No space left"), KeyboardInterrupt()], ids=["error", "Ctrl+C"])
    def test_nothing_is_left_after_an_error(self, error, tmp_path):
        with pytest.raises(type(error)), folder_written_whole(tmp_path / "model") as folder:
            (folder / "half").touch()
            raise error
        assert not list(tmp_path.iterdir())

    def test_an_empty_folder_stays_empty_after_an_error(self, tmp_path):
        (tmp_path / "model").mkdir()
        with pytest.raises(OSError), folder_written_whole(tmp_path / "model") as folder:
            (folder / "half").touch()
            raise OSError
        assert list(tmp_path.rglob("*")) == [tmp_path / "model"]

    def test_what_is_in_the_way_stays_as_it_is(self, tmp_path):
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
    def test_nothing_is_left_by_a_program_that_is_ended(self, number, status, tmp_path):
        command = [sys.executable, "-c", WRITING, tmp_path / "model"]
        with subprocess.Popen(command, cwd=EXAMPLES, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            assert process.stdout.readline() == b"writing\n" and list(tmp_path.rglob("half"))
            process.send_signal(number)
            assert process.wait(30) == status
        assert not list(tmp_path.iterdir())

    def test_sigterm_does_afterwards_what_it_did_before(self, tmp_path):
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        with folder_written_whole(tmp_path / "model"):
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL

    def test_a_program_that_handles_sigterm_itself_goes_on_doing_so(self, tmp_path):
        received = []
        before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
        try:
            with folder_written_whole(tmp_path / "model"):
                signal.raise_signal(signal.SIGTERM)
        finally:
            signal.signal(signal.SIGTERM, before)
        assert received == [signal.SIGTERM] and (tmp_path / "model").is_dir()

    def test_a_thread_can_write_a_folder(self, tmp_path):
        with ThreadPoolExecutor() as pool:
            pool.submit(write, tmp_path / "model").result()
        assert (tmp_path / "model" / "weights").is_file()


def test_only_an_owner_and_a_name_that_are_no_folder_here_are_an_id_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("outputs/warm-start").mkdir(parents=True)
    assert hub_id("facebook/deit") == "facebook/deit"
    others = (None, "digits", "/data/x", "../up", "a/b/c", "a b/c", "outputs/warm-start")
    assert [hub_id(name) for name in others] == [None] * 7


@pytest.mark.parametrize(
    "name, text, value",
    [
        ("hidden_size", "384", 384),
        ("layer_norm_eps", "1e-6", 1e-6),
        ("qkv_bias", "false", False),
        ("pool_mode", "avg", "avg"),
        ("hvt_pool", "none", None),
        ("hvt_pool", "6", [6]),
        ("hvt_pool", "1,5,9", [1, 5, 9]),
        ("hvt_pool", "[1, 5, 9]", [1, 5, 9]),
        ("hvt_pool_choices", "none;2;1,3", [None, [2], [1, 3]]),
        ("hvt_pool_choices", "[null, [2], [1, 3]]", [None, [2], [1, 3]]),
    ],
)
def test_a_flag_takes_numbers_lists_words_and_schedules(name, text, value):
    assert parse_value(name, text) == value


def test_a_text_that_is_no_value_is_named_with_its_flag():
    with pytest.raises(ValueError, match=r"`hvt_pool=\[1, 5` is not a value: give a number"):
        parse_value("hvt_pool", "[1, 5")
