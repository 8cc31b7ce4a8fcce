"""The photos of the leaderboard: decoded once, and split into a half to choose by and one to report."""

import io
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, v2


MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
SPLIT_SEED = 0


class Photos(NamedTuple):
    """
    Attributes:
        pixels: (photos, 3, 224, 224), 8 bits; `normalize` makes what the model takes of them.
        labels: (photos,), the ImageNet classes.
    """

    pixels: torch.Tensor
    labels: torch.Tensor

    def part(self, chosen: torch.Tensor) -> "Photos":
        return Photos(self.pixels[chosen], self.labels[chosen])


def load_photos(parquet: Path, cache: Path | None = None, short_side: int = 227) -> Photos:
    """
    All photos of a Parquet file with the columns `image` (`bytes` of an image file) and `label`.

    Args:
        parquet: the file.
        cache: where the decoded photos are kept for the next call; None to decode them each time.
        short_side: what the shorter side is resized to (bicubic) before the middle 224 × 224 pixels are cut out.
    """
    if cache is not None and cache.exists():
        return Photos(*torch.load(cache, weights_only=True))
    table = pd.read_parquet(parquet)
    resize = v2.Resize(short_side, interpolation=InterpolationMode.BICUBIC)
    prepare = v2.Compose([resize, v2.CenterCrop(224), v2.PILToTensor()])
    images = [prepare(Image.open(io.BytesIO(image["bytes"])).convert("RGB")) for image in table["image"]]
    photos = Photos(torch.stack(images), torch.tensor(table["label"].to_numpy(copy=True)))
    if cache is not None:
        torch.save(tuple(photos), cache)
    return photos


def halves(num_photos: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The indices of the photos that rules are chosen by, and of those that are reported: a random half each."""
    order = torch.randperm(num_photos, generator=torch.Generator().manual_seed(SPLIT_SEED))
    return order[: num_photos // 2].sort().values, order[num_photos // 2 :].sort().values


def normalize(pixels: torch.Tensor) -> torch.Tensor:
    """From 8 bits to what the model was trained on."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (pixels.float() / 255 - mean) / std
