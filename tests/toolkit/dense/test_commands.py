"""What the commands for classifiers do with a folder of a segmentation model: the task, or a refusal with a remedy."""

import numpy as np
import pytest
import torch
from helpers import tiny_config
from image_files import picture
from safetensors.torch import load_file
from transformers import pipeline

from hpool_vit import HPoolViTForSemanticSegmentation, HPoolViTImageProcessor
from hpool_vit.toolkit.command import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "scenes"
    torch.manual_seed(0)
    labels = {"id2label": {0: "dark", 1: "grey", 2: "bright"}, "label2id": {"dark": 0, "grey": 1, "bright": 2}}
    pooling = {"pool_mode": "merge", "merge_ratio": 0.4, "image_size": (24, 32), "out_indices": [2, 4]}
    config = tiny_config(**labels, **pooling, initializer_range=0.3)
    HPoolViTForSemanticSegmentation(config).save_pretrained(folder)
    HPoolViTImageProcessor(size={"height": 24, "width": 32}, do_center_crop=False).save_pretrained(folder)
    return folder


@pytest.fixture
def photo(tmp_path):
    picture(0, (40, 28)).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_stats_counts_it(folder, capsys):
    main(["stats", str(folder)])
    printed = capsys.readouterr().out
    assert "head" in printed and "stage 2" in printed


def test_visualize_draws_where_its_patches_went(folder, photo, tmp_path, capsys):
    tensors = tmp_path / "trace.safetensors"
    main(["visualize", *map(str, (folder, photo, "--output", tmp_path / "a.png", "--save_tensors", tensors))])
    assert "tokens: 48 → 29 → 18" in capsys.readouterr().out
    assert (tmp_path / "a.png").stat().st_size > 0 and load_file(tensors)


def test_push_names_the_command_that_uploads_it(folder, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["push", str(folder), "--repo_id", "me/scenes", "--dry_run", "--output_dir", str(tmp_path / "hub")])
    message = capsys.readouterr().err
    assert "`architectures` in config.json" in message and f"hf upload me/scenes {folder} --exclude" in message
    assert not (tmp_path / "hub").exists()


@pytest.mark.parametrize("size", [(40, 28), (33, 50)])
def test_the_pipeline_of_transformers_gives_masks_of_the_images_size(folder, size):
    image = picture(1, size)
    answers = pipeline("image-segmentation", model=str(folder), trust_remote_code=True)(image)
    masks = np.stack([np.array(answer["mask"]) > 0 for answer in answers])
    assert masks.shape[1:] == size[::-1] and (masks.sum(0) == 1).all()
