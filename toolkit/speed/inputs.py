"""What a search works on: a model without pooling that can merge, and images, of which some are held back."""

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hpool_vit import HPoolViTConfig
from hpool_vit.configuration_hpool_vit import POOL_MODES

from ..conversion.checkpoint import ConversionError
from ..conversion.convert import convert
from ..conversion.sources import is_hpool_vit
from ..conversion.vit import POOLING_DEFAULTS
from ..shared.console import schedule_name
from ..shared.folders import counted, escaped, list_images
from ..shared.images import BadImageError, BadImages, decode_image, read_image
from ..shared.saved_model import (
    SavedModelError,
    check_complete,
    check_finite,
    check_weights,
    is_segmenter,
    load_saved_model,
)


# Half of them for the search and half for the report.
FEWEST_IMAGES, ENOUGH_IMAGES = 16, 256
# What a recovery learns from, at most so many images and bytes: 4096 images of 224 × 224 pixels take 1.2 GB.
FEWEST_TO_LEARN_FROM, MOST_TO_LEARN_FROM, MOST_BYTES_TO_LEARN_FROM = 16, 4096, 1_300_000_000
# How tokens merge in a model that did not say so before.
MERGING = {"pool_mode": "merge"} | {
    name: value for name, value in POOLING_DEFAULTS["merge"].items() if name not in ("hvt_pool", "merge_ratio")
}


def load_model(name: str) -> tuple[nn.Module, Any, list[str]]:
    """
    A model that does not pool and can merge, in evaluation mode, its image processor, and notes.

    Args:
        name: the folder or Hub id of an HPool-ViT, or whatever [`convert`] reads.

    Raises:
        ValueError: if it cannot be loaded, or was trained with another pooling, so that without it there is nothing to
            compare with.
    """
    if is_hpool_vit(name):
        model, image_processor, notes = load_hpool_vit(name)
    else:
        try:
            model, image_processor, report = convert(name, hvt_pool=None, pool_mode="merge")
        except ConversionError as error:
            raise ConversionError(f"{name} cannot be used: {as_asked_of_convert(str(error))}") from error
        notes = list(map(as_asked_of_convert, report.notes))
        check_finite(name, model)
    return model.eval(), image_processor, notes


def as_asked_of_convert(message: str) -> str:
    """The message of the converter to somebody who has not called it: what it asks for, it must be asked."""
    return message.replace("pass `", "run `hpool-vit convert` first, with `")


def load_hpool_vit(name: str) -> tuple[nn.Module, Any, list[str]]:
    config = HPoolViTConfig.from_pretrained(name)
    if is_segmenter(config):
        raise SavedModelError(f"{name} segments images: a search compares the answers of classifiers, and features.")
    pools = POOL_MODES[config.pool_mode].has_positions and config.hvt_pool
    if pools:
        raise SavedModelError(
            f"{name} was trained with {config.pool_mode} pooling at blocks {schedule_name(config.hvt_pool)}, and a "
            "search compares with the model without pooling: give it the ViT that you converted, or a model that "
            "merges."
        )
    overrides = MERGING if config.pool_mode != "merge" else {}
    model, image_processor, notes, new = load_as_saved(name, **overrides)
    if model.config.num_labels:
        check_weights(name, model, new)
    else:
        check_complete(name, model, new)
    model.config.change_schedule(None)
    model.config.hvt_pool_choices = model.config.speeds = None
    return model, image_processor, notes


def load_as_saved(name: str, **overrides: Any) -> tuple[nn.Module, Any, list[str], list[str]]:
    """What [`load_saved_model`] returns, without a head if the folder has none."""
    loaded = load_saved_model(name, **overrides)
    new = loaded[-1]
    if new and all(weight.startswith("classifier.") for weight in new):
        return load_saved_model(name, num_labels=0, **overrides)
    return loaded


@dataclass
class Photos:
    """
    The images of a folder as the model takes them.

    Attributes:
        folder: the folder.
        files: the images that are used, in the order of `pixel_values`.
        pixel_values: (images, channels, height, width).
        num_found: how many image files the folder has.
        bad_images: those that could not be read.
        notes: what else was left out.
        rest: the image files that were not read, in random order.
    """

    folder: str
    files: list[str]
    pixel_values: torch.Tensor
    num_found: int
    bad_images: BadImages
    notes: list[str] = field(default_factory=list)
    rest: list[str] = field(default_factory=list)

    @property
    def num_searched(self) -> int:
        """The first images are for the search; the others are held back for the report."""
        return (len(self.files) + 1) // 2

    @property
    def held_back(self) -> torch.Tensor:
        """The `pixel_values` of the images held back."""
        return self.pixel_values[self.num_searched :]

    def labels_held_back(self, id2label: dict[int, str]) -> torch.Tensor | None:
        """The class of each image held back; None unless the names of the folders say it of all."""
        return read_labels(self.files[self.num_searched :], self.folder, id2label)


def load_photos(folder: str | Path, image_processor: Any, num_images: int, seed: int = 0) -> Photos:
    """
    Reads images of a folder, at any depth and in random order, until there are enough.

    Args:
        folder: the folder.
        image_processor: the model's.
        num_images: how many images to use.
        seed: what decides which ones.

    Raises:
        ValueError: if the folder does not exist or has too few images.
    """
    if num_images < FEWEST_IMAGES:
        raise ValueError(f"`num_images={num_images}` must be at least {FEWEST_IMAGES}.")
    if not Path(folder).is_dir():
        raise ValueError(f"`images={folder}` is not a folder.")
    listing = list_images(folder)
    # Sorted by their names, so that a folder gives the same images wherever it lies.
    order = sorted(listing.files)
    random.Random(seed).shuffle(order)
    bad_images = BadImages()
    files, pixel_values = read_photos(order, image_processor, num_images, bad_images)
    if len(files) < FEWEST_IMAGES:
        raise ValueError(too_few(folder, files, bad_images))
    rest = order[len(files) + len(bad_images.of_kind("skipped")) :]
    notes = notes_on(folder, files, listing.notes())
    return Photos(str(folder), files, torch.cat(pixel_values), len(order), bad_images, notes, rest)


def read_photos(
    order: list[str],
    image_processor: Any,
    num_images: int,
    bad_images: BadImages,
    dtype: torch.dtype = torch.float32,
) -> tuple[list[str], list[torch.Tensor]]:
    """The first `num_images` files that can be read, and each image prepared: (1, channels, height, width)."""
    files, pixel_values = [], []
    for file in order:
        if len(files) == num_images:
            break
        try:
            image, _ = decode_image(read_image({"bytes": None, "path": file}))
        except BadImageError as error:
            bad_images.add([{"name": escaped(file), "kind": "skipped", "reason": str(error)}])
            continue
        files.append(file)
        pixel_values.append(image_processor(image, return_tensors="pt").pixel_values.to(dtype))
    return files, pixel_values


def read_pool(photos: Photos, image_processor: Any) -> torch.Tensor:
    """
    The images that a model may learn from: those for the search, and then those that were not read yet. None of them
    is held back for the report. In 16 bits.

    Raises:
        ValueError: if there are too few.
    """
    bytes_of_one = 2 * photos.pixel_values[0].numel()
    most = min(MOST_TO_LEARN_FROM, max(MOST_BYTES_TO_LEARN_FROM // bytes_of_one, FEWEST_TO_LEARN_FROM))
    num_more = max(most - photos.num_searched, 0)
    _, more = read_photos(photos.rest, image_processor, num_more, photos.bad_images, torch.float16)
    searched = photos.pixel_values[: photos.num_searched]
    pool = searched.new_empty(len(searched) + len(more), *searched.shape[1:], dtype=torch.float16)
    pool[: len(searched)] = searched
    for index in reversed(range(len(searched), len(pool))):
        pool[index] = more.pop()[0]  # which gives its memory back: together they are as large as the pool
    if len(pool) < FEWEST_TO_LEARN_FROM:
        raise ValueError(
            f"`images={photos.folder}` leaves {counted(len(pool), 'image')} to learn from: `recover` needs "
            f"{FEWEST_TO_LEARN_FROM} besides as many for the report, and hundreds are better. They need no labels."
        )
    return pool


def too_few(folder: str | Path, files: list[str], bad_images: BadImages) -> str:
    message = f"`images={folder}` has {counted(len(files), 'image')} that can be read"
    if skipped := bad_images.of_kind("skipped"):
        first = skipped[0]
        message += f" and {len(skipped)} that cannot (the first is {first['name']}: {first['reason']})"
    return f"{message}: at least {FEWEST_IMAGES} are needed, and {ENOUGH_IMAGES} are better. They need no labels."


def notes_on(folder: str | Path, files: list[str], notes: list[str]) -> list[str]:
    if len(files) < ENOUGH_IMAGES // 4:
        notes = [*notes, f"{len(files)} images are few: with {ENOUGH_IMAGES} you get better and surer results."]
    return [f"note: {note}" for note in notes]


def read_labels(files: list[str], folder: str, id2label: dict[int, str]) -> torch.Tensor | None:
    """
    The class of each image by the name of its sub-folder: a name of the model's class, one of several names separated
    by commas, or its number. None unless every image has one.
    """
    known: dict[str, int] = {}
    for index, label in id2label.items():
        for name in (str(index), *str(label).split(","), str(label)):
            known.setdefault(name.strip().casefold(), index)
    labels = []
    for file in files:
        first, *rest = Path(file).relative_to(folder).parts
        label = known.get(first.casefold()) if rest else None
        if label is None:
            return None
        labels.append(label)
    return torch.tensor(labels)
