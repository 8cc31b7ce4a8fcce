"""Image files for tests, sound and bad ones, as bytes and in folders, Parquet and tar files."""

import io
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image


def picture(seed: int = 0, size: tuple[int, int] = (24, 20)) -> Image.Image:
    """An RGB image of random colours."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def encoded(image: Image.Image, file_format: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def claiming(png: bytes, width: int, height: int) -> bytes:
    """A PNG file whose header claims another size."""
    header = b"IHDR" + struct.pack(">II", width, height) + png[24:29]
    return png[:12] + header + struct.pack(">I", zlib.crc32(header)) + png[33:]


# Name of the file, its bytes, and what the report shall say.
BAD_FILES = {
    "cut_off.jpg": (encoded(picture(1), "JPEG")[:900], "truncated"),
    "cut_short.jpg": (encoded(picture(1), "JPEG")[:300], "truncated"),
    "cut_off.png": (encoded(picture(1))[:600], "truncated"),
    "text.jpg": (b"This is no picture.", "unreadable"),
    "empty.jpg": (b"", "unreadable"),
    "moving.gif": (encoded(picture(1), "GIF", save_all=True, append_images=[picture(2)]), "animated: 2 frames"),
    "moving.webp": (encoded(picture(1), "WEBP", save_all=True, append_images=[picture(2)]), "animated: 2 frames"),
    "dot.png": (encoded(picture(1, (1, 1))), "too small: 1 × 1 pixels"),
    "line.png": (encoded(picture(1, (9, 1))), "too small: 9 × 1 pixels"),
    "enormous.png": (claiming(encoded(picture(1)), 30_000, 30_000), "too large"),
    "large.png": (claiming(encoded(picture(1)), 10_000, 10_000), "too large"),
    # A few hundred bytes each. With the short side at 256 pixels they would take gigabytes.
    "tall.png": (encoded(Image.new("RGB", (2, 40_000))), "too long: 2 × 40000 pixels"),
    "wide.png": (encoded(Image.new("RGB", (40_000, 2))), "too long: 40000 × 2 pixels"),
    "negative.tif": (encoded(Image.fromarray(np.full((9, 9), -1000, dtype=np.int32)), "TIFF"), "values from -1000"),
}
CONVERTED_FILES = {
    "palette.png": (encoded(picture(3).convert("P")), "palette to RGB"),
    "print.jpg": (encoded(picture(3).convert("CMYK"), "JPEG"), "CMYK to RGB"),
}


def write_folder(folder: Path, classes: tuple[str, ...] = ("ant", "bee", "cat"), per_class: int = 8) -> Path:
    """One sub-folder per class with PNG files of different pictures and sizes."""
    for label, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for index in range(per_class):
            image = picture(100 * label + index, (20 + index % 3, 18 + label))
            (folder / name / f"{index}.png").write_bytes(encoded(image))
    return folder


def write_parquet(path: Path, labels: list, first: int = 0, **metadata) -> Path:
    """A Parquet file of pictures, the image named after its number, with plain labels."""
    images = [
        {"bytes": encoded(picture(first + index)), "path": f"{first + index}.png"} for index in range(len(labels))
    ]
    pyarrow.parquet.write_table(pyarrow.table({"image": images, "label": labels}), path, **metadata)
    return path


def write_tar(path: Path, labels: list, first: int = 0, label_ending: str = "cls") -> Path:
    """A WebDataset tar file of pictures."""
    with tarfile.open(path, "w") as tar:
        for index, label in enumerate(labels):
            for ending, data in (("png", encoded(picture(first + index))), (label_ending, str(label).encode())):
                info = tarfile.TarInfo(f"{first + index:04d}.{ending}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path
