"""The image files of the demo page: those that visitors send, and the examples that are offered to them."""

import math
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from ..data.digits import load_digits_dataset
from ..shared.images import BadImageError, DataError, decode_image


MAX_FILES = 16
MAX_FILE_MEGABYTES = 20
MAX_MEGAPIXELS = 50
MAX_EXAMPLES = 12
# A file and its thumbnail.
Example = tuple[str, Image.Image]
DIGIT_LABELS = [str(digit) for digit in range(10)]


def open_image(file: str | Path) -> Image.Image:
    """
    The image in a file, upright and in RGB.

    Raises:
        BadImageError: for a file that is gone, that is larger than `MAX_FILE_MEGABYTES`, or that `decode_image`
            refuses.
    """
    file = Path(file)
    try:
        megabytes = file.stat().st_size / 2**20
        if megabytes > MAX_FILE_MEGABYTES:
            raise BadImageError(f"too large: {megabytes:.0f} MB, and {MAX_FILE_MEGABYTES} MB are allowed")
        data = file.read_bytes()
    except OSError as error:
        raise BadImageError("no longer there: give it once more") from error
    image, _ = decode_image(data)
    return image


def read_images(files: list[str], messages: list[str]) -> Iterator[tuple[str, Image.Image]]:
    """Those that are images, one at a time in memory; about every other file, a line is added to `messages`."""
    if len(files) > MAX_FILES:
        messages.append(f"{len(files)} files were given: these are the first {MAX_FILES}.")
    for file in files[:MAX_FILES]:
        try:
            image = open_image(file)
        except BadImageError as error:
            messages.append(f"{Path(file).name} cannot be shown: {error}")
        else:
            yield file, image


def thumbnail(image: Image.Image, size: int = 384) -> Image.Image:
    """The image with its longer side at `size` pixels; that of a tiny one consists of squares."""
    scale = size / max(image.size)
    shape = [max(1, round(side * scale)) for side in image.size]
    return image.resize(shape, Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.NEAREST)


def find_examples(labels: list[str], examples_dir: Path | None, scratch: Path) -> list[Example]:
    """
    The files to offer with a model of these `labels`, with their thumbnails: handwritten digits, which are written to
    `scratch`, for their model, and for others images spread over `examples_dir` and its sub-folders.

    Raises:
        DataError: for a folder that does not exist, or without images.
    """
    if labels == DIGIT_LABELS:
        files = write_example_digits(scratch)
    elif examples_dir is None:
        return []
    elif not examples_dir.is_dir():
        raise DataError(f"`--examples_dir {examples_dir}` is no folder.")
    else:
        endings = Image.registered_extensions()
        files = sorted(file for file in examples_dir.rglob("*") if file.suffix.lower() in endings)
        files = files[:: max(1, math.ceil(len(files) / MAX_EXAMPLES))]
    examples = [(file, thumbnail(image, 160)) for file, image in read_images(list(map(str, files)), [])]
    if not examples:
        raise DataError(f"`--examples_dir {examples_dir}` holds no images.")
    return examples


def write_example_digits(folder: Path) -> list[Path]:
    """Writes one test image of each digit."""
    test = load_digits_dataset()["test"]
    files = [folder / f"{digit}.png" for digit in DIGIT_LABELS]
    for digit, file in enumerate(files):
        test[test["label"].index(digit)]["image"].save(file)
    return files
