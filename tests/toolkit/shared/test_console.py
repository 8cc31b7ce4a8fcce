"""What commands share on the command line: values of flags, missing packages, and errors of one line."""

import sys
from pathlib import Path

import pytest

from hpool_vit.toolkit.shared.console import hub_id, name_flags, needs, one_line, parse_value, run


def test_what_is_wrong_with_the_input_ends_a_program_with_one_line(capsys):
    def fail():
        raise FileNotFoundError(2, "No such file", "photo.jpg")

    with pytest.raises(SystemExit, match=r"^error: .*No such file: 'photo.jpg'$"):
        run(fail)
    with pytest.raises(ZeroDivisionError):
        run(lambda: 1 / 0)
    run(lambda: print("done"))
    assert capsys.readouterr().out == "done\n"


def test_a_missing_package_is_named_with_the_line_that_installs_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ImportError) as missing, needs("export"):
        import onnx  # noqa: F401
    assert missing.value.name == "onnx"
    assert str(missing.value) == 'The package onnx is missing: python -m pip install "hpool-vit[export]"'


def test_a_package_that_is_there_but_broken_keeps_its_error():
    with pytest.raises(ImportError, match="cannot import name"), needs("export"):
        from json import no_such_name  # noqa: F401


def test_a_line_holds_any_text():
    assert one_line("  a\tb\r\n\x00c\u2028d\udcff ") == "a b c d"
    assert one_line(7) == "7"


def test_only_an_owner_and_a_name_that_are_no_folder_here_are_an_id_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("outputs/warm-start").mkdir(parents=True)
    assert hub_id("facebook/deit") == "facebook/deit"
    others = (None, "digits", "/data/x", "../up", "a/b/c", "a b/c", "outputs/warm-start")
    assert [hub_id(name) for name in others] == [None] * 7


@pytest.mark.parametrize(
    "message, expected",
    [
        ("choose another `output_dir`.", "choose another --output_dir."),
        ("`top_k=0` is too small", "--top_k 0 is too small"),
        ("`output_dir='a b'` is taken", "--output_dir a b is taken"),
        ("`model` and `top_k`", "MODEL and --top_k"),
        ("`top_k2` and `pool_mode=avg` and output_dir", "`top_k2` and `pool_mode=avg` and output_dir"),
        ("`hvt_pool=[1, 99]` names block 99", "--hvt_pool 1,99 names block 99"),
        ("`hvt_pool=[1, 5` is not a value", "--hvt_pool [1, 5 is not a value"),
        ("`hvt_pool=[]`", "--hvt_pool none"),
        ("`hvt_pool_choices=[None, [6], [1, 5, 9]]`", "--hvt_pool_choices none;6;1,5,9"),
    ],
)
def test_a_message_gets_the_words_of_the_command_line(message, expected):
    names = {name: f"--{name}" for name in ("output_dir", "top_k", "hvt_pool", "hvt_pool_choices")}
    assert name_flags(message, names | {"model": "MODEL"}) == expected


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
