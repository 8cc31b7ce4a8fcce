"""Images with masks, from two folders or from Parquet files, and what the model sees of them."""

import glob
import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from hpool_vit.modeling_hpool_vit import IGNORED_LABEL

from ..shared.console import needs
from ..shared.folders import list_images, some
from ..shared.images import DataError, decode_image, read_image


with needs("train"):
    import datasets


MASK_COLUMNS = ("annotation", "mask", "label", "labels", "segmentation", "semantic")
# In these, a pixel is a number; of a palette, the number of its colour.
MASK_MODES = ("1", "L", "P", "I", "I;16")


@dataclass
class MaskedImages:
    """
    Images and their masks.

    Args:
        rows: a table with the columns `image` and `mask`, each a dictionary of `bytes` and `path`.
        description: where they come from.
        num_labels: how many classes there are. A pixel of a mask is the number of its class, from 0.
        ignored: numbers of pixels that do not count, besides 255.
    """

    rows: Any
    description: str
    num_labels: int
    ignored: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Image.Image, Image.Image]:
        """The image in RGB, and its mask of the same size, in which 255 marks the pixels that do not count."""
        row = self.rows[index]
        name = row["image"].get("path") or f"image {index}"
        try:
            image, _ = decode_image(read_image(row["image"]))
            mask = self.decode_mask(read_image(row["mask"]))
        except ValueError as error:
            raise DataError(f"{name} of {self.description} cannot be used: {error}") from error
        if mask.size != image.size:
            raise DataError(
                f"{name} of {self.description} has {image.width} × {image.height} pixels, and its mask {mask.width} × "
                f"{mask.height}: give a mask of the same size."
            )
        return image, mask

    def decode_mask(self, data: bytes) -> Image.Image:
        try:
            with Image.open(io.BytesIO(data)) as file:
                mode, pixels = file.mode, np.array(file)
        # Pillow raises many kinds of errors for damaged files.
        except Exception as error:
            raise DataError(f"its mask is unreadable: {error}") from error
        if mode not in MASK_MODES:
            raise DataError(f"its mask has colours ({mode}), and a pixel must be the number of a class")
        pixels = pixels.astype(np.int64)
        pixels[np.isin(pixels, self.ignored)] = IGNORED_LABEL
        if wrong := sorted(set(np.unique(pixels).tolist()) - {IGNORED_LABEL} - set(range(self.num_labels))):
            raise DataError(
                f"its mask has the numbers {some(wrong)}, and there are {self.num_labels} classes: name all classes, "
                "or let these pixels not count"
            )
        return Image.fromarray(pixels.astype(np.uint8))


def load_masked_images(
    source: str,
    class_names: list[str],
    *,
    ignored: tuple[int, ...] = (),
    image_column: str | None = None,
    mask_column: str | None = None,
) -> MaskedImages:
    """
    Finds images and masks.

    Args:
        source: a folder with the folders `images` and `masks`, whose files have the same names but for their endings;
            or a Parquet file, or a pattern of several.
        class_names: the names of the classes 0, 1, … in the masks.
        ignored: numbers of pixels that do not count, besides 255.
        image_column, mask_column: the columns of Parquet files. Default: the two columns that hold images, of which
            the mask has a usual name such as `annotation` or `mask`.

    Raises:
        DataError: in one line, for anything that is missing or does not fit together.
    """
    if len(class_names) < 2 or len(class_names) > IGNORED_LABEL:
        raise DataError(f"`class_names` has {len(class_names)} names: give from 2 to {IGNORED_LABEL}.")
    rows = open_folder(source) if os.path.isdir(source) else open_files(source, image_column, mask_column)
    if not len(rows):
        raise DataError(f"{source} holds no images.")
    return MaskedImages(rows, source, len(class_names), ignored)


def files_by_stem(folder: str) -> dict[str, str]:
    """The images below a folder by their paths without endings."""
    files: dict[str, str] = {}
    for file in list_images(folder).files:
        stem = os.path.splitext(os.path.relpath(file, folder))[0]
        if stem in files:
            raise DataError(f"{folder} has {files[stem]} and {file}, which differ in their endings alone: rename one.")
        files[stem] = file
    return files


def open_folder(folder: str) -> list[dict[str, Any]]:
    images, masks = (files_by_stem(os.path.join(folder, name)) for name in ("images", "masks"))
    if not images or not masks:
        raise DataError(f"{folder} needs the folders `images` and `masks`, with files of the same names in them.")
    if alone := sorted(images.keys() ^ masks.keys()):
        raise DataError(f"{folder}: only one of image and mask exists of {some(alone)}.")
    return [
        {"image": {"bytes": None, "path": images[name]}, "mask": {"bytes": None, "path": masks[name]}}
        for name in sorted(images)
    ]


def open_files(pattern: str, image_column: str | None, mask_column: str | None) -> Any:
    files = [pattern] if os.path.isfile(pattern) else sorted(glob.glob(os.path.expanduser(pattern), recursive=True))
    if not files:
        raise DataError(f"{pattern} is neither a folder nor a Parquet file, and matches none.")
    try:
        rows = datasets.load_dataset("parquet", data_files=[glob.escape(file) for file in files], split="train")
    except Exception as error:  # the errors of `datasets` have no class in common
        raise DataError(f"{pattern} cannot be read: {str(error.__cause__ or error).splitlines()[0]}") from error
    image_column, mask_column = find_columns(pattern, rows.features, image_column, mask_column)
    rows = rows.select_columns([image_column, mask_column])
    rows = rows.rename_columns({image_column: "image", mask_column: "mask"})
    for column in ("image", "mask"):
        rows = rows.cast_column(column, datasets.Image(decode=False))
    return rows


def find_columns(pattern: str, features: Any, image_column: str | None, mask_column: str | None) -> tuple[str, str]:
    """The given columns, or those that hold images and have usual names."""
    found = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    mask_column = mask_column or next((name for name in MASK_COLUMNS if name in found), None)
    image_column = image_column or next((name for name in found if name != mask_column), None)
    if image_column not in features or mask_column not in features:
        raise DataError(f"{pattern} has the columns {some(features)}: set `image_column` and `mask_column` to two.")
    return image_column, mask_column


class SegmentationDataset(Dataset):
    """`MaskedImages` as the Trainer takes them: `transform` makes `pixel_values` and `labels` of image and mask."""

    def __init__(self, images: MaskedImages, transform: Callable[[Image.Image, Image.Image], dict[str, torch.Tensor]]):
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.transform(*self.images[index])


def read_class_names(text: str) -> list[str]:
    """The names of the classes, from a file with one a line or from a text with commas."""
    if os.path.isfile(text):
        return [line.strip() for line in Path(text).read_text(encoding="utf-8").splitlines() if line.strip()]
    return [name.strip() for name in text.split(",") if name.strip()]
