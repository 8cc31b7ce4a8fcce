"""`examples/digits.py`: scikit-learn's digits as a data set and as files."""

import pytest
from datasets import load_dataset

from hpool_vit.toolkit.data.digits import load_digits_dataset, main


def test_the_files_hold_the_same_digits_as_the_data_set(tmp_path):
    main(["--output_dir", str(tmp_path / "digits")])
    data = load_digits_dataset()
    for split, number in (("train", 1437), ("test", 360)):
        files = load_dataset("imagefolder", data_dir=tmp_path / "digits" / split, split="train")
        assert len(files) == len(data[split]) == number
        written = {(example["label"], example["image"].tobytes()) for example in files}
        assert written == {(example["label"], example["image"].tobytes()) for example in data[split]}


def test_a_folder_that_holds_something_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(SystemExit, match="exists and is not empty"):
        main(["--output_dir", str(tmp_path)])
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]
