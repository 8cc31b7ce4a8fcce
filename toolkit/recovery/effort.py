"""How long a recovery goes on: a time, or epochs."""

import math
import re
from dataclasses import dataclass


SECONDS = {"s": 1, "m": 60, "h": 3600}


@dataclass(frozen=True)
class Effort:
    """
    A time or a number of epochs, of which one is None.

    Attributes:
        seconds: how long, with all that is computed on the way.
        epochs: how often each image is seen.
    """

    seconds: float | None = None
    epochs: float | None = None

    def share(self, seconds: float, epochs: float) -> float:
        """The share that is used up after `seconds` and `epochs`."""
        return seconds / self.seconds if self.seconds is not None else epochs / self.epochs


def read_effort(value: str | float, name: str = "recover") -> Effort:
    """
    The effort that a text such as `90s`, `20m`, `1.5h` or `10` says; a plain number is epochs.

    Args:
        value: the text, or a number.
        name: the argument that it was given as.

    Raises:
        ValueError: for anything else.
    """
    found = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*([smh]?)", str(value).strip().lower())
    number = float(found[1]) if found else 0.0
    if not 0 < number < math.inf:
        raise ValueError(
            f"`{name}={value}` must be a time above 0 such as 90s, 20m or 1h, or a number of epochs such as 10."
        )
    return Effort(seconds=number * SECONDS[found[2]]) if found[2] else Effort(epochs=number)
