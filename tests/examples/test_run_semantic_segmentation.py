"""The segmentation program that people copy: it learns, resumes, evaluates and saves."""

import json
import shutil

import numpy as np
import pytest
import run_semantic_segmentation
import torch
from helpers import EXAMPLES, run_python, tiny_model
from huggingface_hub import ModelCard
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation

import hpool_vit
from hpool_vit import HPoolViTImageProcessor


pytestmark = pytest.mark.usefixtures("fresh_accelerator")


def write_scenes(folder, number: int):
    """A dark part and a bright part of each picture, which a model of any kind tells apart."""
    random = np.random.default_rng(number)
    (folder / "images").mkdir(parents=True)
    (folder / "masks").mkdir()
    for index in range(number):
        classes = np.zeros((40, 60), dtype=np.uint8)
        classes[:, random.integers(15, 45) :] = 1
        noise = random.integers(0, 60, (40, 60, 3))
        Image.fromarray((classes[..., None] * 180 + noise).astype(np.uint8)).save(folder / "images" / f"{index}.png")
        classes[:4] = 9
        Image.fromarray(classes).save(folder / "masks" / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder / "train", 24)
    write_scenes(folder / "validation", 6)
    return folder


def flags(scenes, model, output, *more) -> list[str]:
    data = ["--train", scenes / "train", "--validation", scenes / "validation", "--class_names", "dark,bright"]
    data += ["--ignored", 9, "--image_size", 32, 48, "--model_name_or_path", model, "--output_dir", output]
    return list(map(str, [*data, "--batch_size", 4, "--learning_rate", 3e-3, "--use_cpu", *more]))


@pytest.mark.slow
def test_a_vit_learns_to_segment_with_merging_and_loads_without_the_package(tmp_path, scenes, vit_folder):
    output = tmp_path / "out"
    more = ["--pooling", "merge", "--hvt_pool", 1, "--num_train_epochs", 6]
    program = EXAMPLES / "run_semantic_segmentation.py"
    printed = run_python(program, *flags(scenes, vit_folder, output, *more)).stdout
    results = json.loads((output / "all_results.json").read_text())
    assert results["mean_iou"] > 0.8
    assert f"mean IoU {results['mean_iou']:.2%} on 6 images" in printed
    model = AutoModelForSemanticSegmentation.from_pretrained(output)
    assert model.config.hvt_pool == [1] and model.config.id2label == {0: "dark", 1: "bright"}
    card = ModelCard.load(output / "README.md")
    assert card.data.pipeline_tag == "image-segmentation" and "IoU of bright" in card.text
    assert "24 images of train" in card.text and str(tmp_path) not in card.text
    with Image.open(output / "examples.png") as picture:
        assert picture.width > 3 * 60
    using = tmp_path / "use.py"
    using.write_text(
        "import sys\n"
        "from transformers import pipeline\n"
        "segment = pipeline('image-segmentation', model=sys.argv[1], trust_remote_code=True)\n"
        "print(*sorted(answer['label'] for answer in segment(sys.argv[2])))\n"
    )
    photo = scenes / "validation" / "images" / "0.png"
    assert run_python(using, output, photo, hide=("hpool_vit",)).stdout.split()[-2:] == ["bright", "dark"]


def test_a_killed_run_resumes_from_the_last_checkpoint_that_is_whole(tmp_path, scenes, vit_folder, capsys):
    more = ["--pooling", "avg", "--hvt_pool", 1, "--num_train_epochs", 2]
    run_semantic_segmentation.main(flags(scenes, vit_folder, tmp_path / "whole", *more))
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    # Killed while it wrote the last checkpoint: its state comes last.
    (tmp_path / "killed" / "checkpoint-12" / "trainer_state.json").unlink()
    capsys.readouterr()
    run_semantic_segmentation.main(flags(scenes, vit_folder, tmp_path / "killed", *more))
    assert f"resuming from {tmp_path / 'killed' / 'checkpoint-6'}" in capsys.readouterr().out
    first, second = (
        AutoModelForSemanticSegmentation.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "killed")
    )
    for name, weight in first.items():
        torch.testing.assert_close(second[name], weight)


def test_upernet_on_a_trained_hpool_vit(tmp_path, scenes):
    trained = tiny_model(pool_kernel_size=(2, 2), pool_stride=(2, 2))
    trained.save_pretrained(tmp_path / "trained")
    HPoolViTImageProcessor.for_config(trained.config).save_pretrained(tmp_path / "trained")
    output = tmp_path / "out"
    more = ["--head", "upernet", "--num_train_epochs", 1]
    run_semantic_segmentation.main(flags(scenes, tmp_path / "trained", output, *more))
    model = AutoModelForSemanticSegmentation.from_pretrained(output)
    assert type(model).__name__ == "UperNetForSemanticSegmentation"
    assert model.backbone.out_features == ["stage1", "stage3", "stage4"]
    assert AutoImageProcessor.from_pretrained(output).size["width"] == 48
    assert "Import the package `hpool_vit` first" in (output / "README.md").read_text()
    assert type(hpool_vit.HPoolViTBackbone.from_pretrained(output / "backbone")).__name__ == "HPoolViTBackbone"


def test_the_maps_that_the_head_reads_can_be_chosen(tmp_path, scenes, vit_folder):
    more = ["--pooling", "none", "--out_indices", 1]
    args = run_semantic_segmentation.parse_args(flags(scenes, vit_folder, tmp_path / "out", *more))
    model, _ = run_semantic_segmentation.load_model(args)
    assert model.out_indices == [1] and model.decode_head.in_channels == model.config.hidden_size


def test_the_trunk_starts_with_its_trained_weights(tmp_path):
    trained = tiny_model(pool_mode="merge")
    trained.save_pretrained(tmp_path)
    HPoolViTImageProcessor.for_config(trained.config).save_pretrained(tmp_path)
    for head in ("linear", "upernet"):
        model, _, _ = run_semantic_segmentation.start_segmenter(str(tmp_path), head, ["dark", "bright"], (32, 48))
        trunk = (model if head == "linear" else model.backbone).hpool_vit.state_dict()
        expected = trained.hpool_vit.state_dict()
        assert all(torch.equal(weight, expected[name]) for name, weight in trunk.items())
    with pytest.raises(ValueError, match="choose linear, upernet"):
        run_semantic_segmentation.start_segmenter(str(tmp_path), "mlp", ["dark", "bright"], (32, 48))
