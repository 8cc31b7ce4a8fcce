"""The measurement of segmentation with and without pooling."""

import json

import pytest
import segmentation_pooling
import torch
from helpers import tiny_model
from test_run_semantic_segmentation import scenes  # noqa: F401
from torch import nn


@pytest.fixture
def two_models(monkeypatch):
    blocks = {"out_indices": [1, 2]}
    models = {
        "unpooled": {"hvt_pool": None, **blocks},
        "grid": {**segmentation_pooling.GRID, "hvt_pool": [1], **blocks},
    }
    monkeypatch.setattr(segmentation_pooling, "MODELS", models)
    return models


@pytest.mark.parametrize(
    "more",
    [["--frozen"], ["--epochs", "1", "--batch_size", "2"], ["--head_first", "--epochs", "1", "--batch_size", "2"]],
    ids=["frozen", "tuned", "head first"],
)
def test_every_way_to_pool_is_measured_once(tmp_path, scenes, vit_folder, two_models, more):  # noqa: F811
    flags = ["--model_name_or_path", vit_folder, "--train", scenes / "train", "--validation", scenes / "validation"]
    flags += ["--class_names", "dark,bright", "--ignored", 9, "--image_size", 32, 48, "--max_images", 6]
    flags += ["--num_seeds", 2, "--output", tmp_path / "results.json", *more]
    segmentation_pooling.main(list(map(str, flags)))
    results = json.loads((tmp_path / "results.json").read_text())
    assert all(len(results[name]["mean_iou"]) == 2 for name in two_models)
    assert results["grid"]["gmacs"] < results["unpooled"]["gmacs"]
    results["unpooled"]["mean_iou"] = [0.5]
    (tmp_path / "results.json").write_text(json.dumps(results))
    segmentation_pooling.main(list(map(str, flags)))
    assert json.loads((tmp_path / "results.json").read_text())["unpooled"]["mean_iou"] == [0.5]


def test_speed_is_measured_without_data_at_each_size(tmp_path, vit_folder, two_models):
    flags = ["--model_name_or_path", vit_folder, "--speed", "32x48", "64x80", "--rounds", 2]
    segmentation_pooling.main(list(map(str, [*flags, "--output", tmp_path / "speed.json"])))
    results = json.loads((tmp_path / "speed.json").read_text())
    assert results["hardware"]["cpu_threads"] >= 1 and len(results["load_before_and_after"]) == 2
    assert list(results["sizes"]) == ["48 × 32", "80 × 64"]
    for models in results["sizes"].values():
        assert models["grid"]["images_per_second"] > 0
        assert models["grid"]["gmacs"] < models["unpooled"]["gmacs"]
        assert 0 < models["grid"]["peak_mb"] <= models["unpooled"]["peak_mb"]
        assert models["grid"]["training_peak_mb"] < models["unpooled"]["training_peak_mb"]


def test_the_peak_is_the_most_that_lives_at_a_time():
    def call():
        for _ in range(3):
            first = torch.ones(250_000)  # 1 MB
            second = first * 2
            del first, second

    assert segmentation_pooling.peak_bytes(call) == pytest.approx(2e6, rel=0.05)


def test_without_data_the_program_says_what_it_needs(tmp_path, capsys):
    with pytest.raises(SystemExit):
        segmentation_pooling.main(["--model_name_or_path", "x", "--output", str(tmp_path / "a.json")])
    assert "give --train, --validation and --class_names, or --speed" in capsys.readouterr().err


def test_a_head_on_fixed_maps_learns_what_can_be_told_apart():
    labels = torch.randint(0, 3, (320, 6, 6)).to(torch.uint8)
    maps = nn.functional.one_hot(labels.long(), 3).movedim(-1, 1).float() * 50 + 7 + torch.randn(320, 3, 6, 6)
    large = labels.repeat_interleave(4, 1).repeat_interleave(4, 2)
    head = segmentation_pooling.train_head(nn.Conv2d(3, 3, 1), maps.half(), large, seed=0)
    assert segmentation_pooling.evaluate_maps(head, maps.half(), large) > 0.7


def test_merging_costs_fewer_multiplications():
    unpooled, merging = (tiny_model(hvt_pool=schedule, pool_mode="merge").eval() for schedule in (None, [1]))
    assert segmentation_pooling.gmacs(merging, (32, 32)) < 0.8 * segmentation_pooling.gmacs(unpooled, (32, 32))
