"""From tensors and a configuration to a model, whatever the source is, with a report of what could not be kept."""

from collections.abc import Collection
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from hpool_vit import HPoolViTConfig, HPoolViTForImageClassification

from .checkpoint import Checkpoint, ConversionError, square_or_pair
from .compare import Comparison


# Published widths whose heads are not 64 wide (ViT-So400m, -H, -g and -G).
HEADS_OF_WIDTH = {1152: 16, 1280: 16, 1408: 16, 1664: 16}


@dataclass
class ConversionReport:
    """
    What happened in a conversion. Printed, it is one line for each.

    Attributes:
        dropped (`list[str]`): the names of the source's tensors that are not used.
        initialised (`list[str]`): the names of our parameters that start anew.
        notes (`list[str]`): what was assumed or changed.
        comparison ([`Comparison`], *optional*): how close the features come to the source's, if that was asked.
    """

    dropped: list[str] = field(default_factory=list)
    initialised: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    comparison: Comparison | None = None

    def __str__(self) -> str:
        lines = [f"Dropped: {', '.join(self.dropped) or 'nothing'}."]
        lines += [f"Newly initialised: {', '.join(self.initialised) or 'nothing'}."]
        lines += self.notes + ([str(self.comparison)] if self.comparison else [])
        return "\n".join(lines)


def fill_model(
    config: HPoolViTConfig,
    checkpoint: Checkpoint,
    given: dict[str, torch.Tensor] | None = None,
    new: Collection[str] = (),
) -> HPoolViTForImageClassification:
    """
    A model in float32 and evaluation mode. Each parameter is in `given`, is `new`, or comes from the checkpoint.

    Args:
        config: the configuration of the model.
        checkpoint: the source. None of its tensors may be left over.
        given: tensors under the model's own names.
        new: the names of the parameters that start as in a new model.

    Raises:
        ConversionError: for a tensor that is missing, left over or of the wrong shape. The message names it.
    """
    tensors = dict(given or {})
    for name, shape in parameter_shapes(config).items():
        if name not in tensors and name not in new:
            tensors[name] = checkpoint.take(name.removeprefix("hpool_vit."), shape)
    if surplus := checkpoint.unread():
        more = f" (and {len(surplus) - 1} more)" if len(surplus) > 1 else ""
        raise ConversionError(f"The tensor `{surplus[0]}`{more} has no place in an HPool-ViT of this configuration.")
    return HPoolViTForImageClassification.from_pretrained(None, config=config, state_dict=tensors, dtype=torch.float32)


def parameter_shapes(config: HPoolViTConfig) -> dict[str, tuple[int, ...]]:
    """The names and shapes of a model's parameters, without initialising any of them."""
    with torch.device("meta"):
        model = HPoolViTForImageClassification(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def resolve_overrides(config_overrides: dict[str, Any]) -> dict[str, Any]:
    """
    The fields of the configuration under the names that it stores.

    Raises:
        ConversionError: for a name that is not a field of the configuration.
    """
    known = {field.name for field in fields(HPoolViTConfig)} | {"num_labels"}
    overrides = {HPoolViTConfig.attribute_map.get(name, name): value for name, value in config_overrides.items()}
    if unknown := overrides.keys() - known:
        raise ConversionError(f"`{min(unknown)}` is not a field of `HPoolViTConfig`.")
    return overrides


def infer_heads(width: int) -> int:
    """The number of attention heads of published ViTs of this width."""
    if width not in HEADS_OF_WIDTH and width % 64:
        raise ConversionError(
            f"The width {width} cannot be divided into heads of width 64, and the source does not say how many heads "
            "it has: pass `num_attention_heads`."
        )
    return HEADS_OF_WIDTH.get(width, width // 64)


def image_size_of(checkpoint: Checkpoint, grid: tuple[int, int]) -> int | tuple[int, int]:
    """The size in pixels of an image of `grid` (rows, columns) patches."""
    patch = checkpoint.patch_weight.shape[2:]
    return square_or_pair(tuple(side * pixels for side, pixels in zip(grid, patch, strict=True)))


def check_labels(num_labels: int, overrides: dict):
    """Raises a `ConversionError` for a negative number of classes, or if `id2label` has another number of names."""
    if num_labels < 0:
        raise ConversionError(f"`num_labels={num_labels}` must be at least 0.")
    num_names = len(overrides.get("id2label") or range(num_labels))
    if num_names != num_labels:
        raise ConversionError(f"There are {num_labels} classes and {num_names} class names: pass one name per class.")
