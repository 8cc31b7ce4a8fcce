import json
import sys

import pytest
import quickstart
import torch
from helpers import EXAMPLES, TOOLKIT, run_python
from PIL import Image

from hpool_vit.toolkit.data.digits import load_digits_dataset


QUICKSTART = EXAMPLES / "quickstart.py"


@pytest.mark.slow
def test_the_quickstart_leaves_a_model_of_the_accuracy_that_the_readme_names_a_picture_and_its_results(tmp_path):
    output = tmp_path / "run"
    result = run_python(QUICKSTART, "--output_dir", output)
    assert "top-1" in result.stdout and "digit" in result.stdout
    results = json.loads((output / "quickstart.json").read_text())
    # The Trainer's metric and the pipeline in the other process saw the same model and the same images.
    assert results["pipeline_top1"] == pytest.approx(results["top1"])
    assert 0.985 <= results["pipeline_top1"] < results["top5"] <= 1
    with Image.open(output / "test_images.png") as sheet:
        assert sheet.size[0] > 1000
    quickstart.claim_output_dir(output)  # a folder of its own is used again


def test_the_quickstart_leaves_a_folder_alone_that_it_did_not_make(tmp_path, monkeypatch):
    (tmp_path / "thesis.txt").write_text("ten years of work")
    monkeypatch.setattr(sys, "argv", ["quickstart.py", "--output_dir", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        quickstart.main()
    # A text is printed in one line, and the status is 1.
    message = ended.value.code
    assert str(tmp_path) in message and "was not made by this script" in message and "\n" not in message
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_the_digits_are_split_evenly_and_always_alike():
    first, second = load_digits_dataset(), load_digits_dataset()
    assert (len(first["train"]), len(first["test"])) == (1437, 360)
    assert first["test"]["label"] == second["test"]["label"]
    counts = torch.bincount(torch.tensor(first["test"]["label"]))
    assert counts.min() >= 34 and counts.max() <= 37
    assert first["train"].features["label"].names == list("0123456789")


def test_the_metric_counts_the_right_label_among_the_highest_scores():
    import evaluate

    metric = evaluate.load(str(TOOLKIT / "training" / "metrics" / "topk_accuracy"))
    scores = [[0.1, 0.5, 0.4, 0.0, 0.2, 0.3], [0.9, 0.5, 0.4, 0.3, 0.2, 0.1], [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]]
    assert metric.compute(predictions=scores, references=[1, 4, 0]) == {"top1": 1 / 3, "top5": 2 / 3}
    assert metric.compute(predictions=[[0.2, 0.1]], references=[1]) == {"top1": 0.0, "top5": 1.0}
