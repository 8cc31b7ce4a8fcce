"""What a search has tried, in a file that grows line by line, so that a killed search goes on where it stopped."""

import json
import shutil
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..shared.console import one_line
from .schedules import Schedule


@dataclass(frozen=True)
class Trial:
    """
    A schedule on some of the images.

    Attributes:
        schedule: blocks, and how many tokens merge there.
        piece: which images, as the number of a piece of them.
        losses: the loss of each.
        agrees: how many answers are the same; None without a head.
        seconds: what it took.
    """

    schedule: Schedule
    piece: int
    losses: tuple[float, ...]
    agrees: int | None
    seconds: float

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "Trial":
        schedule, losses = tuple(map(tuple, content["schedule"])), tuple(content["losses"])
        return cls(**{**content, "schedule": schedule, "losses": losses})


class TrialLog:
    """
    The trials by schedule and piece, in a file of JSON lines. The first line says what they were made with. A file
    made with anything else is replaced, and so is a half-written last line.

    Args:
        path: the file.
        made_with: what decides the results: model, images, settings.

    Raises:
        OSError: if the file cannot be written.
    """

    def __init__(self, path: Path, made_with: dict[str, Any]):
        self.path = path
        self.trials: dict[tuple[Schedule, int], Trial] = {}
        lines = self.read(made_with)
        self.num_resumed = len(self.trials)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            path.write_text("".join(f"{line}\n" for line in [json.dumps(made_with), *lines]), encoding="utf-8")
        except OSError as error:
            raise self.not_written(error) from error

    def read(self, made_with: dict[str, Any]) -> list[str]:
        """Takes over the trials of an earlier search, and returns their lines."""
        try:
            first, *lines = self.path.read_text(encoding="utf-8").splitlines() or [""]
        except (OSError, UnicodeDecodeError):
            return []
        if first != json.dumps(made_with):
            return []
        kept = []
        for line in lines:
            try:
                trial = Trial.from_dict(json.loads(line))
            except (ValueError, TypeError, KeyError):  # the line during which the search was killed
                break
            self.trials[trial.schedule, trial.piece] = trial
            kept.append(line)
        return kept

    def add(self, trial: Trial) -> None:
        self.trials[trial.schedule, trial.piece] = trial
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(vars(trial)) + "\n")
        except OSError as error:
            raise self.not_written(error) from error

    def not_written(self, error: OSError) -> OSError:
        return OSError(
            f"{self.path} cannot be written: {error.strerror or one_line(error)}. Run the same command again when it "
            "can: the search goes on where it stopped."
        )

    def remove(self) -> None:
        """Removes the folder of the file, with all that a search keeps there."""
        shutil.rmtree(self.path.parent)


def fingerprint(model: nn.Module) -> int:
    """A number that differs for other weights."""
    number = 0
    for name, tensor in sorted(model.state_dict().items()):
        number = zlib.crc32(tensor.detach().cpu().contiguous().numpy().tobytes(), zlib.crc32(name.encode(), number))
    return number
