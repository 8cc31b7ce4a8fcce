"""Check that an exported model gives the logits of PyTorch, and that images are prepared for it in the same way."""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from hpool_vit import HPoolViTConfig

from ..shared.console import needs


BATCH_SIZES = (1, 2, 5)


class ExportError(ValueError):
    """A model that cannot be exported, or whose export is wrong; the message says why."""


def check_preprocessing(image_processor: Any, preprocessing: dict[str, Any], config: HPoolViTConfig) -> None:
    """
    Args:
        image_processor: the image processor of the model.
        preprocessing: the content of its preprocessor_config.json.
        config: the configuration of the model.

    Raises:
        ExportError: if predict_onnx.py would prepare an image differently.
    """
    with needs("export"):
        from torchvision.transforms.v2.functional import to_pil_image

    from .predict_onnx import preprocess

    height, width = (round(1.4 * side) for side in config.image_shape)
    image = random_images(1, 3, (height, 2 * width), torch.Generator().manual_seed(0))[0]
    image = to_pil_image((0.5 + 0.2 * image).clamp(0, 1)).convert("L" if config.num_channels == 1 else "RGB")
    expected = image_processor(image, return_tensors="pt").pixel_values[0]
    pixels = torch.from_numpy(preprocess(image, preprocessing))
    # Pillow and torchvision round the resized pixels differently, by a level or two of 255.
    if pixels.shape != expected.shape or (pixels - expected).abs().max() > 0.1:
        raise ExportError(
            f"predict_onnx.py cannot prepare images as {type(image_processor).__name__} does: save the model with an "
            "HPoolViTImageProcessor, or choose `format=torch_export`."
        )


def image_sizes(config: HPoolViTConfig, dynamic_image_size: bool) -> list[tuple[int, int]]:
    """Sizes (height, width) to check: the model's own, and with `dynamic_image_size` larger and smaller ones."""
    (rows, columns), patch = config.patch_grid(), config.patch_shape
    grids = [(rows, columns)]
    if dynamic_image_size:
        grids += [(rows + 2, columns + 1), (rows, 2 * columns), (max(rows - 1, 2), max(columns - 2, 2))]
    return [(rows * patch[0], columns * patch[1]) for rows, columns in grids]


def random_images(batch_size: int, channels: int, size: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    """Smooth colours with a little noise: unlike those of pure noise, their tokens differ clearly."""
    coarse = torch.randn(batch_size, channels, 6, 6, generator=generator)
    images = nn.functional.interpolate(coarse, size=size, mode="bicubic")
    return images + 0.2 * torch.randn(images.shape, generator=generator)


@torch.inference_mode()
def largest_difference(
    model: nn.Module,
    exported: Callable[[torch.Tensor], torch.Tensor],
    config: HPoolViTConfig,
    dynamic_image_size: bool,
) -> float:
    """The largest difference of a logit, over batches and images of several sizes."""
    generator = torch.Generator().manual_seed(0)
    differences = []
    for size, batch_size in itertools.product(image_sizes(config, dynamic_image_size), BATCH_SIZES):
        images = random_images(batch_size, config.num_channels, size, generator)
        differences.append((exported(images) - model(images)).abs().max())
    return torch.stack(differences).max().item()
