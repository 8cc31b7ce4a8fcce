"""From the bytes of an image file to an RGB image, and the record of the files that could not be used."""

import io
import json
import re
import warnings
from collections.abc import Iterable
from pathlib import Path

from datasets.utils.file_utils import xopen
from PIL import Image, ImageOps
from torchvision.transforms.v2.functional import to_pil_image

from hpool_vit.image_processing_hpool_vit import to_rgb


# Colour spaces in which a file can look other than its colours in RGB: the report lists the files that had them.
REPORTED_MODES = {"CMYK": "CMYK", "P": "palette", "PA": "palette"}


class DataError(ValueError):
    """
    What is wrong with the data, in one line for the user. A `DataLoader` raises what happens in a worker again with
    the worker's traceback as the message: of that only the line itself is kept.
    """

    def __init__(self, message: str):
        line = re.sub(r"(?s)^Caught .*\n[\w.]*Error: ", "", message).strip()
        super().__init__(line.replace("\n", " "))


class BadImageError(DataError):
    """An image that cannot be used, and why."""


class TooManyBadImagesError(DataError):
    """More images are bad than `max_bad_images` allows."""


def read_image(image: dict | None) -> bytes:
    """
    The bytes of an image as `datasets.Image(decode=False)` gives it: embedded, or in a file at a path or address.

    Raises:
        BadImageError: if there are none.
    """
    if image is None or (image["bytes"] is None and not image["path"]):
        raise BadImageError("no image")
    if image["bytes"] is not None:
        return image["bytes"]
    try:
        with xopen(image["path"], "rb") as file:
            return file.read()
    except OSError as error:
        raise BadImageError(f"unreadable: {error.strerror or error}") from error


def decode_image(data: bytes) -> tuple[Image.Image, str | None]:
    """
    The image turned upright as its EXIF data say and in RGB (transparency on white, 16 bits as 8), and a note if it
    was CMYK or had a palette.

    Raises:
        BadImageError: for an image that is unreadable, truncated, animated, has a side of 1 pixel, or has more pixels
            than `PIL.Image.MAX_IMAGE_PIXELS`, which is judged by the header, before any memory is taken.
    """
    # Pillow's decoders raise whatever a broken file leads them to, from OSError to struct.error.
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data))
        num_frames = getattr(image, "n_frames", 1)
    except Image.UnidentifiedImageError as error:
        raise BadImageError("unreadable: not an image that Pillow knows") from error
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise BadImageError(f"too large: {error}") from error
    except Exception as error:
        raise BadImageError(describe(error)) from error
    # The second image of an MPO file, which many cameras write for a photo, is a preview or a depth map.
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
    The bad images met so far, each file once: records with the `name` of the file, the `kind`, which is "skipped" or
    "converted", and the `reason`.
    """

    def __init__(self, records: Iterable[dict] = ()):
        self.records: dict[str, dict] = {}
        self.add(records)

    def add(self, records: Iterable[dict]):
        """Adds records: of a batch (its `bad_images`), of another process, or of an earlier run."""
        for record in records:
            self.records.setdefault(record["name"], record)

    def of_kind(self, kind: str) -> list[dict]:
        return [record for record in self.records.values() if record["kind"] == kind]

    def check(self, max_bad_images: int):
        """
        Raises:
            TooManyBadImagesError: if more than `max_bad_images` files were skipped.
        """
        skipped = self.of_kind("skipped")
        if len(skipped) > max_bad_images:
            raise TooManyBadImagesError(
                f"{len(skipped)} images are bad, more than --max_bad_images {max_bad_images}, the last one "
                f"{skipped[-1]['name']} ({skipped[-1]['reason']}): repair the data, or raise the limit."
            )

    def write(self, path: str | Path):
        Path(path).write_text(json.dumps(list(self.records.values()), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: str | Path) -> "BadImages":
        return cls(json.loads(Path(path).read_text(encoding="utf-8")))

    def summary(self, max_lines: int = 20) -> str:
        """The number of files of each kind and their names and reasons, at most `max_lines` of a kind."""
        lines = []
        for kind in ("skipped", "converted"):
            records = self.of_kind(kind)
            lines.append(f"{len(records)} image{'s' * (len(records) != 1)} {kind}{':' * bool(records)}")
            lines += [f"  {record['name']}: {record['reason']}" for record in records[:max_lines]]
            if len(records) > max_lines:
                lines.append(f"  … and {len(records) - max_lines} more")
        return "\n".join(lines)
