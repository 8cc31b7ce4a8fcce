"""The image files of the demo page: uploads of visitors, and examples."""

import math
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from ..data.digits import load_digits_dataset
from ..shared.folders import list_images
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
        BadImageError: if the file no longer exists, is larger than `MAX_FILE_MEGABYTES`, or is refused by
            `decode_image`.
    """
    file = Path(file)
    try:
        megabytes = file.stat().st_size / 2**20
        if megabytes > MAX_FILE_MEGABYTES:
            raise BadImageError(f"too large: {megabytes:.0f} MB, but the limit is {MAX_FILE_MEGABYTES} MB")
        data = file.read_bytes()
    except OSError as error:
        raise BadImageError("no longer there: upload it again") from error
    image, _ = decode_image(data)
    return image


def read_images(files: list[str], messages: list[str]) -> Iterator[tuple[str, Image.Image]]:
    """Yields the images one by one. For each other file, adds a line to `messages`."""
    if len(files) > MAX_FILES:
        messages.append(f"You gave {len(files)} files. These are the first {MAX_FILES}.")
    for file in files[:MAX_FILES]:
        try:
            image = open_image(file)
        except BadImageError as error:
            messages.append(f"{Path(file).name} cannot be shown: {error}")
        else:
            yield file, image


def thumbnail(image: Image.Image, size: int = 384) -> Image.Image:
    """The image with its longer side at `size` pixels. The pixels of a tiny image become squares."""
    scale = size / max(image.size)
    shape = [max(1, round(side * scale)) for side in image.size]
    return image.resize(shape, Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.NEAREST)


def find_examples(labels: list[str], examples_dir: Path | None, scratch: Path) -> list[Example]:
    """
    The example files for a model with these `labels`, with their thumbnails. A model of handwritten digits gets
    digits, which are written to `scratch`. Other models get images from all over `examples_dir` and its sub-folders.

    Raises:
        DataError: if the folder does not exist or holds no images.
    """
    if labels == DIGIT_LABELS:
        try:
            files = write_example_digits(scratch)
        # The page does without examples if the packages that read the digits are not installed.
        except ImportError:
            return []
    elif examples_dir is None:
        return []
    elif not examples_dir.is_dir():
        raise DataError(f"`examples_dir={examples_dir}` is not a folder.")
    else:
        files = [Path(file) for file in list_images(examples_dir).files]
        files = files[:: max(1, math.ceil(len(files) / MAX_EXAMPLES))]
    examples = [(file, thumbnail(image, 160)) for file, image in read_images(list(map(str, files)), [])]
    if not examples:
        raise DataError(f"`examples_dir={examples_dir}` holds no images.")
    return examples


def write_example_digits(folder: Path) -> list[Path]:
    """Writes one test image of each digit."""
    test = load_digits_dataset()["test"]
    files = [folder / f"{digit}.png" for digit in DIGIT_LABELS]
    for digit, file in enumerate(files):
        test[test["label"].index(digit)]["image"].save(file)
    return files
