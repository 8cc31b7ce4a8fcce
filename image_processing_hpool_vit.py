"""Image processors of HPool-ViT: the same preparation on torchvision and on Pillow."""

import base64
import binascii
import warnings
from collections.abc import Sequence
from io import BytesIO
from os import PathLike
from os.path import isfile
from typing import Any, BinaryIO, Self

import torch
from huggingface_hub.utils import get_session
from PIL import Image, ImageOps
from transformers.feature_extraction_utils import BatchFeature
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


# Resizing the short side of a longer image would make an image of unbounded size: 2 × 40,000 pixels become 5 million
# columns of 256 pixels.
MAX_ASPECT_RATIO = 64

# A download that is larger is not an image for a model.
MAX_DOWNLOAD_BYTES = 2**30
DOWNLOAD_TIMEOUT = 20  # seconds without an answer

# Scores of classes at the size of a photo that are held at a time, of 4 bytes each.
MOST_RESIZED_SCORES = 2**26

# By the type of an array, the ranges in which its largest value may lie, and the value of white: the end of the range.
# A largest value between the ranges leaves the scale open. None: any other type of integers.
FLOAT_SCALES = ((0, 1), (2, 255))
SCALES = {
    torch.uint16: ((0, 65535),),
    torch.uint32: ((0, 255), (256, 65535), (2**31, 2**32 - 1)),
    torch.float16: FLOAT_SCALES,
    torch.bfloat16: FLOAT_SCALES,
    torch.float32: FLOAT_SCALES,
    torch.float64: FLOAT_SCALES,
    None: ((0, 255), (256, 65535)),
}


class HPoolViTImageProcessing(BaseImageProcessor):
    """
    What both image processors share: RGB, short side to 256 pixels (bicubic), centre crop of 224 × 224, rescale to
    [0, 1], ImageNet mean and standard deviation. Takes files (paths, URLs, base64), Pillow images, NumPy arrays and
    tensors, of 8, 16 or 32 bits or floating point, greyscale, palette, RGB or RGBA (transparency on white), also mixed
    in one batch. Files are turned upright as their EXIF data says; Pillow images are taken as they are.
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
            kwargs: attributes that replace those of the class, such as `image_mean`.

        Raises:
            ValueError: if the model does not take RGB images, unless `do_convert_rgb=False` is among `kwargs`.
        """
        if config.num_channels != 3 and kwargs.get("do_convert_rgb", cls.do_convert_rgb):
            raise ValueError(
                f"`num_channels={config.num_channels}`, and the image processor gives 3 channels: pass "
                "`do_convert_rgb=False`, and `image_mean` and `image_std` with one number per channel."
            )
        height, width = config.image_shape
        kwargs.setdefault("size", {"shortest_edge": round(max(height, width) * 256 / 224)})
        kwargs.setdefault("crop_size", {"height": height, "width": width})
        return cls(**kwargs)

    def post_process_semantic_segmentation(
        self,
        outputs: Any,
        target_sizes: list[tuple[int, int]] | None = None,
        return_segmentation_scores: bool = False,
    ) -> list[torch.Tensor] | list[BatchFeature]:
        """
        The class of each pixel, from what a segmentation model returns.

        Args:
            outputs: with `logits` of shape `(batch_size, num_labels, rows, columns)`.
            target_sizes (`list[tuple[int, int]]`, *optional*): (height, width) of each image, to which the logits are
                resized; None: they keep their resolution.
            return_segmentation_scores (`bool`, defaults to `False`): whether to return the scores of the classes too.

        Returns:
            `list[torch.Tensor]`: for each image the indices of the classes, of shape `(height, width)`. With scores, a
            `BatchFeature` of these as `segmentation`, and of `segmentation_scores` of shape
            `(num_labels, height, width)`.

        Raises:
            ValueError: if there are not as many sizes as images.
        """
        logits = outputs.logits
        sizes = [None] * len(logits) if target_sizes is None else target_sizes
        if len(sizes) != len(logits):
            raise ValueError(f"`target_sizes` has {len(sizes)} sizes for {len(logits)} images: give one each.")
        if not return_segmentation_scores:
            return [most_likely_classes(scores, size) for scores, size in zip(logits, sizes, strict=True)]
        resized = [resize_scores(scores, size) for scores, size in zip(logits, sizes, strict=True)]
        return [
            BatchFeature({"segmentation": scores.argmax(dim=0), "segmentation_scores": scores}) for scores in resized
        ]

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        if "auto_map" in output:
            # Transformers lists only the class that is saved, and then nothing loads without torchvision.
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

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        # Transformers' own decoders drop transparency, and clip 16 bits to white.
        if isinstance(image_url_or_urls, list | tuple):
            return [self.fetch_images(image) for image in image_url_or_urls]
        if isinstance(image_url_or_urls, str | PathLike):
            return open_image(image_url_or_urls)
        return super().fetch_images(image_url_or_urls)

    def process_image(
        self,
        image: ImageInput,
        do_convert_rgb: bool | None = None,
        input_data_format: str | ChannelDimension | None = None,
        do_rescale: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        if do_convert_rgb:
            image = to_rgb(image, input_data_format, scale_floats=bool(do_rescale))
            prepared: Any = self.from_rgb(image, **kwargs)
        else:
            prepared = super().process_image(
                image, do_convert_rgb=False, input_data_format=input_data_format, **kwargs
            )
        check_aspect_ratio(*prepared.shape[-2:])
        return prepared

    def from_rgb(self, image: torch.Tensor, **kwargs: Any) -> Any:
        """An RGB image of shape (3, height, width) as this backend works on it."""
        raise NotImplementedError


class HPoolViTImageProcessor(HPoolViTImageProcessing, TorchvisionBackend):  # type: ignore[misc]  # `device` in kwargs
    """The image processor on torchvision, which prepares a batch together and on any device."""

    def from_rgb(self, image: torch.Tensor, device: Any = None, **kwargs: Any) -> torch.Tensor:
        return image if device is None else image.to(device)

    def resize(self, image: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        # Decoded images have the channels of a pixel side by side, which makes resizing twice as fast, and the steps
        # after it slower.
        resized: torch.Tensor = super().resize(image, *args, **kwargs)
        return resized.contiguous()


class HPoolViTImageProcessorPil(HPoolViTImageProcessing, PilBackend):
    """The image processor on Pillow, for machines without torchvision."""

    def from_rgb(self, image: torch.Tensor, **kwargs: Any) -> Any:
        return image.numpy()


def add_channel_axis(image: Any) -> Any:
    return image[None] if getattr(image, "ndim", 3) == 2 else image


def open_image(source: str | PathLike[str]) -> Image.Image:
    """
    The upright RGB image in a file, at a URL, or in a base64 text (with or without `data:image/…;base64,` before it).

    Raises:
        ValueError: if there is no such file, or it does not hold one usable image; see [`decode_image`].
    """
    name = str(source)
    shown = name if len(name) <= 200 else f"{name[:200]}…"
    try:
        return decode_image(name if isfile(name) else BytesIO(fetch_bytes(name)))
    except Exception as error:  # the HTTP client's errors have no class in common with others
        raise ValueError(f"The image {shown!r} cannot be used: {error}") from error


def fetch_bytes(name: str) -> bytes:
    """What a URL or a base64 text holds."""
    if name.startswith(("http://", "https://")):
        return download(name)
    try:
        return base64.b64decode("".join(name.rpartition("base64,")[2].split()), validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("there is no such file, and it is neither a URL nor base64") from None


def download(url: str) -> bytes:
    data = bytearray()
    with get_session().stream("GET", url, follow_redirects=True, timeout=DOWNLOAD_TIMEOUT) as response:
        response.raise_for_status()
        for part in response.iter_bytes():
            data += part
            if len(data) > MAX_DOWNLOAD_BYTES:
                raise ValueError(f"too large: more than {MAX_DOWNLOAD_BYTES} bytes")
    return bytes(data)


def decode_image(file: str | BinaryIO) -> Image.Image:
    """
    Decodes an image file to 8-bit RGB: upright according to its EXIF data, transparency on white, more bits and
    floating point scaled as [`to_rgb`] says.

    Raises:
        ValueError: if the image is unreadable, truncated or animated, has a side of 1 pixel, is longer than
            `MAX_ASPECT_RATIO` times its short side, has more pixels than `PIL.Image.MAX_IMAGE_PIXELS`, or values whose
            scale is unknown. The header tells most of it, so a large image takes no memory.
    """
    # Pillow's decoders raise all kinds of errors for a broken file, from OSError to struct.error.
    try:
        with warnings.catch_warnings():
            # Checked below: threads that decode side by side undo each other's filters.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image: Image.Image = Image.open(file)
    except Image.UnidentifiedImageError as error:
        raise ValueError("unreadable: not an image that Pillow knows") from error
    except Exception as error:
        raise ValueError(_why_unreadable(error)) from error
    with image:
        check_header(image)
        try:
            ImageOps.exif_transpose(image, in_place=True)
            image.getpixel((0, 0))  # decodes it
        except Exception as error:
            raise ValueError(_why_unreadable(error)) from error
        if image.mode == "RGB" and "transparency" not in image.info:
            return image
        return Image.fromarray(to_rgb(image).movedim(0, -1).contiguous().numpy())


def check_header(image: Image.Image) -> None:
    """Raises a `ValueError` for an opened image that must not be decoded."""
    if Image.MAX_IMAGE_PIXELS and image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"too large: {image.width * image.height} pixels, more than {Image.MAX_IMAGE_PIXELS}")
    try:
        num_frames = getattr(image, "n_frames", 1)
    except Exception as error:
        raise ValueError(_why_unreadable(error)) from error
    # Many cameras write photos as MPO files, whose second image is a preview or a depth map.
    if num_frames > 1 and image.format != "MPO":
        raise ValueError(f"animated: {num_frames} frames")
    if min(image.size) <= 1:
        raise ValueError(f"too small: {image.width} × {image.height} pixels")
    check_aspect_ratio(image.height, image.width)


def resize_scores(scores: torch.Tensor, size: Sequence[int] | None) -> torch.Tensor:
    """Scores of shape `(num_labels, rows, columns)` at (height, width), in float32; None: as they are."""
    if size is None:
        return scores
    height, width = map(int, size)
    resized = torch.nn.functional.interpolate(
        scores[None].float(), size=(height, width), mode="bilinear", align_corners=False
    )
    return resized[0]


def most_likely_classes(scores: torch.Tensor, size: Sequence[int] | None) -> torch.Tensor:
    """
    The class of each pixel at (height, width), or None: at the resolution of the scores, which have the shape
    `(num_labels, rows, columns)`. At the size of a large photo the scores of all classes would take gigabytes, so only
    some of them are resized at a time.
    """
    if size is None:
        return scores.argmax(dim=0)
    height, width = map(int, size)
    step = max(MOST_RESIZED_SCORES // (height * width), 1)
    best, classes = resize_scores(scores[:step], size).max(dim=0)
    for start in range(step, len(scores), step):
        value, index = resize_scores(scores[start : start + step], size).max(dim=0)
        classes = torch.where(value > best, index + start, classes)
        best = torch.maximum(best, value)
    return classes


def check_aspect_ratio(height: int, width: int) -> None:
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise ValueError(
            f"too long: {width} × {height} pixels, and one side may be at most {MAX_ASPECT_RATIO} times the other"
        )


def _why_unreadable(error: Exception) -> str:
    if isinstance(error, Image.DecompressionBombWarning | Image.DecompressionBombError):
        return f"too large: {error}"
    reason = "truncated" if "truncated" in str(error).lower() else "unreadable"
    return f"{reason}: {str(error) or type(error).__name__}"


def to_rgb(
    image: Any, input_data_format: str | ChannelDimension | None = None, scale_floats: bool = True
) -> torch.Tensor:
    """
    The image as a `uint8` tensor of shape (3, height, width): greyscale repeated, transparency on white. 16 bits, 32
    bits and floating point in [0, 1] are scaled to 8 bits.

    Args:
        image: a Pillow image, a NumPy array or a tensor.
        input_data_format: where the channels of an array are; by default it is inferred.
        scale_floats: whether floating point is scaled too. If not, it stays as it is.

    Raises:
        ValueError: for an array whose number of channels is not 1, 3 or 4, or values whose scale is unknown.
    """
    kind = None
    if is_pil_image(image):
        kind = f"mode {image.mode!r}"
        # Pillow's own conversion would clip these.
        if not image.mode.startswith(("I", "F")):
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
    if scale_floats or not image.is_floating_point():
        image = to_8_bits(image, kind or f"type {image.dtype}")
    if image.shape[0] == 4:
        image = on_white(image)
    return image.expand(3, -1, -1) if image.shape[0] == 1 else image


def to_8_bits(image: torch.Tensor, kind: str) -> torch.Tensor:
    """Values of a known scale as `uint8`; `kind` names their type in the error for others."""
    if image.dtype == torch.uint8:
        return image
    if image.dtype == torch.bool:
        return image.to(torch.uint8) * 255
    # Part by part, because larger types take many times the memory.
    parts = rows_of(image)
    extremes = [comparable(part).aminmax() for part in parts]
    low = torch.stack([extreme.min for extreme in extremes]).min().item()
    high = torch.stack([extreme.max for extreme in extremes]).max().item()
    for least, white in SCALES.get(image.dtype, SCALES[None]):
        if low >= 0 and least <= high <= white:
            scaled = [(comparable(part).double() * (255 / white)).round().to(torch.uint8) for part in parts]
            return torch.cat(scaled, dim=1)
    raise ValueError(
        f"values from {low:g} to {high:g} in {kind}, whose scale is unknown: scale them to 8 bits (0 to 255), or pass "
        "`do_rescale=False` if floating-point values are already scaled"
    )


def comparable(image: torch.Tensor) -> torch.Tensor:
    """The values in a type that holds them all and that PyTorch can compare."""
    return image if image.is_floating_point() else image.to(torch.int64)


def rows_of(image: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The image in bands of rows with about a million pixels each."""
    return image.split(max(2**20 // image.shape[2], 1), dim=1)


def on_white(image: torch.Tensor) -> torch.Tensor:
    """RGBA of shape (4, height, width) as RGB on a white ground, a few rows at a time to save memory."""
    white = 1.0 if image.is_floating_point() and image.max() <= 1 else 255.0
    parts = []
    for rows in rows_of(image):
        color, alpha = rows[:3].float(), rows[3:].float() / white
        color = color * alpha + white * (1 - alpha)
        parts.append((color if image.is_floating_point() else color.round()).to(image.dtype))
    return torch.cat(parts, dim=1)


HPoolViTImageProcessor.register_for_auto_class()
HPoolViTImageProcessorPil.register_for_auto_class()

__all__ = ["HPoolViTImageProcessor", "HPoolViTImageProcessorPil"]
