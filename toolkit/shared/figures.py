"""Write figures to files."""

import os
import warnings
from pathlib import Path
from typing import IO, TYPE_CHECKING

from .files import written_whole


if TYPE_CHECKING:
    from matplotlib.figure import Figure


def save_figure(figure: "Figure", file: str | os.PathLike | IO[bytes], dpi: int = 130) -> None:
    """
    Writes a figure. A file appears when it is complete.

    Args:
        figure (`matplotlib.figure.Figure`): the figure.
        file (`str`, path or file object): where to write it. The ending of a path decides the format.
        dpi (`int`, defaults to 130): pixels per inch.
    """
    with warnings.catch_warnings():
        # Matplotlib's font lacks many scripts, whose letters become boxes.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        ending = Path(file).suffix if isinstance(file, str | os.PathLike) else ""
        if not ending:
            figure.savefig(file, dpi=dpi)
            return
        with written_whole(Path(file)) as part:
            figure.savefig(part, dpi=dpi, format=ending[1:])
