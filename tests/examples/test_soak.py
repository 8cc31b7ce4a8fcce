"""The soak: training is killed, disks are full, clients are many, and nothing is lost."""

import json

import pytest
from helpers import EXAMPLES, run_python


SOAK = EXAMPLES / "research" / "soak"


@pytest.mark.slow
def test_a_short_soak_loses_nothing(tmp_path):
    output = tmp_path / "soak.json"
    printed = run_python(SOAK / "soak.py", "--short", "--output", output, timeout=1800).stdout
    assert printed.splitlines()[-1] == "Nothing was lost."
    results = json.loads(output.read_text())
    assert list(results) == ["killed", "full", "crowded", "memory"]
    assert results["killed"]["hpool-vit train"]["killed"] == 1
    assert sum(command["failed"] for command in results["full"].values() if isinstance(command, dict)) > 0
    for door in ("page", "predict"):
        assert results["crowded"][door]["answered"] > 0 and results["crowded"][door]["refused"] > 0


def test_every_odd_file_is_what_it_says(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(SOAK)
    from odd_files import KINDS, write_odd_files

    from hpool_vit.toolkit.shared.images import BadImageError, decode_image

    files = write_odd_files(tmp_path / "files", 4 * len(KINDS), seed=1)
    assert {file.kind for file in files} == KINDS.keys()
    for file in files:
        try:
            decode_image(file.path.read_bytes())
        except BadImageError as error:
            assert not file.is_usable, (file, error)
        else:
            assert file.is_usable, file


def test_what_is_lost_is_found_wherever_it_stands(monkeypatch):
    monkeypatch.syspath_prepend(SOAK)
    from soak import lines_of

    assert lines_of({"a": {"lost": ["one"], "b": {"lost": ["two"]}}, "lost": [], "seconds": 3}) == ["one", "two"]


def test_a_half_written_file_a_lost_one_and_a_left_over_are_noticed(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(SOAK)
    from full import wrong_files

    whole, left = tmp_path / "whole", tmp_path / "left"
    for folder in (whole, left):
        (folder / "out").mkdir(parents=True)
        (folder / "out" / "model.safetensors").write_bytes(b"weights")
        (folder / "answers.jsonl").write_text("answers")
    assert wrong_files(whole, left, missing=False) == []
    (left / "out" / "model.safetensors").write_bytes(b"weigh")
    (left / ".answers.part").touch()
    (left / "answers.jsonl").unlink()
    expected = {"out is incomplete", ".answers.part is left"}
    assert set(wrong_files(whole, left, missing=True)) == expected
    assert set(wrong_files(whole, left, missing=False)) == expected | {"answers.jsonl is missing"}
