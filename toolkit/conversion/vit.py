"""From a trained ViT to an HPool-ViT that starts from its weights."""

import math
import statistics
from pathlib import Path
from typing import Any

import torch

from hpool_vit import HPoolViTConfig, HPoolViTForImageClassification

from .building import (
    ConversionReport,
    check_labels,
    fill_model,
    image_size_of,
    infer_heads,
    parameter_shapes,
    resolve_overrides,
)
from .checkpoint import ConversionError, refuse
from .positions import STAGE_POSITIONS, Positions, split_positions, start_stages
from .sources import Source, read_source


# By pooling mode, the fields of a source with 12 blocks if you do not set them. The blocks are scaled to other depths.
POOLING_DEFAULTS: dict[str, dict[str, Any]] = {
    "max": {"hvt_pool": [1, 5, 9]},
    "avg": {"hvt_pool": [1, 5, 9]},
    "merge": {
        "hvt_pool": [3, 5, 7, 9],
        "merge_ratio": [37 / 196, 37 / 159, 37 / 122, 37 / 85],
        "proportional_attention": True,
    },
}

POSITIONS = "hpool_vit.embeddings.position_embeddings"

# Tensors that a source loses nearly nothing without, under our names and timm's.
DROPPABLE = r"^(embeddings\.)?(mask|dist|distillation)_token$|^(pooler|decoder|head_dist|distillation_classifier)\."

# Tensors of things that HPool-ViT does not have and that change what the source computes.
STRANGERS = {
    r"^blocks\.\d+\.pos_embed$": "a checkpoint of the paper's code, which `convert_hvt` takes",
    r"reg(ister)?_token": "register tokens, which HPool-ViT does not have",
    r"norm_pre": "a norm before the first block (CLIP), which HPool-ViT does not have",
    r"[qk]_norm": "a norm of queries and keys, which HPool-ViT does not have",
    r"pre_logits": "a hidden layer before the head, which HPool-ViT does not have",
    r"attn_pool": "pooling by attention, which HPool-ViT does not have",
    r"rope|rel_pos|relative_position": "relative or rotary positions, which HPool-ViT does not have",
    r"w12|weights_in|gate_proj|fc1_[gx]": "a gated MLP (SwiGLU), which HPool-ViT does not have",
    r"^decoder_": "the decoder of a masked autoencoder, which HPool-ViT does not have",
}


def convert_vit(
    model_name_or_path: str | Path, stage_positions: str = "zero", use_ema: bool = False, **config_overrides
) -> tuple[HPoolViTForImageClassification, ConversionReport]:
    """
    Builds an HPool-ViT that starts from the weights of a trained ViT.

    Args:
        model_name_or_path (`str`):
            A folder or Hub id of Transformers' ViT, DeiT, ViT-MSN or DINOv2, or of timm's ViT or DeiT, or a file in
            timm's naming.
        stage_positions (`str`, defaults to `"zero"`):
            How the position embeddings of the new stages start: at zero, or `"pooled"` from the first ones with the
            stages' own pooling.
        use_ema (`bool`, defaults to `False`):
            Whether to take the moving average of the weights, if the source is a training checkpoint that has one.
        config_overrides:
            Fields of [`HPoolViTConfig`]: the pooling (`hvt_pool=None` for none), `num_labels` or `id2label` (a number
            other than the source's makes a new head), `use_class_token` (by default as the source's head requires),
            `image_size` (a size other than the source's resizes the position embeddings), and so on.

    Returns:
        The model, in evaluation mode and float32, and the [`ConversionReport`] of what was dropped, newly initialised
        or assumed.

    Raises:
        ConversionError: for a source that cannot be converted. The message names the file or the tensor.
        ValueError: for a configuration that no model can be built from.
    """
    return convert_source(read_source(model_name_or_path, use_ema), stage_positions, **config_overrides)


def convert_source(
    source: Source, stage_positions: str = "zero", **config_overrides
) -> tuple[HPoolViTForImageClassification, ConversionReport]:
    """As [`convert_vit`], for a source that [`read_source`] returned. It can be converted only once."""
    if stage_positions not in STAGE_POSITIONS:
        raise ValueError(f"`stage_positions={stage_positions!r}` is unknown: choose {' or '.join(STAGE_POSITIONS)}.")
    overrides = resolve_overrides(config_overrides)
    report = ConversionReport(notes=list(source.notes))
    refuse(source.checkpoint, STRANGERS)
    positions = split_positions(source, overrides.get("image_size"), report)
    config = build_config(source, positions, overrides, report)
    given = convert_embeddings(source, config, positions, report)
    given |= start_stages(config, given[POSITIONS], stage_positions, report)
    new = choose_new(source, config, report)
    report.dropped += source.checkpoint.drop(DROPPABLE)
    return fill_model(config, source.checkpoint, given, new), report


def build_config(
    source: Source, positions: Positions, overrides: dict[str, Any], report: ConversionReport
) -> HPoolViTConfig:
    """What the tensors say, what else is known, the defaults of the pooling and, above all, what the user wants."""
    fixed = source.checkpoint.shape_fields
    fixed |= {name: value for name, value in source.fields.items() if name == "num_attention_heads"}
    for name in fixed.keys() & overrides.keys():
        if overrides[name] != fixed[name]:
            raise ConversionError(f"`{name}={overrides[name]!r}` cannot be chosen: the source has {fixed[name]!r}.")
    assumed = {
        "image_size": image_size_of(source.checkpoint, positions.grid),
        "patchify_technique": "convolutional",
        "use_class_token": source.reads_class_token,
        "layer_norm_eps": 1e-6,  # timm's
    }
    # The grid tells the image size in whole patches.
    known = {name: value for name, value in source.fields.items() if name != "image_size"}
    if "num_attention_heads" not in known | overrides:
        known["num_attention_heads"] = infer_heads(fixed["hidden_size"])
        report.notes.append(f"Assumed {known['num_attention_heads']} attention heads: the source does not say.")
    known |= choose_labels(source, overrides)
    known |= choose_pooling(fixed["num_hidden_layers"], overrides)
    return HPoolViTConfig(**{**fixed, **assumed, **known, **overrides})


def choose_labels(source: Source, overrides: dict[str, Any]) -> dict[str, Any]:
    """The number of classes, and the source's names for them if there are as many."""
    num_labels = source.checkpoint.num_labels
    num_labels = overrides.get("num_labels", len(overrides.get("id2label") or range(num_labels)))
    check_labels(num_labels, overrides)
    if num_labels == len(source.fields.get("id2label", {})):
        return {"num_labels": num_labels}
    return {"num_labels": num_labels, "id2label": None, "label2id": None}


def choose_pooling(num_hidden_layers: int, overrides: dict[str, Any]) -> dict[str, Any]:
    """The defaults of the chosen pooling, with the blocks scaled to the depth."""
    defaults = dict(POOLING_DEFAULTS.get(overrides.get("pool_mode", "max"), POOLING_DEFAULTS["max"]))
    scaled = {math.ceil(block * num_hidden_layers / 12) for block in defaults["hvt_pool"]}
    defaults["hvt_pool"] = sorted(block for block in scaled if block < num_hidden_layers)
    num_stages = len(overrides.get("hvt_pool", defaults["hvt_pool"]) or [])
    if num_stages != len(defaults.get("merge_ratio", range(num_stages))):
        defaults["merge_ratio"] = statistics.mean(defaults["merge_ratio"])
    return defaults


def convert_embeddings(
    source: Source, config: HPoolViTConfig, positions: Positions, report: ConversionReport
) -> dict[str, torch.Tensor]:
    """The tensors of the embeddings that differ from the source's, under the model's names."""
    # (1, tokens, hidden_size)
    first_positions = positions.resized(config.patch_grid(), report)
    if not config.use_class_token:
        report.dropped += source.checkpoint.drop(r"(^|\.)cls_token$")
    else:
        zeros = torch.zeros_like(first_positions[:, :1])
        class_token = zeros if positions.class_token is None else positions.class_token
        first_positions = torch.cat((class_token, first_positions), dim=1)
    given = {POSITIONS: first_positions}
    if config.patchify_technique == "linear":
        given["hpool_vit.embeddings.patch_embeddings.projection.weight"] = source.checkpoint.patch_weight.flatten(1)
    return given


def choose_new(source: Source, config: HPoolViTConfig, report: ConversionReport) -> list[str]:
    """The model's names of what must start anew: a head or a class token that the source does not have."""
    checkpoint, shapes = source.checkpoint, parameter_shapes(config)
    new = []
    if config.use_class_token and "embeddings.cls_token" not in checkpoint:
        new.append("hpool_vit.embeddings.cls_token")
    head = [name for name in shapes if name.startswith("classifier.")]
    shape = checkpoint.shape_of("classifier.weight")
    if shape is None or shapes.get("classifier.weight") != tuple(shape):
        new += head
        report.dropped += checkpoint.drop(r"^(classifier|head)\.") if shape else []
    elif source.reads_class_token and not config.use_class_token:
        report.notes.append("The head was trained on the class token and now reads the mean of the tokens: train it.")
    report.initialised += new
    return new
