"""
Turns a checkpoint of the paper's training code (HVT, arXiv 2103.10619) into an HPool-ViT folder.

    python convert_hvt_checkpoint.py --checkpoint_path hvt_s_1.pth --output_dir hvt-s-1

The file is a training checkpoint, a bare state dict or safetensors. Everything is inferred from the tensors and, where
the checkpoint holds them, the arguments of the training script. [`convert_hvt`] does the same in a program.
"""

import argparse
import itertools
import math
import re
from pathlib import Path
from typing import Any

from hpool_vit import HPoolViTConfig, HPoolViTForImageClassification, HPoolViTImageProcessor

from ..shared.console import run
from ..shared.files import check_output_dir
from .checkpoint import (
    Checkpoint,
    ConversionError,
    ConversionReport,
    build_model,
    check_labels,
    image_size_of,
    infer_heads,
    read_checkpoint,
    read_labels,
    refuse,
    resolve_overrides,
    timm_name,
    write_folder,
)


# What the paper uses, and what is preferred where the lengths leave a choice.
PAPER_KERNEL_SIZE, PAPER_STRIDE = 3, 2

STRANGERS = {
    r"(cls|dist)_token$|^fc_norm": "of a plain ViT, for which there is convert_vit_checkpoint.py",
}


def hvt_name(name: str) -> tuple[str, int | None]:
    """The paper's name of one of our parameters: it pools at the *output* of a block, we at the input of the next."""
    if stage := re.fullmatch(r"pooling\.(\d+)\.position_embeddings", name):
        return f"blocks.{int(stage[1]) - 1}.pos_embed", None
    return timm_name(name)


def convert_hvt(
    checkpoint_path: str | Path, use_ema: bool = False, **config_overrides
) -> tuple[HPoolViTForImageClassification, ConversionReport]:
    """
    The paper's model with the weights of one of its checkpoints.

    Args:
        checkpoint_path: a training checkpoint, a bare state dict or safetensors.
        use_ema: take the moving average of the weights, where the checkpoint has one.
        config_overrides: fields of [`HPoolViTConfig`] that the file does not tell (`num_attention_heads`,
            `pool_kernel_size`, `pool_stride`) or that do not touch the weights (`id2label`, `drop_path_rate`, …).

    Returns:
        The model, in evaluation mode and float32, and the report of what was assumed.

    Raises:
        ConversionError: if the file is not safe or readable, or a tensor is missing, surplus or does not fit.
    """
    checkpoint = read_checkpoint(checkpoint_path, use_ema, hvt_name)
    refuse(checkpoint, STRANGERS)
    report = ConversionReport()
    overrides = resolve_overrides(config_overrides)
    return build_model(build_config(checkpoint, overrides, report), checkpoint), report


def build_config(checkpoint: Checkpoint, overrides: dict[str, Any], report: ConversionReport) -> HPoolViTConfig:
    """What the tensors say, what the arguments of the training script add, and what the user knows better."""
    args = checkpoint.args
    fields = {
        **checkpoint.shape_fields,
        "image_size": infer_image_size(checkpoint),
        "num_labels": checkpoint.num_labels,
        "patchify_technique": "convolutional",
        "drop_path_rate": args.get("drop_path") or 0.0,
        # One rate of the paper's code is applied in all three places.
        **dict.fromkeys(("dropout", "hidden_dropout_prob", "projection_dropout_prob"), args.get("drop") or 0.0),
    }
    check_args(fields, args)
    fields |= infer_pooling(checkpoint, overrides, report)
    if "num_attention_heads" not in overrides:
        fields["num_attention_heads"] = args.get("num_heads") or infer_heads(fields["hidden_size"])
        if not args.get("num_heads"):
            report.notes.append(
                f"Assumed {fields['num_attention_heads']} attention heads, which the file does not tell."
            )
    check_labels(fields["num_labels"], overrides)
    return HPoolViTConfig(**{**fields, **overrides})


def infer_image_size(checkpoint: Checkpoint) -> int | tuple[int, int]:
    """The image size that has as many patches as there are position embeddings; the paper's images are squares."""
    num_patches = checkpoint.positions.shape[1]
    side = math.isqrt(num_patches)
    if side * side != num_patches:
        raise ConversionError(f"The tensor `pos_embed` holds {num_patches} positions, which is no square of patches.")
    return image_size_of(checkpoint, (side, side))


def check_args(fields: dict[str, Any], args: dict[str, Any]):
    """Raises a `ConversionError` where the arguments of the training script contradict the tensors."""
    num_blocks = fields["num_hidden_layers"]
    for name, arg, tensor in (
        ("image_size", "input_size", "pos_embed"),
        ("patch_size", "patch_size", "patch_embed.proj.weight"),
        ("num_hidden_layers", "num_blocks", f"blocks.{min(num_blocks, args.get('num_blocks') or 0)}.norm1.weight"),
        ("num_labels", "nb_classes", "head.weight"),
    ):
        if args.get(arg) is not None and args[arg] != fields[name]:
            raise ConversionError(
                f"The tensor `{tensor}` is missing, surplus or of a wrong shape: the checkpoint was trained with "
                f"`{arg}={args[arg]!r}`, and its tensors say {fields[name]!r}."
            )


def infer_pooling(
    checkpoint: Checkpoint, overrides: dict[str, Any], report: ConversionReport
) -> dict[str, int | list[int] | None]:
    """The blocks at whose input to pool, and the window: the training script's, or one that the lengths allow."""
    num_blocks, args = checkpoint.num_blocks, checkpoint.args
    blocks = [block for block in range(1, num_blocks + 1) if stage_name(block) in checkpoint]
    if width := args.get("pool_block_width"):
        blocks = sorted({*blocks, *(block + 1 for block in range(0, num_blocks, width))})
    lengths = [checkpoint.positions.shape[1]]
    lengths += [checkpoint.take(stage_name(block), (1, None, None)).shape[1] for block in blocks]
    if num_blocks in blocks:
        raise ConversionError(
            f"The tensor `{hvt_name(stage_name(num_blocks))[0]}` is of a pooling after the last block, and HPool-ViT "
            "has none there."
        )
    told = {**args, **overrides}
    kernel_size, stride = told.get("pool_kernel_size"), told.get("pool_stride")
    if blocks and None in (kernel_size, stride):
        kernel_size, stride = infer_window(lengths, kernel_size, stride, report)
    # The paper's code has its stride built in, whatever its arguments say.
    elif "pool_stride" not in overrides and fits(lengths, kernel_size, PAPER_STRIDE):
        stride = PAPER_STRIDE
    window = {"pool_kernel_size": kernel_size, "pool_stride": stride} if blocks else {}
    return {"hvt_pool": blocks or None, **window}


def stage_name(block: int) -> str:
    return f"pooling.{block}.position_embeddings"


def fits(lengths: list[int], kernel_size: int, stride: int) -> bool:
    """Whether this pooling leads from each length to the next."""
    return all((old - kernel_size) // stride + 1 == new for old, new in itertools.pairwise(lengths))


def infer_window(
    lengths: list[int], kernel_size: int | None, stride: int | None, report: ConversionReport
) -> tuple[int, int]:
    """The kernel and stride that lead from each length to the next; of several the ones nearest to the paper's."""
    kernels = [kernel_size] if kernel_size else range(1, lengths[0] + 1)
    strides = [stride] if stride else range(1, lengths[0] + 1)
    windows = [window for window in itertools.product(kernels, strides) if fits(lengths, *window)]
    numbers = ", ".join(map(str, lengths))
    if not windows:
        raise ConversionError(
            f"The tensors `pos_embed` and `blocks.*.pos_embed` hold {numbers} positions, to which no pooling with one "
            "kernel and stride leads."
        )
    nearest = min(windows, key=lambda window: abs(window[0] - PAPER_KERNEL_SIZE) + abs(window[1] - PAPER_STRIDE))
    if len(windows) > 1:
        report.notes.append(
            f"Assumed `pool_kernel_size={nearest[0]}` and `pool_stride={nearest[1]}`, which the file does not tell: "
            f"the lengths {numbers} allow others too."
        )
    return nearest


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--checkpoint_path", required=True, help="of the paper's training code, or safetensors")
    parser.add_argument("--output_dir", required=True, help="a new folder")
    parser.add_argument("--labels", metavar="FILE", help="class names, one per line")
    parser.add_argument("--num_attention_heads", type=int, help="default: the checkpoint's, or width / 64")
    parser.add_argument("--pool_kernel_size", type=int, help="default: the checkpoint's, or what the lengths allow")
    parser.add_argument("--pool_stride", type=int, help="default: the checkpoint's, or what the lengths allow")
    parser.add_argument("--use_ema", action="store_true", help="take the moving average of the weights")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None):
    args = parse_args(argv)
    check_output_dir(args.output_dir)
    names = ("num_attention_heads", "pool_kernel_size", "pool_stride")
    overrides = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.labels:
        overrides |= read_labels(args.labels)
    model, report = convert_hvt(args.checkpoint_path, args.use_ema, **overrides)
    write_folder(args.output_dir, model, HPoolViTImageProcessor.for_config(model.config))
    print(report)
    print(describe(model.config))
    print(f"Saved in {args.output_dir}.")


def describe(config: HPoolViTConfig) -> str:
    """What was inferred, in one line."""
    sizes = f"Image {config.image_size}, patch {config.patch_size}, width {config.hidden_size}"
    layers = f"{config.num_hidden_layers} blocks of {config.num_attention_heads} heads, {config.num_labels} classes"
    tokens = ", ".join(map(str, config.tokens_per_stage()))
    return f"{sizes}, {layers}; pooling at blocks {config.hvt_pool} to {tokens} tokens."


if __name__ == "__main__":
    run(main)
