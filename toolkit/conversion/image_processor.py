"""How the source prepares its images, and an HPool-ViT's image processor that prepares them the same way."""

from typing import TYPE_CHECKING, Any

from transformers import AutoImageProcessor
from transformers.image_utils import PILImageResampling

from hpool_vit import HPoolViTConfig, HPoolViTImageProcessor


if TYPE_CHECKING:
    from .sources import Source


# The attributes of an image processor that are kept. Ours converts images to RGB whatever the source does.
KEPT_ATTRIBUTES = ("do_resize", "size", "default_to_square", "resample", "do_center_crop", "crop_size")
KEPT_ATTRIBUTES += ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")


def read_image_processor(name_or_path: str) -> dict[str, Any] | None:
    """The attributes of a Transformers image processor, or None if the folder or repository has none."""
    try:
        attributes = AutoImageProcessor.from_pretrained(name_or_path).to_dict()
    except (OSError, ValueError):
        return None
    given = {name: attributes[name] for name in KEPT_ATTRIBUTES if attributes.get(name) is not None}
    # A setting that Transformers' image processors leave open is off there, whereas ours crop by default.
    return {"do_center_crop": False, **given}


def read_timm_data_config(data: dict[str, Any]) -> dict[str, Any]:
    """The attributes of an image processor that prepares images as timm's `pretrained_cfg` says."""
    height, width = data["input_size"][1:]
    attributes = {
        "size": {"shortest_edge": int(max(height, width) / data.get("crop_pct", 0.875))},
        "crop_size": {"height": height, "width": width},
        "resample": PILImageResampling[data.get("interpolation", "bicubic").upper()],
        "image_mean": data.get("mean"),
        "image_std": data.get("std"),
    }
    return {name: value for name, value in attributes.items() if value is not None}


def image_processor_for(source: "Source", config: HPoolViTConfig, **overrides) -> HPoolViTImageProcessor:
    """
    An image processor that prepares images as the source does. If the model takes another image size, it keeps the
    source's mean, standard deviation and resampling, and crops as ours does. If the source does not say how it
    prepares images, you get the defaults of [`HPoolViTImageProcessor`].

    Args:
        source ([`Source`]): what [`read_source`] returned.
        config (`HPoolViTConfig`): the configuration of the converted model.
        overrides: attributes to set instead of the source's, such as `image_mean`.
    """
    attributes = source.image_processor or {}
    size = attributes.get("crop_size" if attributes.get("do_center_crop", True) else "size", {})
    if (size.get("height"), size.get("width")) == config.image_shape:
        return HPoolViTImageProcessor(**{**attributes, **overrides})
    kept = {name: attributes[name] for name in ("resample", "image_mean", "image_std") if name in attributes}
    return HPoolViTImageProcessor.for_config(config, **{**kept, **overrides})
