"""Decode image files to RGB, and record the files that cannot be used."""

import io
import json
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from PIL import Image, ImageOps

from hpool_vit.image_processing_hpool_vit import to_rgb

from .console import needs


with needs("vision"):
    from torchvision.transforms.v2.functional import to_pil_image


# Files in these modes can look different in RGB, so the report lists them.
REPORTED_MODES = {"CMYK": "CMYK", "P": "palette", "PA": "palette"}


class DataError(ValueError):
    """
    What is wrong with the data, in one line. A `DataLoader` repeats an error of a worker with the whole traceback as
    its message; only the line itself is kept.
    """

    def __init__(self, message: str):
        line = re.sub(r"(?s)^Caught .*\n[\w.]*Error: ", "", message).strip()
        super().__init__(line.replace("\n", " "))


class BadImageError(DataError):
    """An image that cannot be used; the message is the reason."""


class TooManyBadImagesError(DataError):
    """More images are bad than `max_bad_images` allows."""


def read_image(image: dict | None) -> bytes:
    """
    Args:
        image: an image as `datasets.Image(decode=False)` gives it, a dictionary of `bytes` and `path`: embedded bytes,
            or a file at a path or web address.

    Raises:
        BadImageError: if there are no bytes.
    """
    if image is None or (image["bytes"] is None and not image["path"]):
        raise BadImageError("no image")
    if image["bytes"] is not None:
        return image["bytes"]
    try:
        with open_path(image["path"]) as file:
            return file.read()
    except OSError as error:
        raise BadImageError(f"unreadable: {error.strerror or error}") from error


def open_path(path: str) -> BinaryIO:
    """A local file, or one that `datasets` reads from an address or an archive."""
    if "://" not in path:
        return open(path, "rb")
    with needs("train"):
        from datasets.utils.file_utils import xopen
    return xopen(path, "rb")


def decode_image(data: bytes) -> tuple[Image.Image, str | None]:
    """
    Decodes an image to RGB: upright according to its EXIF data, transparency on white, 16 bits as 8.

    Returns:
        The image, and a note if it was CMYK or had a palette.

    Raises:
        BadImageError: if the image is unreadable, truncated or animated, has a side of 1 pixel, or has more pixels
            than `PIL.Image.MAX_IMAGE_PIXELS`. The header tells, so an enormous image takes no memory.
    """
    # Pillow's decoders raise all kinds of errors for a broken file, from OSError to struct.error.
    try:
        with warnings.catch_warnings():
            # Checked below: threads that decode side by side undo each other's filters.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data))
        num_frames = getattr(image, "n_frames", 1)
    except Image.UnidentifiedImageError as error:
        raise BadImageError("unreadable: not an image that Pillow knows") from error
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise BadImageError(f"too large: {error}") from error
    except Exception as error:
        raise BadImageError(describe(error)) from error
    if Image.MAX_IMAGE_PIXELS and image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise BadImageError(f"too large: {image.width * image.height} pixels, more than {Image.MAX_IMAGE_PIXELS}")
    # Many cameras write photos as MPO files, whose second image is a preview or a depth map.
    if num_frames > 1 and image.format != "MPO":
        raise BadImageError(f"animated: {num_frames} frames")
    if min(image.size) <= 1:
        raise BadImageError(f"too small: {image.width} × {image.height} pixels")
    note = REPORTED_MODES.get(image.mode)
    try:
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode != "RGB" or "transparency" in image.info:
            image = to_pil_image(to_rgb(image))
        image.load()
    except Exception as error:
        raise BadImageError(describe(error)) from error
    return image, note and f"{note} to RGB"


def describe(error: Exception) -> str:
    reason = "truncated" if "truncated" in str(error).lower() else "unreadable"
    return f"{reason}: {str(error) or type(error).__name__}"


class BadImages:
    """
    The bad images so far, one record per file: its `name`, the `kind` ("skipped" or "converted") and the `reason`.
    """

    def __init__(self, records: Iterable[dict] = ()):
        self.records: dict[str, dict] = {}
        self.add(records)

    def add(self, records: Iterable[dict]) -> None:
        """Adds the records of a batch (its `bad_images`), of another process, or of an earlier run."""
        for record in records:
            self.records.setdefault(record["name"], record)

    def of_kind(self, kind: str) -> list[dict]:
        return [record for record in self.records.values() if record["kind"] == kind]

    def check(self, max_bad_images: int) -> None:
        """
        Raises:
            TooManyBadImagesError: if more than `max_bad_images` files were skipped.
        """
        skipped = self.of_kind("skipped")
        if len(skipped) > max_bad_images:
            raise TooManyBadImagesError(
                f"{len(skipped)} images are bad, more than `max_bad_images={max_bad_images}`. The last one is "
                f"{skipped[-1]['name']} ({skipped[-1]['reason']}). Repair the data, or raise the limit."
            )

    def write(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps(list(self.records.values()), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: str | Path) -> "BadImages":
        return cls(json.loads(Path(path).read_text(encoding="utf-8")))

    def summary(self, max_lines: int = 20) -> str:
        """How many files there are of each kind, with names and reasons of at most `max_lines` of them."""
        lines = []
        for kind in ("skipped", "converted"):
            records = self.of_kind(kind)
            lines.append(f"{len(records)} image{'s' * (len(records) != 1)} {kind}{':' * bool(records)}")
            lines += [f"  {record['name']}: {record['reason']}" for record in records[:max_lines]]
            if len(records) > max_lines:
                lines.append(f"  … and {len(records) - max_lines} more")
        return "\n".join(lines)
