"""What a model sees of an image and its mask: both are scaled, cropped and flipped alike."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image

from hpool_vit.modeling_hpool_vit import IGNORED_LABEL

from ..shared.console import needs


with needs("train"):
    from torchvision import tv_tensors
    from torchvision.transforms import v2


SCALES = (0.5, 2.0)


def train_pair_transform(
    image_processor: Any, scales: tuple[float, float] = SCALES, horizontal_flip: float = 0.5
) -> Callable[[Image.Image, Image.Image], dict[str, torch.Tensor]]:
    """
    Augmentation of an image and its mask: a random scale, a random crop of the image processor's size, and a flip.
    What a smaller image does not fill gets the mean colour, and does not count.

    Args:
        image_processor: its `size` has `height` and `width`.
        scales (`tuple[float, float]`): the smallest and the largest scale; at 1 the image just fits into the crop.
        horizontal_flip (`float`): the probability of a flip.

    Returns:
        A function of image and mask that returns `pixel_values` of shape (3, height, width) and `labels` of shape
        (height, width).
    """
    size = (image_processor.size["height"], image_processor.size["width"])
    fill = {tv_tensors.Image: [round(255 * mean) for mean in image_processor.image_mean]}
    steps = v2.Compose(
        [
            v2.ScaleJitter(size, scales, antialias=True),
            v2.RandomCrop(size, pad_if_needed=True, fill={**fill, tv_tensors.Mask: IGNORED_LABEL}),
            v2.RandomHorizontalFlip(horizontal_flip),
            v2.ToDtype({tv_tensors.Image: torch.float32, tv_tensors.Mask: torch.int64}, scale=True),
            v2.Normalize(image_processor.image_mean, image_processor.image_std),
        ]
    )
    # Not local functions: workers of a loader that are not forked get them pickled.
    return partial(augmented_pair, steps)


def augmented_pair(steps: v2.Compose, image: Image.Image, mask: Image.Image) -> dict[str, torch.Tensor]:
    pixels, labels = steps(tv_tensors.Image(v2.functional.pil_to_tensor(image)), to_mask(mask))
    return {"pixel_values": pixels.as_subclass(torch.Tensor), "labels": labels.as_subclass(torch.Tensor)}


def validation_pair_transform(image_processor: Any) -> Callable[[Image.Image, Image.Image], dict[str, torch.Tensor]]:
    """The image as its image processor prepares it, and the mask resized with it."""
    return partial(prepared_pair, image_processor)


def prepared_pair(image_processor: Any, image: Image.Image, mask: Image.Image) -> dict[str, torch.Tensor]:
    size = [image_processor.size["height"], image_processor.size["width"]]
    labels = v2.functional.resize(to_mask(mask), size, v2.InterpolationMode.NEAREST)
    return {
        "pixel_values": image_processor(image, return_tensors="pt").pixel_values[0],
        "labels": labels.as_subclass(torch.Tensor).long(),
    }


def to_mask(mask: Image.Image) -> tv_tensors.Mask:
    """The classes of the pixels, of shape (height, width)."""
    return tv_tensors.Mask(torch.from_numpy(np.array(mask)))
