"""The peak memory of decoding and preparing the largest images that are allowed, each in a process of its own."""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from work import last_line, peak_bytes, run

from hpool_vit import HPoolViTImageProcessor
from hpool_vit.image_processing_hpool_vit import MAX_ASPECT_RATIO, decode_image


LIMIT = Image.MAX_IMAGE_PIXELS
LONGEST_JPEG = 65_500
# For each pixel. `docs/reliability.md` promises less: other versions of the packages may need a little more.
MOST_BYTES_PER_PIXEL = 20


def of_mode(mode: str, color: Any, file_format: str, **options) -> Callable[[tuple[int, int], Path], None]:
    return lambda size, path: Image.new(mode, size, color).save(path, file_format, **options)


def sixteen_bits(size: tuple[int, int], path: Path):
    Image.fromarray(np.full(size[::-1], 40_000, np.uint16)).save(path, "PNG", compress_level=1)


def floats(size: tuple[int, int], path: Path):
    Image.fromarray(np.full(size[::-1], 0.5, np.float32)).save(path, "TIFF")


def integers(size: tuple[int, int], path: Path):
    Image.fromarray(np.full(size[::-1], 60_000, np.int32)).save(path, "TIFF")


def rotated(size: tuple[int, int], path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", size, "red").save(path, "JPEG", exif=exif)


CASES: dict[str, Callable[[tuple[int, int], Path], None]] = {
    "JPEG": of_mode("RGB", "red", "JPEG"),
    "JPEG, turned by EXIF": rotated,
    "JPEG, CMYK": of_mode("CMYK", (9, 99, 9, 9), "JPEG"),
    "PNG, palette with transparency": of_mode("P", 3, "PNG", transparency=3, compress_level=1),
    "PNG, transparent": of_mode("RGBA", (9, 99, 9, 99), "PNG", compress_level=1),
    "PNG, 16 bits": sixteen_bits,
    "TIFF, 32-bit integers": integers,
    "TIFF, floating point": floats,
}


# As long as allowed, too: the kinds that took most and least.
LONG = ("JPEG", "TIFF, floating point")
# With `--short`: the usual one, and the one that takes most.
SHORT = ("JPEG", "PNG, transparent")


def measure_memory(folder: Path, short: bool) -> dict[str, Any]:
    """
    Returns:
        For each kind of file the peak memory above that of the packages, in bytes; `lost` names the cases that take
        more than is promised.
    """
    pixels = LIMIT // 20 if short else LIMIT
    side, narrow = math.isqrt(pixels), min(math.isqrt(pixels // MAX_ASPECT_RATIO), LONGEST_JPEG // MAX_ASPECT_RATIO)
    results: dict[str, Any] = {"pixels": side * side, "lost": []}
    for name in SHORT if short else CASES:
        write = CASES[name]
        results[name] = {}
        shapes = {"square": (side, side), "long": (MAX_ASPECT_RATIO * narrow, narrow)}
        for shape in ("square", "long") if name in LONG else ("square",):
            size = shapes[shape]
            file = folder / "image"
            write(size, file)
            result = run([sys.executable, __file__, str(file)])
            file.unlink()
            if result.returncode:
                results["lost"].append(f"memory: {name}, {shape}: {last_line(result.stderr)}")
                continue
            results[name][shape] = json.loads(last_line(result.stdout))
            # What small images take too does not grow with the pixels.
            most = MOST_BYTES_PER_PIXEL * size[0] * size[1] + (64 << 20)
            if max(results[name][shape].values()) > most:
                results["lost"].append(f"memory: {name}, {shape}: {results[name][shape]}, more than {most}")
    return results


def measure(file: Path):
    """Prints the peak while this process decodes a file, and while it prepares the image for the model."""
    processor = HPoolViTImageProcessor()
    # Whatever is loaded on first use.
    processor(Image.new("RGB", (300, 300)), return_tensors="pt")
    before = peak_bytes("self")
    image = decode_image(str(file))
    decoded = peak_bytes("self") - before
    processor(image, return_tensors="pt")
    print(json.dumps({"decoded": decoded, "prepared": peak_bytes("self") - before}))


if __name__ == "__main__":
    measure(Path(sys.argv[1]))
