"""Segmentation models: HPool-ViT's trunk, converted or trained, under a linear head or UperNet."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel, UperNetConfig, UperNetForSemanticSegmentation

from hpool_vit import HPoolViTConfig, HPoolViTForSemanticSegmentation, HPoolViTImageProcessor

from ..conversion.sources import is_hpool_vit
from ..training.model import labels_of, start_from
from ..training.recipes import recipe_arguments


NUM_LINEAR_MAPS, NUM_UPERNET_MAPS = 2, 4


def choose_blocks(config: HPoolViTConfig, num_maps: int) -> None:
    """
    Where nothing else is chosen, lets the head read the maps of blocks that are evenly spaced. A pooled grid keeps its
    own choice, the last map of each resolution.
    """
    pools_on_grid = config.hvt_pool and config.pools_on_grid
    if config.out_indices is None and not pools_on_grid and not config.feature_pyramid_size:
        depth = config.num_hidden_layers
        config.out_indices = sorted({max(1, round(depth * part / num_maps)) for part in range(1, num_maps + 1)})


def linear_head(config: HPoolViTConfig) -> HPoolViTForSemanticSegmentation:
    """
    A 1 × 1 convolution. It reads the last map of each resolution of a pooled grid, or those of the middle block and
    the last: on a frozen trunk, the last alone is about 5 points of mean IoU worse (docs/results/segmentation.md).
    """
    choose_blocks(config, NUM_LINEAR_MAPS)
    return HPoolViTForSemanticSegmentation(config)


def upernet(config: HPoolViTConfig, hidden_size: int = 256) -> UperNetForSemanticSegmentation:
    """
    UperNet (arXiv 1807.10221). It reads the last map of each resolution of a pooled grid, or those of four blocks
    evenly spaced.
    """
    choose_blocks(config, NUM_UPERNET_MAPS)
    return UperNetForSemanticSegmentation(
        UperNetConfig(
            backbone_config=config,
            hidden_size=hidden_size,
            use_auxiliary_head=False,
            id2label=config.id2label,
            label2id=config.label2id,
        )
    )


HEADS: dict[str, Callable[[HPoolViTConfig], PreTrainedModel]] = {"linear": linear_head, "upernet": upernet}


def start_segmenter(
    name: str,
    head: str,
    class_names: list[str],
    image_size: tuple[int, int],
    *,
    out_indices: list[int] | None = None,
    **overrides: Any,
) -> tuple[PreTrainedModel, HPoolViTImageProcessor, list[str]]:
    """
    A segmentation model with a trained trunk and a new head.

    Args:
        name: a saved HPool-ViT, or a ViT, which is converted: a folder, a file or an id on the Hub.
        head: `"linear"` or `"upernet"`.
        class_names: the names of the classes.
        image_size: height and width of the images that it sees, in pixels.
        out_indices: after how many blocks the maps are taken that the head reads. Default: those of the folder, or
            the head's own choice.
        overrides: fields of the trunk's configuration, such as `pool_mode` and `hvt_pool`.

    Returns:
        The model, its image processor, and notes on what is converted or newly initialised.

    Raises:
        ValueError: for an unknown head, a trunk that cannot be read, or pooling along the row of tokens.
    """
    if head not in HEADS:
        raise ValueError(f"`head={head!r}` is unknown: choose {', '.join(HEADS)}.")
    overrides |= labels_of(class_names)
    if not is_hpool_vit(name):
        overrides["image_size"] = tuple(image_size)  # its position embeddings are resized once
    classifier, processor, notes = start_from(name, recipe_arguments("finetune"), overrides)
    config = copy.deepcopy(classifier.config)
    if out_indices is not None:
        check_blocks(out_indices, config.num_hidden_layers)
        config.out_indices = out_indices
    model = HEADS[head](config)
    trunk, weights = trunk_of(model), classifier.hpool_vit.state_dict()
    trunk.load_state_dict({key: value for key, value in weights.items() if not key.startswith("readout.")})
    notes = [note for note in notes if "classifier" not in note]
    height, width = image_size
    new = HPoolViTImageProcessor(
        size={"height": height, "width": width},
        do_center_crop=False,
        image_mean=processor.image_mean,
        image_std=processor.image_std,
    )
    return model, new, notes


def check_blocks(out_indices: list[int], depth: int) -> None:
    """Raises a `ValueError` for maps that there are not. 0 is the map before the first block."""
    if sorted(set(out_indices)) != out_indices or not out_indices or out_indices[0] < 0 or out_indices[-1] > depth:
        raise ValueError(f"`out_indices={out_indices}`: give rising numbers of blocks from 0 to {depth}.")


def trunk_of(model: PreTrainedModel) -> torch.nn.Module:
    """The `HPoolViTModel` in a segmentation model."""
    return model.hpool_vit if hasattr(model, "hpool_vit") else model.backbone.hpool_vit
