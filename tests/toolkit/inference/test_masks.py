"""`hpool-vit predict` with a model that segments: coloured masks, and the shares of the classes as the report."""

import csv

import numpy as np
import pytest
import torch
from helpers import call_command, tiny_config
from image_files import picture
from PIL import Image

from hpool_vit import HPoolViTForSemanticSegmentation, HPoolViTImageProcessor
from hpool_vit.toolkit import predict
from hpool_vit.toolkit.dense.pictures import palette
from hpool_vit.toolkit.inference.masks import Segmenter, mask_paths


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model that answers with the brightness of each patch: dark, grey or bright."""
    folder = tmp_path_factory.mktemp("model") / "scenes"
    labels = {"id2label": {0: "dark", 1: "grey", 2: "bright"}, "label2id": {"dark": 0, "grey": 1, "bright": 2}}
    torch.manual_seed(0)
    config = tiny_config(**labels, pool_mode="merge", merge_ratio=0.2, initializer_range=0.3)
    HPoolViTForSemanticSegmentation(config).save_pretrained(folder)
    HPoolViTImageProcessor(size={"height": 32, "width": 32}, do_center_crop=False).save_pretrained(folder)
    return folder


@pytest.fixture
def photos(tmp_path):
    (tmp_path / "photos" / "more").mkdir(parents=True)
    picture(0, (40, 28)).save(tmp_path / "photos" / "a.png")
    picture(1, (33, 50)).save(tmp_path / "photos" / "more" / "a.png")
    (tmp_path / "photos" / "text.jpg").write_text("no picture")
    return tmp_path / "photos"


def test_more_classes_than_a_mask_can_tell_apart_are_refused(folder):
    model = HPoolViTForSemanticSegmentation(tiny_config(num_labels=256, hvt_pool=None))
    with pytest.raises(ValueError, match="The model has 256 classes, and a mask of 8 bits 255"):
        Segmenter(model, HPoolViTImageProcessor(), torch.device("cpu"))


def test_masks_have_the_size_of_the_images_and_the_report_has_their_shares(folder, photos, tmp_path, capsys):
    masks, output, sheet = tmp_path / "masks", tmp_path / "answers.csv", tmp_path / "sheet.html"
    flags = ["--masks", masks, "--output", output, "--contact_sheet", sheet, "--device", "cpu", "--disable_tqdm"]
    result = call_command(capsys, "predict", folder, photos, *flags)
    assert result.returncode == 1 and "2 of 3 files classified" in result.stderr
    rows = {row["file"]: row for row in csv.DictReader(output.open())}
    names = ["dark", "grey", "bright"]
    for file, mask, size in ((photos / "a.png", "a.png", (40, 28)), (photos / "more" / "a.png", "a-2.png", (33, 50))):
        with Image.open(masks / mask) as image:
            pixels = np.array(image)
            assert image.size == size and np.array_equal(np.array(image.convert("RGB")), palette()[pixels])
        row = rows[str(file)]
        assert float(row["score"]) == pytest.approx((pixels == names.index(row["label"])).mean(), abs=1e-5)
        assert sum(float(row[f"score{rank}"]) for rank in ("", "_2", "_3")) == pytest.approx(1, abs=1e-5)
    assert "unreadable" in rows[str(photos / "text.jpg")]["error"]
    assert {path.name for path in masks.iterdir()} == {"a.png", "a-2.png"}
    assert sheet.read_text().count("data:image/jpeg") == 2


def test_a_mask_is_what_the_model_says_of_the_image(folder, photos, tmp_path):
    [prediction] = predict(str(folder), [str(photos / "a.png")], masks=tmp_path / "masks", device="cpu")
    model = HPoolViTForSemanticSegmentation.from_pretrained(folder).eval()
    processor = HPoolViTImageProcessor.from_pretrained(folder)
    with Image.open(photos / "a.png") as image, torch.no_grad():
        outputs = model(**processor(image, return_tensors="pt"))
    [expected] = processor.post_process_semantic_segmentation(outputs, target_sizes=[(28, 40)])
    with Image.open(tmp_path / "masks" / "a.png") as mask:
        assert np.array_equal(np.array(mask), expected.numpy())
    assert prediction.answers[0]["score"] == max(answer["score"] for answer in prediction.answers)


def test_the_folder_of_the_masks_is_for_models_that_segment_and_for_them_only(folder, saved_folder, photos, tmp_path):
    with pytest.raises(ValueError, match="segments images: give a folder for the `masks`"):
        predict(str(folder), [str(photos)], device="cpu")
    with pytest.raises(ValueError, match="is for models that segment images"):
        predict(str(saved_folder), [str(photos)], masks=tmp_path / "masks", device="cpu")


def test_a_mask_never_replaces_an_image(folder, photos):
    with pytest.raises(ValueError, match=r"a.png is one of the images and would be overwritten"):
        predict(str(folder), [str(photos / "a.png")], masks=photos, device="cpu")


def test_files_of_one_name_get_masks_of_their_own(tmp_path):
    files = ["x/a.png", "x/A.jpg", "y/a.png", "https://example.org/b.jpg?size=1", "https://example.org/"]
    names = [path.name for path in mask_paths(files, tmp_path).values()]
    assert names == ["a.png", "A-2.png", "a-3.png", "b.png", "image.png"]
