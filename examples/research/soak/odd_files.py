"""Image files as they come from cameras, scanners, laboratories, broken disks and people who mean harm."""

import io
import os
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image


Generator = np.random.Generator


@dataclass
class OddFile:
    """
    Args:
        path: the file. Its name need not be UTF-8.
        kind: the key in `KINDS`.
        is_usable: whether it must be answered, or refused with a reason.
    """

    path: Path
    kind: str
    is_usable: bool


def picture(generator: Generator, size: tuple[int, int] | None = None) -> Image.Image:
    width, height = size or generator.integers(17, 60, 2).tolist()
    return Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image: Image.Image, file_format: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def converted(mode: str, file_format: str = "PNG") -> Callable[[Generator], bytes]:
    return lambda generator: encoded(picture(generator).convert(mode), file_format)


def truncated(file_format: str) -> Callable[[Generator], bytes]:
    def make(generator: Generator) -> bytes:
        data = encoded(picture(generator), file_format)
        return data[: int(len(data) * generator.uniform(0.1, 0.9))]

    return make


def animated(file_format: str) -> Callable[[Generator], bytes]:
    def make(generator: Generator) -> bytes:
        frames = [picture(generator, (30, 20)) for _ in range(generator.integers(2, 5))]
        return encoded(frames[0], file_format, save_all=True, append_images=frames[1:])

    return make


def claiming(generator: Generator) -> bytes:
    """A small PNG whose header claims 400 to 900 million pixels."""
    png = encoded(picture(generator))
    header = b"IHDR" + struct.pack(">II", *generator.integers(20_000, 30_000, 2).tolist()) + png[24:29]
    return png[:12] + header + struct.pack(">I", zlib.crc32(header)) + png[33:]


def sixteen_bits(generator: Generator) -> bytes:
    return encoded(Image.fromarray(generator.integers(0, 65536, (30, 40), dtype=np.uint16)))


def floats(low: float, high: float) -> Callable[[Generator], bytes]:
    def make(generator: Generator) -> bytes:
        values = generator.uniform(low, high, (30, 40)).astype(np.float32)
        return encoded(Image.fromarray(values), "TIFF")

    return make


def transparent_palette(generator: Generator) -> bytes:
    return encoded(picture(generator).convert("P"), transparency=int(generator.integers(256)))


def rotated(generator: Generator) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = int(generator.integers(2, 9))  # the orientation
    return encoded(picture(generator), "JPEG", exif=exif)


def with_broken_exif(generator: Generator) -> bytes:
    return encoded(picture(generator), "JPEG", exif=b"Exif\0\0" + generator.bytes(40))


def long(low: int, high: int) -> Callable[[Generator], bytes]:
    """An image whose one side is `low` to `high` times the other."""

    def make(generator: Generator) -> bytes:
        size = [2, 2 * int(generator.integers(low, high + 1))]
        return encoded(picture(generator, tuple(generator.permutation(size).tolist())))

    return make


def noise_after(start: bytes) -> Callable[[Generator], bytes]:
    return lambda generator: start + generator.bytes(300)


# For each kind the ending of its name, what makes it, and whether it is usable.
KINDS: dict[str, tuple[str, Callable[[Generator], bytes], bool]] = {
    "photo": ("jpg", converted("RGB", "JPEG"), True),
    "png": ("png", converted("RGB"), True),
    "webp": ("webp", converted("RGB", "WEBP"), True),
    "black and white": ("png", converted("1"), True),
    "greyscale": ("png", converted("L"), True),
    "palette": ("png", converted("P"), True),
    "palette with transparency": ("png", transparent_palette, True),
    "transparent": ("png", converted("RGBA"), True),
    "cmyk": ("jpg", converted("CMYK", "JPEG"), True),
    "16 bits": ("png", sixteen_bits, True),
    "float tiff": ("tif", floats(0, 1), True),
    "turned by exif": ("jpg", rotated, True),
    "broken exif": ("jpg", with_broken_exif, True),
    "long": ("png", long(50, 64), True),
    "name that is not UTF-8": ("png", converted("RGB"), True),
    "wrong ending": ("jpg", converted("RGB"), True),
    "truncated jpeg": ("jpg", truncated("JPEG"), False),
    "truncated png": ("png", truncated("PNG"), False),
    "truncated tiff": ("tif", truncated("TIFF"), False),
    "huge header": ("png", claiming, False),
    "animated gif": ("gif", animated("GIF"), False),
    "animated webp": ("webp", animated("WEBP"), False),
    "animated png": ("png", animated("PNG"), False),
    "too long": ("png", long(65, 20_000), False),
    "one pixel": ("png", lambda generator: encoded(picture(generator, (1, 1))), False),
    "float tiff of unknown scale": ("tif", floats(-3000, 3000), False),
    "text": ("jpg", lambda generator: b"This is not an image. " * int(generator.integers(1, 99)), False),
    "empty": ("jpg", lambda generator: b"", False),
    "noise": ("jpg", noise_after(b""), False),
    "noise after a signature": ("png", noise_after(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"), False),
    "noise after a gif's header": ("gif", noise_after(b"GIF89a"), False),
}


def write_odd_files(folder: Path, number: int, seed: int) -> list[OddFile]:
    """Writes this many files, of all kinds in turn."""
    folder.mkdir()
    generator = np.random.default_rng(seed)
    kinds, files = list(KINDS), []
    for index in range(number):
        kind = kinds[index % len(kinds)]
        ending, make, is_usable = KINDS[kind]
        name = os.fsdecode(b"caf\xe9 \xff") if "not UTF-8" in kind else kind.replace(" ", "_")
        path = folder / f"{index:03d} {name}.{ending}"
        path.write_bytes(make(generator))
        files.append(OddFile(path, kind, is_usable))
    return files
