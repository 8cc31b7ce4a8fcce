"""Decode image files to RGB, and record the files that cannot be used."""

import contextlib
import io
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from hpool_vit import image_processing_hpool_vit

from .console import needs, one_line


# Files in these modes can look different in RGB, so the report lists them.
REPORTED_MODES = {"CMYK": "CMYK", "P": "palette", "PA": "palette"}
# A larger file is not read.
MAX_BYTES = 1 << 30
# Pillow knows these files by their beginning, but does not decode them.
FORMATS_WITHOUT_DECODER = {"BUFR", "GRIB", "HDF5", "MPEG", "WMF"}


def register_heif() -> None:
    """Lets Pillow read HEIC and HEIF if the package pillow-heif is installed (the extra `heif`)."""
    with contextlib.suppress(ImportError):
        from pillow_heif import register_heif_opener

        register_heif_opener()


register_heif()


def readable_endings() -> set[str]:
    """The endings of the files that Pillow can decode here, in small letters."""
    Image.init()
    formats = Image.OPEN.keys() - FORMATS_WITHOUT_DECODER
    return {ending for ending, name in Image.registered_extensions().items() if name in formats}


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
        BadImageError: if there are no bytes, or more than `MAX_BYTES`, or they cannot be read.
        ImportError: if reading the address needs a missing package.
    """
    if image is None or (image["bytes"] is None and not image["path"]):
        raise BadImageError("no image")
    if image["bytes"] is not None:
        return image["bytes"]
    path = image["path"]
    try:
        if os.path.isfile(path):
            check_size(os.path.getsize(path))
        with open_path(path) as file:
            data = file.read(MAX_BYTES + 1)
    except (BadImageError, ImportError):
        raise
    # The errors of the clients that read addresses have no common class.
    except Exception as error:
        reason = getattr(error, "strerror", None) or one_line(error) or type(error).__name__
        raise BadImageError(f"unreadable: {reason}") from error
    check_size(len(data))
    return data


def check_size(size: int) -> None:
    """Raises a `BadImageError` for a file of more than `MAX_BYTES`."""
    if size > MAX_BYTES:
        raise BadImageError(f"too large: more than {MAX_BYTES >> 20} MiB")


def open_path(path: str) -> BinaryIO:
    """A local file, or one that `datasets` reads from an address or an archive."""
    if "://" not in path:
        return open(path, "rb")
    with needs("train"):
        from datasets.utils.file_utils import xopen
    return xopen(path, "rb")


def decode_image(data: bytes) -> tuple[Image.Image, str | None]:
    """
    Decodes an image to RGB as the image processor does.

    Returns:
        The image, and a note if it was CMYK or had a palette.

    Raises:
        BadImageError: with the reason, if `image_processing_hpool_vit.decode_image` refuses the image.
    """
    try:
        image = image_processing_hpool_vit.decode_image(io.BytesIO(data))
    except ValueError as error:
        raise BadImageError(str(error)) from error
    note = REPORTED_MODES.get(Image.open(io.BytesIO(data)).mode)
    return image, note and f"{note} to RGB"


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
