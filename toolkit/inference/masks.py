"""Segment many files: the classes of the pixels as coloured masks, and the shares of the classes as answers."""

import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlparse

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers.modeling_outputs import SemanticSegmenterOutput

from hpool_vit.modeling_hpool_vit import IGNORED_LABEL

from ..dense.pictures import overlay, save_mask
from .classify import Predictions
from .contact_sheet import make_thumbnail
from .inputs import is_address
from .outputs import Prediction


# A mask is a PNG file of 8 bits, in which 255 stands for pixels that do not count.
MOST_CLASSES = IGNORED_LABEL


class Segmenter:
    """Gives each image the shares of its classes, largest first, and its mask. Called as a pipeline is."""

    def __init__(self, model: nn.Module, image_processor: Any, device: torch.device):
        if model.config.num_labels > MOST_CLASSES:
            raise ValueError(f"The model has {model.config.num_labels} classes, and a mask of 8 bits {MOST_CLASSES}.")
        self.model, self.image_processor, self.device = model.to(device), image_processor, device

    @torch.no_grad()
    def __call__(
        self, images: Iterable[Image.Image], batch_size: int, top_k: int
    ) -> Iterator[tuple[list[dict[str, Any]], np.ndarray]]:
        images = iter(images)
        while batch := list(islice(images, batch_size)):
            inputs = self.image_processor(batch, return_tensors="pt").to(self.device, self.model.dtype)
            logits = self.model(**inputs).logits
            finite = logits.isfinite().flatten(1).all(1).tolist()
            for image, scores, is_finite in zip(batch, logits.split(1), finite, strict=True):
                pixels = self.mask(scores, (image.height, image.width))
                yield (self.shares(pixels)[:top_k] if is_finite else [{"label": "", "score": np.nan}]), pixels

    def mask(self, logits: torch.Tensor, size: tuple[int, int]) -> np.ndarray:
        outputs = SemanticSegmenterOutput(logits=logits)
        [mask] = self.image_processor.post_process_semantic_segmentation(outputs, target_sizes=[size])
        return mask.to(torch.uint8).cpu().numpy()

    def shares(self, mask: np.ndarray) -> list[dict[str, Any]]:
        names = self.model.config.id2label
        counts = np.bincount(mask.ravel(), minlength=self.model.config.num_labels) / mask.size
        order = np.argsort(-counts, kind="stable")
        return [{"label": names[int(label)], "score": float(counts[label])} for label in order]


@dataclass
class Segmentations(Predictions):
    """
    Predictions whose answers are the classes of the image and their shares of its pixels, and that write masks while
    you iterate.

    Args:
        masks: the folder of the masks. It has one PNG file per image, see `mask_paths`.
    """

    masks: Path = field(kw_only=True)

    def __post_init__(self) -> None:
        self.masks.mkdir(parents=True, exist_ok=True)
        self.paths = mask_paths(self.files, self.masks)

    def _take(self, prediction: Prediction, answers: Any) -> None:
        shares, mask = answers
        super()._take(prediction, shares)
        if prediction.reason:
            return
        save_mask(mask, self.paths[prediction.file])
        if prediction.thumbnail:
            prediction.thumbnail = make_thumbnail(overlay(Image.open(io.BytesIO(prediction.thumbnail)), mask))


def mask_paths(files: list[str], folder: Path) -> dict[str, Path]:
    """For each file the path of its mask: the name of the file, with a number where several have the same."""
    paths: dict[str, Path] = {}
    taken: set[str] = set()
    for file in files:
        stem = (PurePosixPath(urlparse(file).path).stem or "image") if is_address(file) else Path(file).stem
        name, number = stem, 1
        while name.lower() in taken:
            number += 1
            name = f"{stem}-{number}"
        taken.add(name.lower())
        paths[file] = folder / f"{name}.png"
    return paths
