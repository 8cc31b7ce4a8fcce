"""Trained weights for HPool-ViT's trunk inside a head of Transformers, which starts with random ones."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from hpool_vit import HPoolViTBackbone, HPoolViTConfig, HPoolViTModel


# Fields that may differ between a trunk and the folder that its weights come from: they say where and how tokens are
# pooled, how the model is trained, and what follows the last block.
FREE_FIELDS = {
    "hvt_pool", "hvt_pool_choices", "speeds", "stages", "pool_mode", "pool_kernel_size", "pool_stride", "merge_ratio",
    "merge_rule", "proportional_attention", "image_size", "dropout", "hidden_dropout_prob", "drop_path_rate",
    "attention_probs_dropout_prob", "projection_dropout_prob", "classifier_hidden_size", "readout",
    "readout_num_heads", "norm_after_pooling", "initializer_range", "feature_pyramid_size",
}  # fmt: skip


@dataclass
class BackboneReport:
    """
    What happened when weights were loaded. Printed, it is one line for each.

    Attributes:
        missing: the backbone's weights that the folder does not have, which keep their random values.
        left_over: the folder's weights that the backbone has no place for.
    """

    missing: list[str] = field(default_factory=list)
    left_over: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = {"Missing, and random": self.missing, "Left over": self.left_over}
        return "\n".join(f"{title}: {', '.join(names) or 'nothing'}." for title, names in lines.items())


def load_backbone(head: nn.Module, folder: str | Path) -> BackboneReport:
    """
    Loads the trunk of a saved HPool-ViT into the [`HPoolViTBackbone`] of a head:

        head = UperNetForSemanticSegmentation(UperNetConfig(backbone_config=config))
        print(load_backbone(head, "outputs/photos"))

    Args:
        head (`nn.Module`): a model with one HPool-ViT backbone anywhere in it, or the backbone itself.
        folder (`str`): a saved folder of any HPool-ViT model, or its id on the Hub.

    Returns:
        `BackboneReport`: the weights that are missing in the folder, and those that are left over.

    Raises:
        ValueError: if the head has no such backbone or several, or if the folder's model differs from it in a field or
            in the shape of a weight; the message names them.
    """
    # By name, because `trust_remote_code` loads classes of its own.
    backbones = [
        module
        for module in head.modules()
        if any(base.__name__ == HPoolViTBackbone.__name__ for base in type(module).__mro__)
    ]
    if len(backbones) != 1:
        raise ValueError(
            f"The model {type(head).__name__} has {len(backbones)} HPool-ViT backbones: give one with one."
        )
    backbone: Any = backbones[0]
    check_fields(backbone.config, HPoolViTConfig.from_pretrained(folder), folder)
    given, random = read_trunk(folder)
    own = backbone.hpool_vit.state_dict()
    wrong = [
        f"{name} has the shape {tuple(given[name].shape)} there and {tuple(own[name].shape)} here"
        for name in sorted(given.keys() & own.keys())
        if given[name].shape != own[name].shape
    ]
    if wrong:
        raise ValueError(f"{folder} does not fit the backbone: {'; '.join(wrong)}. Build it from the folder's config.")
    backbone.hpool_vit.load_state_dict({name: given[name] for name in given.keys() & own.keys()}, strict=False)
    missing = sorted((own.keys() - given.keys()) | (own.keys() & random))
    beside = [name for name in backbone.state_dict() if not name.startswith("hpool_vit.")]
    return BackboneReport(missing + beside, sorted(given.keys() - own.keys()))


def read_trunk(folder: str | Path) -> tuple[dict[str, torch.Tensor], set[str]]:
    """The weights of a saved trunk, and the names of those that the folder lacks."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # Transformers would report the classifier as left over
    try:
        model, loading = HPoolViTModel.from_pretrained(
            folder, add_pooling_layer=False, output_loading_info=True, dtype=torch.float32
        )
    finally:
        logging.set_verbosity(verbosity)
    return model.state_dict(), {name.removeprefix("hpool_vit.") for name in loading["missing_keys"]}


def check_fields(own: Any, other: HPoolViTConfig, folder: str | Path) -> None:
    """Raises a `ValueError` that names the fields in which the weights would mean something else."""
    names = {item.name for item in fields(HPoolViTConfig)} & set(HPoolViTConfig.__annotations__)
    differing = [
        f"{name}={getattr(other, name)!r} there and {getattr(own, name)!r} here"
        for name in sorted(names - FREE_FIELDS)
        if not name.startswith("_") and getattr(own, name) != getattr(other, name)
    ]
    if differing:
        raise ValueError(
            f"{folder} does not fit the backbone: {'; '.join(differing)}. Build it from the folder's config."
        )
