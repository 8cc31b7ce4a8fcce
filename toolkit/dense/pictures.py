"""Masks in colour, and pictures of image, truth and answer side by side."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from hpool_vit.modeling_hpool_vit import IGNORED_LABEL

from ..shared.files import written_whole


MARGIN = 8


def palette(num_colours: int = 256) -> np.ndarray:
    """
    One colour per class, shape `(num_colours, 3)`: the bits of the number, dealt to red, green and blue from the
    highest bit of a channel down, as in PASCAL VOC. Pixels that do not count are white.
    """
    colours = np.zeros((num_colours, 3), dtype=np.uint8)
    for label in range(num_colours):
        for bit in range(8):
            channel, place = bit % 3, 7 - bit // 3
            # Class 0 is not black, which would look like nothing.
            colours[label, channel] |= ((label + 1) >> bit & 1) << place
    if num_colours > IGNORED_LABEL:
        colours[IGNORED_LABEL] = 255
    return colours


def coloured(mask: np.ndarray) -> Image.Image:
    """A mask of shape (height, width) as an image whose pixels are the numbers of the classes, shown in colours."""
    image = Image.fromarray(np.asarray(mask, dtype=np.uint8))
    image.putpalette(palette().tobytes())
    return image


def save_mask(mask: np.ndarray, path: Path) -> None:
    """Writes `coloured(mask)` as a PNG file, which appears when it is complete."""
    with written_whole(path) as part:
        coloured(mask).save(part, "PNG")


def overlay(image: Image.Image, mask: np.ndarray, opacity: float = 0.55) -> Image.Image:
    """The image with the colours of the mask over it."""
    return Image.blend(image.convert("RGB"), coloured(mask).convert("RGB").resize(image.size, 0), opacity)


def side_by_side(images: list[Image.Image], truths: list[np.ndarray], answers: list[np.ndarray]) -> Image.Image:
    """One row per image: the image, the truth and the answer; where the truth does not count, both are white."""
    width, height = images[0].size
    picture = Image.new("RGB", (3 * width + 4 * MARGIN, len(images) * (height + MARGIN) + 3 * MARGIN), "white")
    pen = ImageDraw.Draw(picture)
    for column, title in enumerate(("image", "truth", "answer")):
        pen.text((MARGIN + column * (width + MARGIN), MARGIN // 2), title, "black")
    for row, (image, truth, answer) in enumerate(zip(images, truths, answers, strict=True)):
        shown = np.where(truth == IGNORED_LABEL, IGNORED_LABEL, answer)
        panels = (image, coloured(truth), coloured(shown))
        for column, panel in enumerate(panels):
            place = (MARGIN + column * (width + MARGIN), 2 * MARGIN + row * (height + MARGIN))
            picture.paste(panel.convert("RGB").resize((width, height), 0), place)
    return picture
