"""From a checkpoint of the paper's training code (HVT, arXiv 2103.10619) to an HPool-ViT with the same answers."""

import itertools
import math
import re
from pathlib import Path
from typing import Any

from hpool_vit import HPoolViTConfig, HPoolViTForImageClassification

from .building import (
    ConversionReport,
    check_labels,
    fill_model,
    image_size_of,
    infer_heads,
    resolve_overrides,
)
from .checkpoint import Checkpoint, ConversionError, read_checkpoint, refuse
from .kinds import hvt_name


# The paper's window, which is preferred where the lengths leave a choice.
PAPER_KERNEL_SIZE, PAPER_STRIDE = 3, 2

STRANGERS = {
    r"(cls|dist)_token$|^fc_norm": "a plain ViT, which `convert_vit` takes",
}

# Arguments that only the paper's training script has.
PAPER_ARGS = {"pool_block_width", "pool_kernel_size", "pool_stride"}


def convert_hvt(
    checkpoint_path: str | Path, use_ema: bool = False, **config_overrides
) -> tuple[HPoolViTForImageClassification, ConversionReport]:
    """
    Builds the paper's model with the weights of one of its checkpoints.

    Args:
        checkpoint_path (`str`): a training checkpoint, a bare state dict or safetensors.
        use_ema (`bool`, defaults to `False`):
            Whether to take the moving average of the weights, if the checkpoint has one.
        config_overrides:
            Fields of [`HPoolViTConfig`] that the file does not say (`num_attention_heads`, `pool_kernel_size`,
            `pool_stride`) or that do not touch the weights (`id2label`, `drop_path_rate`, …).

    Returns:
        The model, in evaluation mode and float32, and the [`ConversionReport`] of what was assumed.

    Raises:
        ConversionError:
            If the file is unsafe or cannot be read, or if a tensor is missing, left over or of the wrong shape.
    """
    return convert_checkpoint(read_checkpoint(checkpoint_path, use_ema), **config_overrides)


def is_hvt(checkpoint: Checkpoint) -> bool:
    """
    Whether a checkpoint was written by the paper's code. Without pooling and without the arguments of the training
    script, it is like that of a plain ViT.
    """
    pools = any(re.fullmatch(r"blocks\.\d+\.pos_embed", name) for name in checkpoint.tensors)
    return pools or not PAPER_ARGS.isdisjoint(checkpoint.args)


def convert_checkpoint(
    checkpoint: Checkpoint, **config_overrides
) -> tuple[HPoolViTForImageClassification, ConversionReport]:
    """As [`convert_hvt`], for a checkpoint that has been read. It can be converted only once."""
    checkpoint.places_of = lambda name: [hvt_name(name)]
    refuse(checkpoint, STRANGERS)
    report = ConversionReport()
    overrides = resolve_overrides(config_overrides)
    return fill_model(build_config(checkpoint, overrides, report), checkpoint), report


def build_config(checkpoint: Checkpoint, overrides: dict[str, Any], report: ConversionReport) -> HPoolViTConfig:
    """What the tensors say, what the arguments of the training script add and, above all, what the user knows."""
    args = checkpoint.args
    fields = {
        **checkpoint.shape_fields,
        "image_size": infer_image_size(checkpoint),
        "num_labels": checkpoint.num_labels,
        "patchify_technique": "convolutional",
        "drop_path_rate": args.get("drop_path") or 0.0,
        # The paper's code applies one rate in all three places.
        **dict.fromkeys(("dropout", "hidden_dropout_prob", "projection_dropout_prob"), args.get("drop") or 0.0),
    }
    check_args(fields, args)
    fields |= infer_pooling(checkpoint, overrides, report)
    heads = args.get("num_heads")
    if "num_attention_heads" not in overrides:
        fields["num_attention_heads"] = heads or infer_heads(fields["hidden_size"])
        if not heads:
            report.notes.append(f"Assumed {fields['num_attention_heads']} attention heads: the source does not say.")
    elif heads and overrides["num_attention_heads"] != heads:
        raise ConversionError(
            f"`num_attention_heads={overrides['num_attention_heads']!r}` cannot be chosen: the source has {heads}."
        )
    check_labels(fields["num_labels"], overrides)
    return HPoolViTConfig(**{**fields, **overrides})


def infer_image_size(checkpoint: Checkpoint) -> int | tuple[int, int]:
    """The size of a square image with as many patches as there are position embeddings."""
    num_patches = checkpoint.positions.shape[1]
    side = math.isqrt(num_patches)
    if side * side != num_patches:
        raise ConversionError(f"The tensor `pos_embed` holds {num_patches} positions, which do not form a square.")
    return image_size_of(checkpoint, (side, side))


def check_args(fields: dict[str, Any], args: dict[str, Any]):
    """Raises a `ConversionError` if the arguments of the training script contradict the tensors."""
    num_blocks = fields["num_hidden_layers"]
    for name, arg, tensor in (
        ("image_size", "input_size", "pos_embed"),
        ("patch_size", "patch_size", "patch_embed.proj.weight"),
        ("num_hidden_layers", "num_blocks", f"blocks.{min(num_blocks, args.get('num_blocks') or 0)}.norm1.weight"),
        ("num_labels", "nb_classes", "head.weight"),
    ):
        if args.get(arg) is not None and args[arg] != fields[name]:
            raise ConversionError(
                f"The tensor `{tensor}` is missing, left over or of the wrong shape: the checkpoint was trained with "
                f"`{arg}={args[arg]!r}`, but its tensors say {fields[name]!r}."
            )


def infer_pooling(
    checkpoint: Checkpoint, overrides: dict[str, Any], report: ConversionReport
) -> dict[str, int | list[int] | None]:
    """The blocks at whose input to pool, and the window: that of the training script, or one that fits the lengths."""
    num_blocks, args = checkpoint.num_blocks, checkpoint.args
    blocks = [block for block in range(1, num_blocks + 1) if stage_name(block) in checkpoint]
    if width := args.get("pool_block_width"):
        blocks = sorted({*blocks, *(block + 1 for block in range(0, num_blocks, width))})
    lengths = [checkpoint.positions.shape[1]]
    lengths += [checkpoint.take(stage_name(block), (1, None, None)).shape[1] for block in blocks]
    if num_blocks in blocks:
        raise ConversionError(
            f"The tensor `{hvt_name(stage_name(num_blocks))[0]}` belongs to a pooling after the last block, where "
            "HPool-ViT cannot pool."
        )
    told = {**args, **overrides}
    for name in ("pool_kernel_size", "pool_stride"):
        value = told.get(name)
        if value is not None and (type(value) is not int or value < 1):
            raise ConversionError(
                f"`{name}={value!r}` must be one number, at least 1: the paper's code pools along the row of tokens."
            )
    kernel_size, stride = told.get("pool_kernel_size"), told.get("pool_stride")
    if blocks and None in (kernel_size, stride):
        kernel_size, stride = infer_window(lengths, kernel_size, stride, report)
    # The paper's code always uses this stride, whatever its arguments say.
    elif "pool_stride" not in overrides and fits(lengths, kernel_size, PAPER_STRIDE):
        stride = PAPER_STRIDE
    window = {"pool_kernel_size": kernel_size, "pool_stride": stride} if blocks else {}
    return {"hvt_pool": blocks or None, **window}


def stage_name(block: int) -> str:
    return f"pooling.{block}.position_embeddings"


def fits(lengths: list[int], kernel_size: int, stride: int) -> bool:
    """Whether pooling with this window turns each length into the next."""
    return all((old - kernel_size) // stride + 1 == new for old, new in itertools.pairwise(lengths))


def infer_window(
    lengths: list[int], kernel_size: int | None, stride: int | None, report: ConversionReport
) -> tuple[int, int]:
    """The kernel and stride that turn each length into the next. Of several, those closest to the paper's."""
    kernels = [kernel_size] if kernel_size else range(1, lengths[0] + 1)
    strides = [stride] if stride else range(1, lengths[0] + 1)
    windows = [window for window in itertools.product(kernels, strides) if fits(lengths, *window)]
    numbers = ", ".join(map(str, lengths))
    if not windows:
        raise ConversionError(
            f"The tensors `pos_embed` and `blocks.*.pos_embed` hold {numbers} positions, and no single kernel and "
            "stride gives these lengths."
        )
    nearest = min(windows, key=lambda window: abs(window[0] - PAPER_KERNEL_SIZE) + abs(window[1] - PAPER_STRIDE))
    if len(windows) > 1:
        report.notes.append(
            f"Assumed `pool_kernel_size={nearest[0]}` and `pool_stride={nearest[1]}`: the source does not say, and "
            f"other values give the lengths {numbers} too."
        )
    return nearest
