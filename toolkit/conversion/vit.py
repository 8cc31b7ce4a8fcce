"""From a trained ViT to an HPool-ViT that starts from its weights."""

import math
import re
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
from .kinds import ROTARY_ORDERS
from .positions import STAGE_POSITIONS, Positions, split_positions, start_stages
from .sources import Source, read_source


# By pooling mode, the fields of a source with 12 blocks if you do not set them. The blocks are scaled to other depths.
POOLING_DEFAULTS: dict[str, dict[str, Any]] = {
    "max": {"hvt_pool": [1, 5, 9]},
    "avg": {"hvt_pool": [1, 5, 9]},
    "merge": {
        "hvt_pool": [3, 5, 7, 9],
        "merge_ratio": [37 / 196, 37 / 159, 37 / 122, 37 / 85],
        "merge_rule": "importance",
        "proportional_attention": True,
    },
}

POSITIONS = "hpool_vit.embeddings.position_embeddings"
REGISTERS = "hpool_vit.embeddings.register_tokens"

# Tensors that a source loses nearly nothing without, under our names and timm's.
DROPPABLE = (
    r"^(embeddings\.)?(mask|dist|distillation)_token$"
    r"|^(pooler|decoder|head_dist|distillation_classifier)\.|^decoder_pos_embed$"
)

# Tensors of things that HPool-ViT does not have and that change what the source computes.
STRANGERS = {
    r"^blocks\.\d+\.pos_embed$": "a checkpoint of the paper's code, which `convert_hvt` takes",
    r"pre_logits": "a hidden layer before the head, which HPool-ViT does not have",
    r"rel_pos|relative_position": "relative positions, which HPool-ViT does not have",
    r"rope": "rotary positions with learned frequencies, where HPool-ViT has fixed ones",
    r"\.attn\.norm\.": "a norm inside attention, before its last projection, which HPool-ViT does not have",
    r"\.attn\.gate\.": "a gate on attention, which HPool-ViT does not have",
    r"\.attn\.lambda": "a difference of two attentions, which HPool-ViT does not have",
    r"patch_embed\.norm\.": "a norm between patches and positions (AIMv2), which HPool-ViT does not have",
    r"attn_pool\.([qk]_norm|pos_embed)": "attention pooling with norms or positions, which HPool-ViT does not have",
    r"^decoder_(?!pos_embed)": "the decoder of a masked autoencoder, which HPool-ViT does not have",
    r"attns\.|ffns\.|\.in_proj\.": "blocks with parallel branches, which HPool-ViT does not have",
}

# Tensors that only some readouts and norms need, under our names and timm's, and when a model has no use for them.
UNUSED = (
    (r"^(readout|attn_pool)\.", lambda config: config.resolved_readout != "attention"),
    (r"^(layernorm|norm|fc_norm)\.", lambda config: not config.use_final_norm),
    (r"^(embeddings\.)?cls_token$", lambda config: not config.use_class_token),
)

# What a head reads, in words.
READOUT_NAMES = {
    "class_token": "the class token",
    "mean": "the mean of the tokens",
    "class_token_and_mean": "the class token and the mean of the tokens",
    "attention": "what attention pools",
}

# What the tensors decide, beside `shape_fields`.
DECIDED = ("num_attention_heads", "use_position_embeddings", "rope_theta", "rope_coordinates", "rope_grid")


def convert_vit(
    model_name_or_path: str | Path,
    stage_positions: str = "zero",
    use_ema: bool = False,
    architecture: str | None = None,
    **config_overrides,
) -> tuple[HPoolViTForImageClassification, ConversionReport]:
    """
    Builds an HPool-ViT that starts from the weights of a trained ViT.

    Args:
        model_name_or_path (`str`):
            A folder or Hub id of Transformers' ViT, DeiT, ViT-MSN, ViT-MAE, I-JEPA, DINOv2, DINOv3, CLIP or SigLIP, or
            of timm's ViT, DeiT, EVA-02, DINOv3 or Perception Encoder, or a file in timm's naming.
        stage_positions (`str`, defaults to `"zero"`):
            How the position embeddings of the new stages start: at zero, or `"pooled"` from the first ones with the
            stages' own pooling.
        use_ema (`bool`, defaults to `False`):
            Whether to take the moving average of the weights, if the source is a training checkpoint that has one.
        architecture (`str`, *optional*):
            timm's name of the model, such as `"vit_base_patch16_clip_224"`, for a file whose tensors do not tell.
        config_overrides:
            Fields of [`HPoolViTConfig`]: the pooling (`hvt_pool=None` for none), `num_labels` or `id2label` (a number
            other than the source's makes a new head), `use_class_token` (by default as the source),
            `image_size` (a size other than the source's resizes the position embeddings), and so on.

    Returns:
        The model, in evaluation mode and float32, and the [`ConversionReport`] of what was dropped, newly initialised
        or assumed.

    Raises:
        ConversionError: for a source that cannot be converted. The message names the file or the tensor.
        ValueError: for a configuration that no model can be built from.
    """
    return convert_source(read_source(model_name_or_path, use_ema, architecture), stage_positions, **config_overrides)


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
    given |= convert_rotary(source, config)
    given |= start_stages(config, given.get(POSITIONS), stage_positions, report)
    new = choose_new(source, config, report)
    for pattern in (DROPPABLE, *(pattern for pattern, is_unused in UNUSED if is_unused(config))):
        report.dropped += source.checkpoint.drop(pattern)
    return fill_model(config, source.checkpoint, given, new), report


def build_config(
    source: Source, positions: Positions, overrides: dict[str, Any], report: ConversionReport
) -> HPoolViTConfig:
    """What the tensors say, what else is known, the defaults of the pooling and, above all, what the user wants."""
    checkpoint = source.checkpoint
    fixed = checkpoint.shape_fields
    fixed |= {name: value for name, value in source.fields.items() if name in DECIDED}
    for name in fixed.keys() & overrides.keys():
        if overrides[name] != fixed[name]:
            raise ConversionError(f"`{name}={overrides[name]!r}` cannot be chosen: the source has {fixed[name]!r}.")
    assumed = {
        "image_size": image_size_of(checkpoint, positions.grid),
        "patchify_technique": "convolutional",
        "layer_norm_eps": 1e-6,  # timm's
        "use_final_norm": checkpoint.has_any("layernorm.weight", "layernorm.bias"),
    }
    # The grid tells the image size in whole patches.
    known = {name: value for name, value in source.fields.items() if name != "image_size"}
    if "num_attention_heads" not in known | overrides:
        known["num_attention_heads"] = infer_heads(fixed["hidden_size"])
        report.notes.append(f"Assumed {known['num_attention_heads']} attention heads: the source does not say.")
    known |= choose_readout(source, overrides)
    known |= choose_labels(source, overrides)
    known |= choose_pooling(fixed["num_hidden_layers"], overrides)
    return HPoolViTConfig(**{**fixed, **assumed, **known, **overrides})


def choose_readout(source: Source, overrides: dict[str, Any]) -> dict[str, Any]:
    """The class token and the readout of the source, as far as the user leaves them."""
    use_class_token = overrides.get("use_class_token", source.has_class_token)
    usual = "class_token" if use_class_token else "mean"
    # A class token that comes or goes changes what is read, unless that is nothing of it.
    changed = use_class_token != source.has_class_token and source.readout != "attention"
    readout = None if changed or source.readout == usual else source.readout
    return {"use_class_token": use_class_token, "readout": readout}


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
    checkpoint, given = source.checkpoint, {}
    if config.use_position_embeddings:
        given[POSITIONS] = positions.fitted(config, report)
    if positions.registers is not None:
        # Registers have no positions of their own here.
        given[REGISTERS] = checkpoint.take("embeddings.register_tokens") + positions.registers
    if config.patchify_technique == "linear":
        given["hpool_vit.embeddings.patch_embeddings.projection.weight"] = checkpoint.patch_weight.flatten(1)
    return given


def convert_rotary(source: Source, config: HPoolViTConfig) -> dict[str, torch.Tensor]:
    """
    What makes queries and keys, with the channels of each head in our order, under the model's names. The order does
    not change the products of queries and keys.
    """
    if source.rotary_order is None:
        return {}
    head_dim = config.hidden_size // config.num_attention_heads
    order = ROTARY_ORDERS[source.rotary_order](head_dim // 2)
    given = {}
    for name, shape in parameter_shapes(config).items():
        if re.search(r"\.attention\.[qk]_(proj|norm)\.", name):
            tensor = source.checkpoint.take(name.removeprefix("hpool_vit."), shape)
            given[name] = tensor.unflatten(0, (-1, head_dim))[:, order].reshape(shape)
    return given


def choose_new(source: Source, config: HPoolViTConfig, report: ConversionReport) -> list[str]:
    """The model's names of what must start anew: a head, a class token or a readout that the source does not have."""
    checkpoint, shapes = source.checkpoint, parameter_shapes(config)
    new = []
    if config.use_class_token and not source.has_class_token:
        new.append("hpool_vit.embeddings.cls_token")
    if source.readout != "attention":
        new += [name for name in shapes if name.startswith("hpool_vit.readout.")]
    head = [name for name in shapes if name.startswith("classifier.")]
    shape = checkpoint.shape_of("classifier.weight")
    if shape is None or shapes.get("classifier.weight") != shape:
        new += head
        report.dropped += checkpoint.drop(r"^(classifier|head)\.") if shape else []
        report.notes += ["The head is new: train it."] if head else []
    elif source.readout != config.resolved_readout:
        before, now = READOUT_NAMES[source.readout], READOUT_NAMES[config.resolved_readout]
        report.notes.append(f"The head was trained on {before} and now reads {now}: train it.")
    report.initialised += new
    return new
