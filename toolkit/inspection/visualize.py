"""
Shows what an HPool-ViT makes of photos: which patches each token stands for after each pooling, which patches won it,
attention rollout, the prediction, and tokens and multiply-accumulates per block.

    python visualize_pooling.py --model_name_or_path my_folder --image photo.jpg --output pooling.png
    python visualize_pooling.py --model_name_or_path my_folder --image a.jpg b.jpg --output both.png --image_size 320

The numbers come from `trace_pooling` in pooling_trace.py; --save_tensors keeps them.
"""

import argparse
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import save_file
from transformers import PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from hpool_vit import HPoolViTConfig

from ..shared.console import run
from ..shared.images import BadImageError, decode_image, read_image
from ..shared.saved_model import load_saved_model
from .figure import draw, draw_chart
from .trace import PoolingTrace, block_macs, trace_pooling


__all__ = ["draw", "draw_chart", "load", "prepare", "save_figure", "trace_images"]

# More would be taller than a picture may be.
MAX_IMAGES = 32


def load(model_name_or_path: str, **overrides) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """
    The HPool-ViT of a folder or Hub id, in evaluation mode and without a classifier where none was saved, and its
    image processor.

    Args:
        model_name_or_path (`str`): folder or Hub id.
        overrides: fields of the configuration that shall differ, such as `hvt_pool`.

    Raises:
        ValueError: if there is no such model, or another kind of model, or it is damaged, or the overrides do not fit.
    """
    model, image_processor, notes, new = load_saved_model(model_name_or_path, **overrides)
    if model.config.model_type != HPoolViTConfig.model_type:
        raise ValueError(
            f"--model_name_or_path {model_name_or_path} is a model of the type {model.config.model_type!r}, no "
            "HPool-ViT: convert it with convert_vit_checkpoint.py."
        )
    print(*notes, sep="\n", end="\n" * bool(notes), file=sys.stderr)
    has_classifier = not any(name.startswith("classifier.") for name in new)
    return model if has_classifier else model.base_model, image_processor


def prepare(
    image_processor: BaseImageProcessor,
    images: list[Image.Image],
    config: HPoolViTConfig,
    image_size: tuple[int, int] | None = None,
) -> tuple[torch.Tensor, list[np.ndarray]]:
    """
    Args:
        image_processor (`BaseImageProcessor`): that of the model.
        images (`list` of Pillow images): in RGB.
        config (`HPoolViTConfig`): that of the model.
        image_size (`tuple[int, int]`, *optional*): height and width in pixels, other than the image processor's; it
            keeps the share of the image that it cuts off.

    Returns:
        `pixel_values` of shape `(batch_size, num_channels, height, width)`, and each image as the model sees it: the
        same pixels before they are normalised, of shape `(height, width, 3)`, in [0, 1], without those that fill no
        patch.
    """
    if config.num_channels == 1:
        images = [image.convert("L") for image in images]
    resize = resize_for(image_processor, *image_size) if image_size else {}
    pixel_values = image_processor(images, return_tensors="pt", **resize)["pixel_values"]
    plain = {"do_normalize": False, "do_rescale": True, "rescale_factor": 1 / 255}
    seen = image_processor(images, return_tensors="pt", **{**resize, **plain})["pixel_values"]
    (rows, columns), patch = config.patch_grid(*seen.shape[2:]), config.patch_shape
    seen = seen[:, :, : rows * patch[0], : columns * patch[1]].movedim(1, -1).float()
    if seen.shape[-1] != 3:  # greyscale, or channels that are no colours
        seen = seen.mean(-1, keepdim=True).expand(-1, -1, -1, 3)
    return pixel_values, list(seen.clamp(0, 1).numpy())


def resize_for(image_processor: BaseImageProcessor, height: int, width: int) -> dict[str, Any]:
    """The arguments that make an image processor give `height` × `width` pixels."""
    if not image_processor.do_center_crop:
        return {"do_resize": True, "size": {"height": height, "width": width}}
    size, crop = image_processor.size, image_processor.crop_size
    scales = {"height": height / crop["height"], "width": width / crop["width"]}
    if size["shortest_edge"] is not None:
        size = {"shortest_edge": round(size["shortest_edge"] * max(scales.values()))}
    else:
        size = {side: round(size[side] * scale) for side, scale in scales.items()}
    return {"size": size, "crop_size": {"height": height, "width": width}}


def trace_images(
    model: PreTrainedModel,
    image_processor: BaseImageProcessor,
    images: list[Image.Image],
    image_size: tuple[int, int] | None = None,
) -> tuple[PoolingTrace, list[np.ndarray]]:
    """[`prepare`] and `trace_pooling` in one: what `draw` needs beside `model.config`."""
    pixel_values, seen = prepare(image_processor, images, model.config, image_size)
    is_other_size = tuple(pixel_values.shape[2:]) != model.config.image_shape
    return trace_pooling(model, pixel_values, interpolate_pos_encoding=is_other_size), seen


def save_figure(figure: Figure, path: str | Path, dpi: int = 130):
    """Writes a figure in the format that the ending of `path` names."""
    with warnings.catch_warnings():
        # Matplotlib's font lacks many scripts; such letters become boxes.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(path, dpi=dpi)


def save_tensors(trace: PoolingTrace, config: HPoolViTConfig, names: list[str], path: str | Path):
    """Writes the trace as safetensors, with `macs_per_block`; the metadata name the images and the pooling."""
    macs = torch.tensor(block_macs(config, trace.rollout.shape[1]))
    metadata = {"images": names, "pool_mode": config.pool_mode, "hvt_pool": config.hvt_pool or []}
    save_file({**trace.tensors(), "macs_per_block": macs}, path, {key: json.dumps(metadata[key]) for key in metadata})


def read_images(paths: list[str]) -> list[Image.Image]:
    images = []
    for path in paths:
        try:
            images.append(decode_image(read_image({"bytes": None, "path": path}))[0])
        except BadImageError as error:
            raise BadImageError(f"--image {path}: {error}") from error
    return images


def check_outputs(args: argparse.Namespace):
    """Raises a `ValueError` before the work if a result cannot be written, or would replace an image."""
    taken = {Path(image).resolve(): "--image" for image in args.image}
    formats = Figure().canvas.get_supported_filetypes()
    for flag in ("output", "chart", "save_tensors"):
        path = getattr(args, flag)
        if path is None:
            continue
        endings = ["safetensors"] if flag == "save_tensors" else formats
        if path.suffix[1:].lower() not in endings:
            raise ValueError(f"--{flag} {path} must end in one of .{', .'.join(endings)}.")
        if path.is_dir():
            raise ValueError(f"--{flag} {path} is a folder: name a file.")
        if path.resolve() in taken:
            raise ValueError(f"--{flag} {path} is the file of {taken[path.resolve()]} too: name another one.")
        taken[path.resolve()] = f"--{flag}"
        path.parent.mkdir(parents=True, exist_ok=True)


def overrides_of(args: argparse.Namespace) -> dict[str, Any]:
    overrides: dict[str, Any] = {"hvt_pool": None} if args.no_pooling else {}
    if args.hvt_pool:
        overrides["hvt_pool"] = args.hvt_pool
    if args.merge_ratio:
        overrides["merge_ratio"] = args.merge_ratio if len(args.merge_ratio) > 1 else args.merge_ratio[0]
    return overrides


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model_name_or_path", required=True, help="saved folder or Hub id of an HPool-ViT")
    parser.add_argument("--image", required=True, nargs="+", metavar="FILE", help=f"photos, at most {MAX_IMAGES}")
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help="the picture: .png, .pdf, .svg, …")
    pooling = parser.add_mutually_exclusive_group()
    pooling.add_argument("--hvt_pool", type=int, nargs="+", metavar="BLOCK", help="another pooling schedule")
    pooling.add_argument("--no_pooling", action="store_true", help="the schedule that never pools")
    parser.add_argument("--merge_ratio", type=float, nargs="+", help="another one, of a model that merges")
    parser.add_argument("--image_size", type=int, nargs="+", metavar="PIXELS", help="one number, or height and width")
    parser.add_argument(
        "--chart", type=Path, metavar="FILE", help="tokens and MACs per block, as a picture of its own"
    )
    parser.add_argument("--save_tensors", type=Path, metavar="FILE", help="the numbers, as .safetensors")
    return parser.parse_args(argv)


def visualize(args: argparse.Namespace):
    check_outputs(args)
    if len(args.image) > MAX_IMAGES:
        raise ValueError(f"--image names {len(args.image)} files: give at most {MAX_IMAGES} at a time.")
    sides = args.image_size or []
    if len(sides) > 2 or any(side < 1 for side in sides):
        raise ValueError(f"--image_size {' '.join(map(str, sides))} must be one or two numbers of pixels above 0.")
    images = read_images(args.image)
    model, image_processor = load(args.model_name_or_path, **overrides_of(args))
    trace, seen = trace_images(model, image_processor, images, (sides[0], sides[-1]) if sides else None)
    names = [Path(path).name for path in args.image]
    save_figure(draw(seen, trace, model.config, names, chart=args.chart is None), args.output)
    if args.chart:
        save_figure(draw_chart(trace, model.config), args.chart)
    if args.save_tensors:
        save_tensors(trace, model.config, names, args.save_tensors)
    report(trace, model.config, args)


def report(trace: PoolingTrace, config: HPoolViTConfig, args: argparse.Namespace):
    if trace.logits is not None:
        for path, probabilities in zip(args.image, trace.logits.softmax(-1), strict=True):
            best = int(probabilities.argmax())
            print(f"{path}: {config.id2label[best]} {probabilities[best]:.1%}")
    print("tokens:", " → ".join(str(stage.num_tokens) for stage in trace.stages))
    print(*("written: " + str(path) for path in (args.output, args.chart, args.save_tensors) if path), sep="\n")


def main(argv: list[str] | None = None):
    args = parse_args(argv)
    run(lambda: visualize(args))


if __name__ == "__main__":
    main()
