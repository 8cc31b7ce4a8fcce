"""How close the features of a model that pools come to those of the ViT that it was converted from."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from PIL import Image
from transformers.image_processing_utils import BaseImageProcessor

from hpool_vit import HPoolViTForImageClassification

from ..shared.console import check_at_least_one
from ..shared.folders import counted, list_images
from ..shared.images import BadImageError, decode_image, read_image
from .checkpoint import ConversionError


NUM_IMAGES = 256
BATCH_SIZE = 16
# The share of the images whose similarity is below `low_similarity`.
LOW_SHARE = 0.05


@dataclass
class Comparison:
    """
    A model with its pooling beside the same model without, which computes what its source does.

    Attributes:
        num_images (`int`): the number of images.
        mean_similarity (`float`): the mean cosine similarity of the pooled features.
        low_similarity (`float`): the similarity that 5 % of the images stay below.
        agreement (`float`, *optional*): how often the top classes are the same; None without a trained head.
    """

    num_images: int
    mean_similarity: float
    low_similarity: float
    agreement: float | None = None

    def __str__(self) -> str:
        text = (
            f"Pooled features of {counted(self.num_images, 'image')}, with and without pooling: cosine similarity "
            f"{self.mean_similarity:.4f} (5 % of the images below {self.low_similarity:.4f})"
        )
        return text + ("." if self.agreement is None else f"; the top class agrees for {self.agreement:.1%}.")


@torch.no_grad()
def compare_with_source(
    model: HPoolViTForImageClassification,
    image_processor: BaseImageProcessor,
    folder: str | Path,
    num_images: int = NUM_IMAGES,
    has_trained_head: bool = True,
) -> Comparison:
    """
    Compares a converted model with the same model without pooling, which computes the features of its source.

    Args:
        model ([`HPoolViTForImageClassification`]): the converted model, which stays as it is.
        image_processor: prepares the images for it.
        folder (`str`): a folder of images, at any depth. Files that are not images are left out.
        num_images (`int`, defaults to 256): at most so many of them, evenly spread over the folder.
        has_trained_head (`bool`, defaults to `True`): whether the head is the source's, so that its answers count.

    Raises:
        ConversionError: for a folder without images.
        ValueError: for a number below 1.
    """
    check_at_least_one(compare_images=num_images)
    hvt_pool, was_training = model.config.hvt_pool, model.training
    features: dict[bool, list[torch.Tensor]] = {True: [], False: []}
    model.eval()
    try:
        for pixel_values in _batches(folder, image_processor, num_images, model):
            for pools in features:
                model.set_hvt_pool(hvt_pool if pools else None)
                features[pools].append(model.hpool_vit(pixel_values).pooler_output)
    finally:
        model.set_hvt_pool(hvt_pool)
        model.train(was_training)
    pooled, unpooled = (torch.cat(features[pools]) for pools in (True, False))
    similarity = torch.nn.functional.cosine_similarity(pooled.double(), unpooled.double())
    agreement = None
    if has_trained_head and model.num_labels:
        classes = [model.classifier(rows).argmax(dim=1) for rows in (pooled, unpooled)]
        agreement = (classes[0] == classes[1]).double().mean().item()
    return Comparison(
        len(similarity), similarity.mean().item(), torch.quantile(similarity, LOW_SHARE).item(), agreement
    )


def _batches(
    folder: str | Path, image_processor: BaseImageProcessor, num_images: int, model: HPoolViTForImageClassification
) -> Iterator[torch.Tensor]:
    """The images of a folder, prepared and on the model's device."""
    if not Path(folder).is_dir():
        raise ConversionError(f"`compare={str(folder)!r}` is not a folder: pass one that holds images.")
    files = list_images(folder).files
    # Folders are often one class after the other.
    images = islice(_readable(files[:: max(1, len(files) // num_images)]), num_images)
    is_empty = True
    while batch := list(islice(images, BATCH_SIZE)):
        is_empty = False
        yield image_processor(batch, return_tensors="pt")["pixel_values"].to(model.device)
    if is_empty:
        raise ConversionError(f"`compare={str(folder)!r}` holds no image that can be read.")


def _readable(files: list[str]) -> Iterator[Image.Image]:
    for file in files:
        with suppress(BadImageError):
            yield decode_image(read_image({"bytes": None, "path": file}))[0]
