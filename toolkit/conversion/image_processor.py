"""How the source prepares its images, and an HPool-ViT's image processor that prepares them the same way."""

from typing import TYPE_CHECKING, Any

from transformers import AutoImageProcessor
from transformers.image_utils import PILImageResampling

from hpool_vit import HPoolViTConfig, HPoolViTImageProcessor

from .checkpoint import ConversionError


if TYPE_CHECKING:
    from .sources import Source


# The attributes of an image processor that are kept. Ours converts images to RGB whatever the source does, unless the
# model takes others.
KEPT_ATTRIBUTES = ("do_resize", "size", "default_to_square", "resample", "do_center_crop", "crop_size")
KEPT_ATTRIBUTES += ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")


def read_image_processor(
    name_or_path: str, usual: dict[str, Any] | None, image_size: int | tuple[int, int], notes: list[str]
) -> dict[str, Any] | None:
    """
    The attributes of a Transformers image processor.

    Args:
        name_or_path: the folder or repository.
        usual: attributes that all models of the source's type have, for a folder that does not say; None: unknown.
        image_size: the size of the source's images.
        notes: where to note what was assumed.

    Returns:
        The attributes, or None if they are unknown.
    """
    try:
        attributes = AutoImageProcessor.from_pretrained(name_or_path).to_dict()
    except (OSError, ValueError):
        if usual is None:
            return None
        notes.append("The source has no image processor: assumed the one that is usual for its type.")
        return usual | _sizes(usual["do_center_crop"], image_size)
    given = {name: attributes[name] for name in KEPT_ATTRIBUTES if attributes.get(name) is not None}
    # A setting that Transformers' image processors leave open is off there, whereas ours crop by default.
    given = {"do_center_crop": False, **given}
    # One that fits any aspect ratio has no size.
    return given if "size" in given else given | _sizes(given["do_center_crop"], image_size)


def _sizes(crops: bool, image_size: int | tuple[int, int]) -> dict[str, dict[str, int]]:
    """The sizes of an image processor that resizes the short side and crops, or one that squashes."""
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    exact = {"height": height, "width": width}
    return {"size": {"shortest_edge": max(height, width)}, "crop_size": exact} if crops else {"size": exact}


def read_timm_data_config(data: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    """The attributes of an image processor that prepares images as timm's `pretrained_cfg` says."""
    height, width = data["input_size"][1:]
    crop_pct, crop_mode = data.get("crop_pct", 0.875), data.get("crop_mode", "center")
    size = {"shortest_edge": int(max(height, width) / crop_pct)}
    if crop_mode == "squash":
        size = {"height": int(height / crop_pct), "width": int(width / crop_pct)}
    elif crop_mode != "center":
        notes.append(f"Images are cropped at the centre, where the source has `crop_mode={crop_mode!r}`.")
    attributes = {
        "size": size,
        "crop_size": {"height": height, "width": width},
        "resample": PILImageResampling[data.get("interpolation", "bicubic").upper()],
        "image_mean": data.get("mean"),
        "image_std": data.get("std"),
    }
    return {name: value for name, value in attributes.items() if value is not None}


def with_channels(attributes: dict[str, Any], config: HPoolViTConfig) -> dict[str, Any]:
    """
    The attributes of an image processor for images of as many channels as the model takes; only three are RGB.

    Raises:
        ConversionError: if the mean or the standard deviation is not one number per channel.
    """
    num_channels, attributes = config.num_channels, dict(attributes)
    if num_channels != 3:
        attributes["do_convert_rgb"] = False
    for name in ("image_mean", "image_std") if attributes.get("do_normalize", True) else ():
        values = attributes.get(name, getattr(HPoolViTImageProcessor, name))
        if isinstance(values, int | float):  # in Transformers, that of every channel
            values = attributes[name] = [values] * num_channels
        if len(values) != num_channels:
            raise ConversionError(
                f"`{name}={list(values)}` must be one number per channel, and `num_channels={num_channels}`: pass as "
                f"many as `{name}`."
            )
    return attributes


def image_processor_for(
    source: "Source", config: HPoolViTConfig, resize: dict[str, int] | None = None, **overrides
) -> HPoolViTImageProcessor:
    """
    An image processor that prepares images as the source does. If the model takes another image size, it keeps the
    source's mean, standard deviation and resampling, and crops as ours does. If the source does not say how it
    prepares images, you get the defaults of [`HPoolViTImageProcessor`].

    Args:
        source ([`Source`]): what [`read_source`] returned.
        config (`HPoolViTConfig`): the configuration of the converted model.
        resize (`dict[str, int]`, *optional*): the `size` of an image processor that is not the source's.
        overrides: attributes to set instead of the source's, such as `image_mean`.

    Raises:
        ConversionError: if the mean or the standard deviation is not one number per channel.
    """
    attributes = source.image_processor or {}
    size = attributes.get("crop_size" if attributes.get("do_center_crop", True) else "size", {})
    if (size.get("height"), size.get("width")) == config.image_shape:
        return HPoolViTImageProcessor(**with_channels({**attributes, **overrides}, config))
    kept = {name: attributes[name] for name in ("resample", "image_mean", "image_std") if name in attributes}
    kept |= {"size": resize} if resize else {}
    return HPoolViTImageProcessor.for_config(config, **with_channels({**kept, **overrides}, config))
