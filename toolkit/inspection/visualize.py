"""The command `hpool-vit visualize`: a picture of which patches each token stands for after each pooling stage."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image
from safetensors.torch import save_file
from transformers import PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from hpool_vit import HPoolViTConfig

from ..shared.console import needs, parse_value
from ..shared.figures import save_figure
from ..shared.files import written_whole
from ..shared.images import BadImageError, decode_image, read_image
from ..shared.options import HvtPool, ImageSize, MergeRatio, Model, Speed, parse_image_size
from ..shared.saved_model import SavedModelError, check_complete, load_saved_model
from .trace import PoolingTrace, block_macs, trace_pooling


with needs("visualize"):
    from matplotlib.figure import Figure

    from .figure import draw, draw_chart


# A picture of more images would be taller than a picture may be.
MAX_IMAGES = 32


def trace_images(
    model: PreTrainedModel,
    image_processor: BaseImageProcessor,
    images: list[Image.Image],
    image_size: tuple[int, int] | None = None,
) -> tuple[PoolingTrace, list[np.ndarray]]:
    """
    Prepares images and follows their patches through a model. The results are what [`draw`] needs besides
    `model.config`.

    Args:
        model (`PreTrainedModel`): an HPool-ViT.
        image_processor (`BaseImageProcessor`): the image processor of the model.
        images (`list` of Pillow images): images in RGB.
        image_size (`tuple[int, int]`, *optional*):
            Height and width in pixels, if they should differ from those of the image processor.

    Returns:
        The [`PoolingTrace`], and the images as the model sees them, each an array of shape `(height, width, 3)` with
        values in [0, 1].
    """
    pixel_values, seen = prepare_images(image_processor, images, model.config, image_size)
    is_other_size = tuple(pixel_values.shape[2:]) != model.config.image_shape
    return trace_pooling(model, pixel_values, interpolate_pos_encoding=is_other_size), seen


def prepare_images(
    image_processor: BaseImageProcessor,
    images: list[Image.Image],
    config: HPoolViTConfig,
    image_size: tuple[int, int] | None = None,
) -> tuple[torch.Tensor, list[np.ndarray]]:
    """
    Prepares images for a model, and for the eye.

    Args:
        image_processor (`BaseImageProcessor`): the image processor of the model.
        images (`list` of Pillow images): images in RGB.
        config (`HPoolViTConfig`): the configuration of the model.
        image_size (`tuple[int, int]`, *optional*):
            Height and width in pixels, if they should differ from those of the image processor. The share of the image
            that is cut off stays the same.

    Returns:
        `pixel_values` of shape `(batch_size, num_channels, height, width)`, and each image as the model sees it: the
        same pixels before normalisation, of shape `(height, width, 3)`, in [0, 1], without pixels at the right and the
        bottom that do not fill a patch.
    """
    if config.num_channels == 1:
        images = [image.convert("L") for image in images]
    resize = _resize_to(image_processor, *image_size) if image_size else {}
    pixel_values = image_processor(images, return_tensors="pt", **resize)["pixel_values"]
    plain = {"do_normalize": False, "do_rescale": True, "rescale_factor": 1 / 255}
    seen = image_processor(images, return_tensors="pt", **{**resize, **plain})["pixel_values"]
    (rows, columns), patch = config.patch_grid(*seen.shape[2:]), config.patch_shape
    # (batch_size, num_channels, height, width) to (batch_size, height, width, num_channels)
    seen = seen[:, :, : rows * patch[0], : columns * patch[1]].movedim(1, -1).float()
    if seen.shape[-1] != 3:  # greyscale, or channels that are not colours
        seen = seen.mean(-1, keepdim=True).expand(-1, -1, -1, 3)
    return pixel_values, list(seen.clamp(0, 1).numpy())


def _resize_to(image_processor: BaseImageProcessor, height: int, width: int) -> dict[str, Any]:
    """The arguments with which an image processor returns `height` × `width` pixels."""
    if not image_processor.do_center_crop:
        return {"do_resize": True, "size": {"height": height, "width": width}}
    size, crop = image_processor.size, image_processor.crop_size
    scales = {"height": height / crop["height"], "width": width / crop["width"]}
    if size["shortest_edge"] is not None:
        size = {"shortest_edge": round(size["shortest_edge"] * max(scales.values()))}
    else:
        size = {side: round(size[side] * scale) for side, scale in scales.items()}
    return {"size": size, "crop_size": {"height": height, "width": width}}


def write_tensors(trace: PoolingTrace, config: HPoolViTConfig, names: list[str], path: str | Path) -> None:
    """
    Writes a trace as safetensors, together with `macs_per_block`. The metadata name the images and the pooling.

    Args:
        trace (`PoolingTrace`): the trace.
        config (`HPoolViTConfig`): the configuration of the model.
        names (`list[str]`): the names of the images.
        path (`str`): the file to write.
    """
    macs = torch.tensor(block_macs(config, trace.grid))
    metadata = {"images": names, "pool_mode": config.pool_mode, "hvt_pool": config.hvt_pool or []}
    with written_whole(Path(path)) as part:
        save_file(
            {**trace.tensors(), "macs_per_block": macs},
            part,
            {key: json.dumps(value) for key, value in metadata.items()},
        )


def load_model(name: str, **overrides) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """An HPool-ViT, without its classifier if the classifier was not saved, and its image processor."""
    model, image_processor, notes, new = load_saved_model(name, **overrides)
    if model.config.model_type != HPoolViTConfig.model_type:
        raise SavedModelError(
            f"{name} is a model of the type {model.config.model_type!r}, not an HPool-ViT: convert it with "
            "`hpool-vit convert`."
        )
    print(*notes, sep="\n", end="\n" * bool(notes), file=sys.stderr)
    has_classifier = not any(weight.startswith("classifier.") for weight in new)
    # Without a classifier, nothing that it reads is needed either.
    unneeded = () if has_classifier else ("classifier.", f"{model.base_model_prefix}.readout.")
    check_complete(name, model, [weight for weight in new if not weight.startswith(unneeded)])
    return model if has_classifier else model.base_model, image_processor


def read_images(paths: list[str]) -> list[Image.Image]:
    """The images in RGB. Raises a `BadImageError` that names the file, and a `ValueError` for web addresses."""
    if len(paths) > MAX_IMAGES:
        raise ValueError(f"There are {len(paths)} images: pass at most {MAX_IMAGES} at a time.")
    for path in paths:
        if "://" in path:
            raise ValueError(f"{path} is an address, and only files can be drawn: download it first.")
    images = []
    for path in paths:
        try:
            images.append(decode_image(read_image({"bytes": None, "path": path}))[0])
        except BadImageError as error:
            raise BadImageError(f"{path}: {error}") from error
    return images


def check_outputs(images: list[str], **outputs: Path | None) -> None:
    """Raises a `ValueError` if one of the files to write, by argument, cannot be written or would replace an image."""
    taken = {Path(image).resolve(): "an image" for image in images}
    formats = Figure().canvas.get_supported_filetypes()
    for name, path in outputs.items():
        if path is None:
            continue
        endings = ["safetensors"] if name == "save_tensors" else formats
        if path.suffix[1:].lower() not in endings:
            raise ValueError(f"`{name}={path}` must end in .{', .'.join(endings)}.")
        if path.is_dir():
            raise ValueError(f"`{name}={path}` is a folder: name a file.")
        if path.resolve() in taken:
            raise ValueError(f"`{name}={path}` is also {taken[path.resolve()]}: name another file.")
        taken[path.resolve()] = f"`{name}`"
        path.parent.mkdir(parents=True, exist_ok=True)


def report(trace: PoolingTrace, config: HPoolViTConfig, images: list[str], outputs: list[Path | None]) -> None:
    if trace.logits is not None:
        for path, probabilities in zip(images, trace.logits.softmax(-1), strict=True):
            best = int(probabilities.argmax())
            print(f"{path}: {config.id2label[best]} {probabilities[best]:.1%}")
    print("tokens:", " → ".join(str(stage.num_tokens) for stage in trace.stages))
    print(*(f"written: {path}" for path in outputs if path), sep="\n")


def command(
    model: Model,
    images: Annotated[list[str], typer.Argument(metavar="IMAGE...", help=f"Image files, at most {MAX_IMAGES}.")],
    output: Annotated[Path, typer.Option(metavar="FILE", help="The picture to write: .png, .pdf, .svg, …")],
    hvt_pool: HvtPool = None,
    merge_ratio: MergeRatio = None,
    speed: Speed = None,
    image_size: ImageSize = None,
    chart: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the tokens and MACs per block as a picture of their own."),
    ] = None,
    save_tensors: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the numbers: .safetensors.")] = None,
) -> None:
    """
    Draw which patches each token stands for after each pooling stage.

    The picture shows each image as the model sees it, the prediction, the tokens of each stage in the colours of their
    patches, what each patch supplied to them, attention rollout, and the tokens and multiply-accumulates (MACs) of
    each block.
    """
    check_outputs(images, output=output, chart=chart, save_tensors=save_tensors)
    texts = {"hvt_pool": hvt_pool, "merge_ratio": merge_ratio}
    overrides = {name: parse_value(name, text) for name, text in texts.items() if text is not None}
    overrides |= {} if speed is None else {"speed": speed}
    size, photos = parse_image_size(image_size), read_images(images)
    loaded, image_processor = load_model(model, **overrides)
    trace, seen = trace_images(loaded, image_processor, photos, size)
    names = [Path(path).name for path in images]
    save_figure(draw(seen, trace, loaded.config, names, chart=chart is None), output)
    if chart:
        save_figure(draw_chart(trace, loaded.config), chart)
    if save_tensors:
        write_tensors(trace, loaded.config, names, save_tensors)
    report(trace, loaded.config, images, [output, chart, save_tensors])
