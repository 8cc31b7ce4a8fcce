"""What the commands for classifiers do with a folder of a segmentation model: the task, or a refusal with a remedy."""

import shlex
import shutil

import numpy as np
import pytest
import torch
import typer
from helpers import tiny_config
from huggingface_hub.cli.hf import app as hf
from image_files import picture
from onnxruntime import InferenceSession
from safetensors.torch import load_file
from transformers import pipeline

from hpool_vit import HPoolViTForSemanticSegmentation, HPoolViTImageProcessor
from hpool_vit.toolkit.command import main
from hpool_vit.toolkit.export.checks import random_images
from hpool_vit.toolkit.export.export import export_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "scenes"
    torch.manual_seed(0)
    labels = {"id2label": {0: "dark", 1: "grey", 2: "bright"}, "label2id": {"dark": 0, "grey": 1, "bright": 2}}
    small = {"num_hidden_layers": 2, "hvt_pool": [1], "image_size": (24, 32), "out_indices": [1, 2]}
    config = tiny_config(**labels, **small, pool_mode="merge", merge_ratio=0.4, initializer_range=0.3)
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
    assert "head" in printed and "stage 1" in printed


def test_visualize_draws_where_its_patches_went(folder, photo, tmp_path, capsys):
    tensors = tmp_path / "trace.safetensors"
    main(["visualize", *map(str, (folder, photo, "--output", tmp_path / "a.png", "--save_tensors", tensors))])
    assert "tokens: 48 → 29" in capsys.readouterr().out
    assert (tmp_path / "a.png").stat().st_size > 0 and load_file(tensors)


def test_push_names_the_command_that_uploads_it(folder, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["push", str(folder), "--repo_id", "me/scenes", "--dry_run", "--output_dir", str(tmp_path / "hub")])
    message = capsys.readouterr().err
    assert "`architectures` in config.json" in message and f"hf upload me/scenes {folder} --exclude" in message
    # The command is one of the Hub's.
    words = shlex.split(message.partition("`hf ")[2].partition("`")[0])
    group = typer.main.get_command(hf) if not hasattr(hf, "make_context") else hf
    name, subcommand, rest = group.resolve_command(group.make_context("hf", words), words)
    given = subcommand.make_context(name, list(rest)).params
    assert list(given["exclude"]) == ["checkpoint-*", "training_args.bin"] and given["path_in_repo"] is None
    assert not (tmp_path / "hub").exists()


def run_onnx(folder, pixel_values: torch.Tensor) -> torch.Tensor:
    session = InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"pixel_values": pixel_values.numpy()})[0])


# Tracing for any size takes minutes on a busy machine.
@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["one size", "any size"])
def test_export_writes_its_maps_of_scores_for_any_batch(folder, tmp_path, dynamic):
    record = export_model(str(folder), tmp_path / "out", dynamic_image_size=dynamic)
    assert record["largest_difference"] <= 1e-4
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"model.onnx", "export.json", "labels.json", "preprocessor_config.json"}
    model = HPoolViTForSemanticSegmentation.from_pretrained(folder).eval()
    for number, size in ((1, (24, 32)), (3, (32, 40) if dynamic else (24, 32))):
        images = random_images(number, 3, size, torch.Generator().manual_seed(number))
        with torch.no_grad():
            expected = model(images).logits
        assert expected.shape == (number, 3, size[0] // 4, size[1] // 4)
        torch.testing.assert_close(run_onnx(tmp_path / "out", images), expected, atol=1e-4, rtol=1e-4)


def test_export_resizes_maps_of_a_pooled_grid_and_writes_torch_export_too(tmp_path):
    grid = {"pool_mode": "avg", "pool_kernel_size": (2, 2), "pool_stride": (2, 2), "hvt_pool": [1]}
    config = tiny_config(**grid, num_hidden_layers=2, initializer_range=0.3)
    HPoolViTForSemanticSegmentation(config).save_pretrained(tmp_path / "model")
    HPoolViTImageProcessor(size={"height": 32, "width": 32}, do_center_crop=False).save_pretrained(tmp_path / "model")
    for format in ("onnx", "torch_export"):
        record = export_model(str(tmp_path / "model"), tmp_path / format, format=format)
        assert record["largest_difference"] <= 1e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "web"}, "`format=web` is for classifiers: use onnx, torch_export or aot"),
        ({"int8": "dynamic"}, "`int8=dynamic` is for classifiers: leave it out"),
    ],
)
def test_export_refuses_what_is_for_classifiers_alone(folder, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        export_model(str(folder), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_export_refuses_a_size_that_the_image_processor_does_not_prepare(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    HPoolViTImageProcessor(size={"height": 32, "width": 32}, do_center_crop=False).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"`image_size` \(24, 32\).* images of \(32, 32\): set `dynamic_image_size`"):
        export_model(str(tmp_path / "model"), tmp_path / "out")


@pytest.mark.parametrize("size", [(40, 28), (33, 50)])
def test_the_pipeline_of_transformers_gives_masks_of_the_images_size(folder, size):
    image = picture(1, size)
    answers = pipeline("image-segmentation", model=str(folder), trust_remote_code=True)(image)
    masks = np.stack([np.array(answer["mask"]) > 0 for answer in answers])
    assert masks.shape[1:] == size[::-1] and (masks.sum(0) == 1).all()
