import json

import pytest
import torch
from helpers import EXAMPLES, TOOLKIT, run_python
from PIL import Image
from quickstart import claim_output_dir

from hpool_vit.toolkit.data.digits import load_digits_dataset


QUICKSTART = EXAMPLES / "quickstart.py"


def test_the_quickstart_leaves_a_model_a_picture_and_its_results(tmp_path):
    output = tmp_path / "run"
    result = run_python(QUICKSTART, "--output_dir", output, "--num_train_epochs", 0.1)
    assert "top-1" in result.stdout and "digit" in result.stdout
    results = json.loads((output / "quickstart.json").read_text())
    # The Trainer's metric and the pipeline in the other process saw the same model and the same images.
    assert results["pipeline_top1"] == pytest.approx(results["top1"])
    assert 0 < results["top1"] < results["top5"] <= 1
    with Image.open(output / "test_images.png") as sheet:
        assert sheet.size[0] > 1000
    claim_output_dir(output)  # a folder of its own is used again


def test_the_quickstart_leaves_a_folder_alone_that_it_did_not_make(tmp_path):
    (tmp_path / "thesis.txt").write_text("ten years of work")
    result = run_python(QUICKSTART, "--output_dir", tmp_path, check=False)
    assert result.returncode == 1 and result.stderr.count("\n") == 1
    assert str(tmp_path) in result.stderr and "was not made by this script" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.slow
def test_the_quickstart_reaches_the_accuracy_that_the_readme_names(tmp_path):
    run_python(QUICKSTART, "--output_dir", tmp_path / "run")
    assert json.loads((tmp_path / "run" / "quickstart.json").read_text())["pipeline_top1"] >= 0.985


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
