"""Images and masks: where they come from, and what the model sees of them."""

import pickle

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from image_files import encoded, picture
from PIL import Image

from hpool_vit import HPoolViTImageProcessor
from hpool_vit.toolkit.dense.augmentation import train_pair_transform, validation_pair_transform
from hpool_vit.toolkit.dense.data import SegmentationDataset, load_masked_images, read_class_names
from hpool_vit.toolkit.shared.images import DataError


NAMES = ["road", "sky", "tree"]


def mask(*values: int) -> Image.Image:
    """Columns of these numbers, as large as `picture`."""
    return Image.fromarray(np.tile(np.repeat(np.array(values, dtype=np.uint8), 24 // len(values)), (20, 1)))


def write_pairs(folder, masks: dict[str, Image.Image]):
    (folder / "images").mkdir(parents=True)
    (folder / "masks").mkdir()
    for seed, (name, pixels) in enumerate(masks.items()):
        picture(seed).save(folder / "images" / f"{name}.jpg")
        pixels.save(folder / "masks" / f"{name}.png")
    return folder


def write_parquet(path, masks: list[Image.Image]):
    rows = {
        "image": [{"bytes": encoded(picture(seed)), "path": f"{seed}.png"} for seed in range(len(masks))],
        "annotation": [{"bytes": encoded(pixels), "path": f"{seed}-mask.png"} for seed, pixels in enumerate(masks)],
    }
    features = '{"info": {"features": {"image": {"_type": "Image"}, "annotation": {"_type": "Image"}}}}'
    table = pyarrow.table(rows).replace_schema_metadata({"huggingface": features})
    pyarrow.parquet.write_table(table, path)
    return path


class TestSources:
    def test_a_folder_pairs_images_and_masks_by_their_names(self, tmp_path):
        images = load_masked_images(str(write_pairs(tmp_path, {"b": mask(2, 0), "a": mask(0, 1)})), NAMES)
        assert [np.unique(np.array(images[index][1])).tolist() for index in (0, 1)] == [[0, 1], [0, 2]]
        assert images[0][0].size == images[0][1].size == (24, 20)

    def test_parquet_columns_are_found_and_pixels_left_out(self, tmp_path):
        images = load_masked_images(str(write_parquet(tmp_path / "a.parquet", [mask(0, 7)])), NAMES, ignored=(7,))
        assert np.unique(np.array(images[0][1])).tolist() == [0, 255]

    def test_the_number_of_a_palettes_colour_is_the_class(self, tmp_path):
        coloured = mask(0, 2)
        coloured.putpalette([9, 9, 9, 8, 8, 8, 7, 7, 7])
        images = load_masked_images(str(write_pairs(tmp_path, {"a": coloured})), NAMES)
        assert np.unique(np.array(images[0][1])).tolist() == [0, 2]

    @pytest.mark.parametrize(
        ("pixels", "message"),
        [
            (mask(0, 3), r"a.jpg of .* its mask has the numbers 3, and there are 3 classes"),
            (mask(0, 1).convert("RGB"), "its mask has colours"),
            (mask(0, 1).resize((12, 20)), "24 × 20 pixels, and its mask 12 × 20"),
        ],
        ids=["number", "colours", "size"],
    )
    def test_a_mask_that_does_not_fit_is_refused_by_the_images_name(self, tmp_path, pixels, message):
        images = load_masked_images(str(write_pairs(tmp_path, {"a": pixels})), NAMES)
        with pytest.raises(DataError, match=message):
            images[0]

    @pytest.mark.parametrize("keep", [0, 40, -30], ids=["empty", "header", "truncated"])
    def test_a_damaged_mask_is_refused_by_the_images_name(self, tmp_path, keep):
        folder = write_pairs(tmp_path, {"a": mask(0, 1)})
        file = folder / "masks" / "a.png"
        file.write_bytes(file.read_bytes()[:keep])
        with pytest.raises(DataError, match=r"a\.jpg of .* cannot be used: its mask is unreadable"):
            load_masked_images(str(folder), NAMES)[0]

    @pytest.mark.parametrize("kind", ["images", "masks"])
    def test_two_files_of_one_name_are_refused(self, tmp_path, kind):
        folder = write_pairs(tmp_path, {"a": mask(0, 1)})
        mask(0, 1).save(folder / kind / "a.bmp")
        with pytest.raises(DataError, match=r"a\.\w+ and .*a\.\w+, which differ in their endings alone"):
            load_masked_images(str(folder), NAMES)

    def test_missing_parts_are_refused(self, tmp_path):
        folder = write_pairs(tmp_path / "data", {"a": mask(0, 1), "b": mask(0, 1)})
        (folder / "masks" / "b.png").unlink()
        with pytest.raises(DataError, match="only one of image and mask exists of b"):
            load_masked_images(str(folder), NAMES)
        with pytest.raises(DataError, match="needs the folders `images` and `masks`"):
            load_masked_images(str(tmp_path), NAMES)
        with pytest.raises(DataError, match="neither a folder nor a Parquet file"):
            load_masked_images(str(tmp_path / "no.parquet"), NAMES)
        with pytest.raises(DataError, match="set `image_column` and `mask_column`"):
            load_masked_images(str(write_parquet(tmp_path / "a.parquet", [mask(0, 1)])), NAMES, mask_column="no")
        with pytest.raises(DataError, match="`class_names` has 1 names"):
            load_masked_images(str(folder), ["road"])

    def test_class_names_come_from_a_text_or_a_file(self, tmp_path):
        (tmp_path / "names.txt").write_text("road\nsky\n\n")
        assert read_class_names("road, sky") == read_class_names(str(tmp_path / "names.txt")) == ["road", "sky"]


class TestTransforms:
    @pytest.fixture
    def pair(self):
        """An image whose red is its class: whatever happens to both, it stays so."""
        classes = np.random.default_rng(0).integers(0, 3, (6, 8)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
        return Image.fromarray(np.stack([classes * 100] * 3, axis=-1)), Image.fromarray(classes)

    @pytest.fixture
    def processor(self):
        return HPoolViTImageProcessor(
            size={"height": 32, "width": 48}, do_center_crop=False, image_mean=[0, 0, 0], image_std=[1, 1, 1]
        )

    def test_augmentation_moves_image_and_mask_alike(self, pair, processor):
        transform = train_pair_transform(processor)
        shares, seen = [], set()
        for _ in range(30):
            example = transform(*pair)
            assert example["pixel_values"].shape == (3, 32, 48) and example["labels"].shape == (32, 48)
            assert example["labels"].dtype == torch.int64 and example["pixel_values"].dtype == torch.float32
            counts = example["labels"] != 255
            given = (example["pixel_values"][0] * 255 / 100).round().long()
            shares.append((given == example["labels"])[counts].float().mean().item())
            seen.add(example["labels"].numpy().tobytes())
        # At the borders between classes the image is interpolated, and the mask is not.
        assert min(shares) > 0.6 and np.mean(shares) > 0.75
        assert len(seen) > 25

    def test_what_a_small_image_does_not_fill_does_not_count(self, pair, processor):
        example = train_pair_transform(processor, scales=(0.5, 0.5))(*pair)
        share = (example["labels"] == 255).float().mean()
        assert 0.75 < share < 1

    @pytest.mark.parametrize("make_transform", [train_pair_transform, validation_pair_transform])
    def test_workers_that_are_not_forked_get_the_images_pickled(self, tmp_path, processor, make_transform):
        write_pairs(tmp_path, {"a": mask(0, 1)})
        dataset = SegmentationDataset(load_masked_images(str(tmp_path), NAMES), make_transform(processor))
        examples = []
        for copy in (dataset, pickle.loads(pickle.dumps(dataset))):
            torch.manual_seed(0)
            examples.append(copy[0])
        assert all(torch.equal(examples[0][name], examples[1][name]) for name in ("pixel_values", "labels"))

    def test_validation_shows_what_the_image_processor_prepares(self, pair, processor):
        example = validation_pair_transform(processor)(*pair)
        expected = processor(pair[0], return_tensors="pt").pixel_values[0]
        assert torch.equal(example["pixel_values"], expected)
        assert example["labels"].shape == (32, 48) and set(example["labels"].unique().tolist()) == {0, 1, 2}
