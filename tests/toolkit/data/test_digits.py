"""The digits of scikit-learn as a dataset and as files."""

import sys

import pytest
from PIL import Image

from hpool_vit.toolkit.data.digits import load_digits_dataset, main, write_digits


def test_the_files_hold_the_same_digits_as_the_dataset(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["digits", "--output_dir", str(tmp_path / "digits")])
    main()
    data = load_digits_dataset()
    for split, number in (("train", 1437), ("test", 360)):
        files = list((tmp_path / "digits" / split).glob("*/*.png"))
        assert len(files) == len(data[split]) == number
        written = {(int(file.parent.name), Image.open(file).tobytes()) for file in files}
        assert written == {(example["label"], example["image"].tobytes()) for example in data[split]}


def test_a_folder_that_holds_something_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists and is not empty"):
        write_digits(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]
