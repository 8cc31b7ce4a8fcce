"""The measurement of segmentation with and without pooling."""

import json

import pytest
import segmentation_pooling
import torch
from helpers import tiny_model
from test_run_semantic_segmentation import scenes  # noqa: F401
from torch import nn


@pytest.mark.parametrize("more", [["--frozen"], ["--epochs", "1", "--batch_size", "2"]], ids=["frozen", "tuned"])
def test_every_way_to_pool_is_measured_once(tmp_path, scenes, vit_folder, monkeypatch, more):  # noqa: F811
    blocks = {"out_indices": [1, 2]}
    models = {
        "unpooled": {"hvt_pool": None, **blocks},
        "grid": {**segmentation_pooling.GRID, "hvt_pool": [1], **blocks},
    }
    monkeypatch.setattr(segmentation_pooling, "MODELS", models)
    flags = ["--model_name_or_path", vit_folder, "--train", scenes / "train", "--validation", scenes / "validation"]
    flags += ["--class_names", "dark,bright", "--ignored", 9, "--image_size", 32, 48, "--max_images", 6, "--speed"]
    flags += ["--num_seeds", 2, "--output", tmp_path / "results.json", *more]
    segmentation_pooling.main(list(map(str, flags)))
    results = json.loads((tmp_path / "results.json").read_text())
    assert all(len(results[name]["mean_iou"]) == 2 and results[name]["images_per_second"] > 0 for name in models)
    assert results["grid"]["gmacs"] < results["unpooled"]["gmacs"]
    results["unpooled"]["mean_iou"] = [0.5]
    (tmp_path / "results.json").write_text(json.dumps(results))
    segmentation_pooling.main(list(map(str, flags)))
    assert json.loads((tmp_path / "results.json").read_text())["unpooled"]["mean_iou"] == [0.5]


def test_a_head_on_fixed_maps_learns_what_can_be_told_apart():
    labels = torch.randint(0, 3, (320, 6, 6)).to(torch.uint8)
    maps = nn.functional.one_hot(labels.long(), 3).movedim(-1, 1).float() * 50 + 7 + torch.randn(320, 3, 6, 6)
    large = labels.repeat_interleave(4, 1).repeat_interleave(4, 2)
    head = segmentation_pooling.train_head(nn.Conv2d(3, 3, 1), maps.half(), large, seed=0)
    assert segmentation_pooling.evaluate_maps(head, maps.half(), large) > 0.7


def test_merging_costs_fewer_multiplications():
    unpooled, merging = (tiny_model(hvt_pool=schedule, pool_mode="merge").eval() for schedule in (None, [1]))
    assert segmentation_pooling.gmacs(merging, (32, 32)) < 0.8 * segmentation_pooling.gmacs(unpooled, (32, 32))
