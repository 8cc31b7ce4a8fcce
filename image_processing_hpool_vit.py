"""Image processors of HPool-ViT: the same preparation on torchvision and on Pillow."""

from typing import Any, Self

import torch
from transformers.image_processing_backends import PilBackend, TorchvisionBackend
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    ChannelDimension,
    ImageInput,
    PILImageResampling,
    infer_channel_dimension_format,
    is_pil_image,
    to_numpy_array,
)

from .configuration_hpool_vit import HPoolViTConfig


class HPoolViTImageProcessing(BaseImageProcessor):
    """
    What both image processors share: RGB, short side to 256 pixels (bicubic), centre crop of 224 × 224, rescale to
    [0, 1], ImageNet mean and standard deviation. Takes images as Pillow images, files, NumPy arrays and tensors, of
    8 or 16 bits, greyscale, palette, RGB or RGBA (transparency on white), also mixed in one batch.
    """

    resample = PILImageResampling.BICUBIC
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    size = {"shortest_edge": 256}
    default_to_square = False
    crop_size = {"height": 224, "width": 224}
    do_resize = True
    do_center_crop = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True

    @classmethod
    def for_config(cls, config: HPoolViTConfig, **kwargs: Any) -> Self:
        """
        The image processor that fits a model: the crop is `config.image_size`, and the image is resized so that the
        crop keeps the share of the short side that 224 has of 256.

        Args:
            config (`HPoolViTConfig`): the configuration of the model.
            kwargs: attributes that shall differ, such as `image_mean`.

        Raises:
            ValueError: for a model of other than RGB images, unless `do_convert_rgb=False` is among `kwargs`.
        """
        if config.num_channels != 3 and kwargs.get("do_convert_rgb", cls.do_convert_rgb):
            raise ValueError(
                f"`num_channels={config.num_channels}`, and the image processor gives 3 channels: pass "
                "`do_convert_rgb=False`, and `image_mean` and `image_std` of as many numbers."
            )
        height, width = config.image_shape
        kwargs.setdefault("size", {"shortest_edge": round(max(height, width) * 256 / 224)})
        kwargs.setdefault("crop_size", {"height": height, "width": width})
        return cls(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        if "auto_map" in output:
            # By itself Transformers lists only the class that is saved, and then nothing loads without torchvision.
            module = __name__.split(".")[-1]
            names = {"torchvision": "HPoolViTImageProcessor", "pil": "HPoolViTImageProcessorPil"}
            output["auto_map"] = {
                "AutoImageProcessor": {backend: f"{module}.{name}" for backend, name in names.items()}
            }
        return output

    def _prepare_images_structure(self, images: ImageInput, expected_ndims: int = 3) -> ImageInput:
        # An array without a channel axis is a greyscale image, never a batch.
        if isinstance(images, list | tuple):
            images = [add_channel_axis(image) for image in images]
        return super()._prepare_images_structure(add_channel_axis(images), expected_ndims=expected_ndims)

    def process_image(
        self,
        image: ImageInput,
        do_convert_rgb: bool | None = None,
        input_data_format: str | ChannelDimension | None = None,
        **kwargs: Any,
    ) -> Any:
        if do_convert_rgb:
            image = to_rgb(image, input_data_format)
            input_data_format = ChannelDimension.FIRST
        return super().process_image(image, do_convert_rgb=False, input_data_format=input_data_format, **kwargs)


class HPoolViTImageProcessor(HPoolViTImageProcessing, TorchvisionBackend):  # type: ignore[misc]  # `device` in kwargs
    """The image processor on torchvision, which prepares a batch together and on any device."""


class HPoolViTImageProcessorPil(HPoolViTImageProcessing, PilBackend):
    """The image processor on Pillow, for machines without torchvision."""


def add_channel_axis(image: Any) -> Any:
    return image[None] if getattr(image, "ndim", 3) == 2 else image


def to_rgb(image: Any, input_data_format: str | ChannelDimension | None = None) -> torch.Tensor:
    """
    The image as a tensor of shape (3, height, width): greyscale repeated, transparency on white, 16 bits as 8 (which
    Pillow's own conversion would clip to white).

    Raises:
        ValueError: for an array whose number of channels is not 1, 3 or 4.
    """
    if is_pil_image(image):
        if not image.mode.startswith("I"):
            has_alpha = "A" in image.getbands() or "transparency" in image.info
            image = image.convert("RGBA" if has_alpha else "RGB")
        input_data_format = ChannelDimension.LAST
    if not isinstance(image, torch.Tensor):
        # A copy in this machine's byte order: PyTorch takes neither read-only nor flipped nor foreign arrays.
        image = to_numpy_array(image)
        image = torch.from_numpy(image.astype(image.dtype.newbyteorder("="), order="C"))
    if image.ndim == 2:
        image, input_data_format = image[None], ChannelDimension.FIRST
    if input_data_format is None:
        input_data_format = infer_channel_dimension_format(image, num_channels=(1, 3, 4))
    if input_data_format == ChannelDimension.LAST:
        image = image.movedim(-1, 0)
    if image.dtype == torch.bool:
        image = image.to(torch.uint8) * 255
    elif not image.is_floating_point() and image.dtype != torch.uint8:
        is_16_bit = image.dtype == torch.uint16 or image.max() > 255
        image = (image.float() / (257 if is_16_bit else 1)).round().to(torch.uint8)
    if image.shape[0] == 4:
        white = 1.0 if image.is_floating_point() and image.max() <= 1 else 255.0
        color, alpha = image[:3].float(), image[3:].float() / white
        color = color * alpha + white * (1 - alpha)
        image = (color if white == 1.0 else color.round()).to(image.dtype)
    return image.expand(3, -1, -1) if image.shape[0] == 1 else image


HPoolViTImageProcessor.register_for_auto_class()
HPoolViTImageProcessorPil.register_for_auto_class()

__all__ = ["HPoolViTImageProcessor", "HPoolViTImageProcessorPil"]
