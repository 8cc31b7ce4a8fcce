"""The command `hpool-vit`: light help, lazy sub-commands, and errors of one line in the words of the command line."""

import json
import sys
from typing import Annotated

import pytest
import typer
from helpers import run_command, run_python

import hpool_vit
from hpool_vit.toolkit.command import COMMANDS, load_command, main
from hpool_vit.toolkit.shared.console import NotStartedError, StoppedError


# What Typer needs to parse a command line and to draw its help.
PARSER = {"annotated_doc", "attr", "click", "markdown_it", "mdurl", "pygments", "rich", "shellingham", "typer"}

LOADED = """\
import json, sys
import hpool_vit
before = set(sys.modules)
from hpool_vit.toolkit.command import main
try:
    main(["--help"])
finally:
    print(json.dumps([sorted(before), sorted(set(sys.modules) - before)]))
"""


def fail(capsys, *words: str, status: int = 1) -> str:
    """What the command prints as its one line before it ends with `status`."""
    with pytest.raises(SystemExit) as ended:
        main(words)
    printed = capsys.readouterr()
    assert ended.value.code == status and printed.out == ""
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1, printed.err
    return printed.err


def raise_in(monkeypatch, error: BaseException):
    """Makes `hpool-vit stats` raise `error`."""
    from hpool_vit.toolkit.inspection import stats

    def broken(models: Annotated[list[str] | None, typer.Argument()] = None, top_k: int = 5, json: bool = False):
        raise error

    monkeypatch.setattr(stats, "command", broken)


def test_the_overview_lists_every_command_and_imports_little_more_than_the_package():
    *text, loaded = run_python("-c", LOADED).stdout.splitlines()
    assert all(any(f" {name} " in line for line in text) for name in COMMANDS)
    before, new = json.loads(loaded)
    foreign = {name.partition(".")[0] for name in new} - {name.partition(".")[0] for name in before}
    third_party = {name for name in foreign if name not in sys.stdlib_module_names}
    assert third_party <= PARSER
    ours = {name for name in new if name.startswith("hpool_vit.toolkit.")}
    assert ours == {f"hpool_vit.toolkit.{name}" for name in ("command", "shared", "shared.console")}
    assert not {"datasets", "gradio", "matplotlib", "onnxruntime"} & {name.partition(".")[0] for name in before + new}


def test_the_command_runs_as_a_module_and_prints_its_version():
    assert run_command("--version").stdout == f"hpool-vit {hpool_vit.__version__}\n"


def test_without_words_the_command_prints_its_help(capsys):
    main([])
    assert "Usage: hpool-vit" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, message",
    [
        (["stat"], "There is no command 'stat' (did you mean 'stats'?). See hpool-vit --help."),
        (["xyz"], "There is no command 'xyz'. See hpool-vit --help."),
        (["--verbose"], "No such option: --verbose"),
        (["stats", "--jso"], "No such option: --jso (Possible options: --json). See hpool-vit stats --help."),
    ],
)
def test_a_wrong_command_line_is_one_line_with_a_suggestion_and_status_2(words, message, capsys):
    assert fail(capsys, *words, status=2).startswith(f"error: {message}")


@pytest.mark.parametrize("error", [ValueError, OSError, ImportError])
def test_wrong_input_is_one_line_and_status_1(error, capsys, monkeypatch):
    raise_in(monkeypatch, error("nothing\nto count\x1b"))
    assert fail(capsys, "stats") == "error: nothing to count\n"


def test_a_command_that_does_not_start_has_status_2(capsys, monkeypatch):
    raise_in(monkeypatch, NotStartedError("no model"))
    assert fail(capsys, "stats", status=2) == "error: no model\n"


def test_errors_name_flags_and_arguments_as_the_command_line_does(capsys, monkeypatch):
    raise_in(monkeypatch, ValueError("`top_k=0` must be at least 1; `models` and `other` stay."))
    assert fail(capsys, "stats") == "error: --top_k 0 must be at least 1; MODELS and `other` stay.\n"


def test_a_mistake_in_the_program_keeps_its_traceback(monkeypatch):
    raise_in(monkeypatch, ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        main(["stats"])


def test_only_the_first_of_several_processes_prints_the_error(capsys, monkeypatch):
    raise_in(monkeypatch, ValueError("no model"))
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as ended:
        main(["stats"])
    assert ended.value.code == 1 and capsys.readouterr().err == ""


def test_every_process_prints_what_stops_it_in_the_middle_of_its_work(capsys, monkeypatch):
    raise_in(monkeypatch, StoppedError("`top_k=3` images are bad"))
    assert fail(capsys, "stats") == "error: --top_k 3 images are bad\n"
    monkeypatch.setenv("RANK", "1")
    assert fail(capsys, "stats") == "error: [rank 1] --top_k 3 images are bad\n"


def test_ctrl_c_ends_a_command_without_a_traceback(capsys, monkeypatch):
    raise_in(monkeypatch, KeyboardInterrupt())
    with pytest.raises(SystemExit) as ended:
        main(["stats"])
    assert ended.value.code == 130 and "Traceback" not in capsys.readouterr().err


def test_a_command_that_cannot_be_imported_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    for name in [name for name in sys.modules if name.startswith("hpool_vit.toolkit.inference")]:
        monkeypatch.delitem(sys.modules, name)
    expected = 'error: The package accelerate is missing: python -m pip install "hpool-vit[predict]"\n'
    assert fail(capsys, "predict", "model", "photo.jpg") == expected


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_documented_and_spells_its_flags_with_underscores(name):
    loaded = load_command(name)
    assert loaded.name == name and loaded.help
    flags = [flag for parameter in loaded.params for flag in (*parameter.opts, *parameter.secondary_opts)]
    assert all("-" not in flag.removeprefix("--") for flag in flags)
