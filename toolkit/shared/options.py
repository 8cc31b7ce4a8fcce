"""Options of the command line that several commands have, in the same words."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .console import parse_value


def hvt_pool_option(default: str) -> Any:
    """The option `--hvt_pool` of a command. `default` says what happens without it."""
    return typer.Option(
        metavar="BLOCKS", help=f"The blocks at whose input to pool, such as 1,5,9, or none. Default: {default}."
    )


def image_size_option(default: str) -> Any:
    """The option `--image_size` of a command. `default` says what happens without it."""
    return typer.Option(metavar="PIXELS", help=f"224, or height and width: 224,384. Default: {default}.")


Model = Annotated[str, typer.Argument(metavar="MODEL", help="A trained model: a saved folder, or an id on the Hub.")]
OutputDir = Annotated[Path, typer.Option(help="The folder to write. It must not exist yet, or be empty.")]
HvtPool = Annotated[str | None, hvt_pool_option("the model's own")]
MergeRatio = Annotated[
    str | None,
    typer.Option(
        metavar="SHARES", help="The share of the tokens to merge: one for all stages, or one per stage: 0.3,0.2."
    ),
]
Speed = Annotated[
    float | None,
    typer.Option(metavar="NUMBER", help="A speed that `hpool-vit speed-up` found for the model; 1: no pooling."),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps, … Default: an accelerator if there is one.")]
DisableTqdm = Annotated[bool, typer.Option(help="Show no progress bar.")]
UnlabelledImages = Annotated[
    Path, typer.Option(metavar="FOLDER", help="Images like those that the model is for. They need no labels.")
]
ImageSize = Annotated[str | None, image_size_option("the model's own")]


def parse_image_size(text: str | None) -> tuple[int, int] | None:
    """Height and width from `320` or `224,384`. Raises a `ValueError` for any other text."""
    if text is None:
        return None
    value = parse_value("image_size", text)
    sides = value if isinstance(value, list) else [value]
    # `true` is no number of pixels, but an int in Python.
    if len(sides) not in (1, 2) or not all(type(side) is int and side > 0 for side in sides):
        raise ValueError(f"`image_size={text}` must be one number of pixels, or height and width: 224,384.")
    return sides[0], sides[-1]
