"""One model for several speeds: each training step draws a pooling schedule, and evaluation visits all of them."""

import random
from collections.abc import Iterator

from hpool_vit import HPoolViTForImageClassification
from hpool_vit.configuration_hpool_vit import Schedule

from ..shared.console import schedule_name


class ScheduleSampler:
    """
    Args:
        model: the model whose schedule changes. It has stages for all `choices`.
        choices: the schedules to draw from, with equal probability. None: the model keeps its own.
        seed: seed of the draws. All processes draw the same schedules, and so does a resumed run.
    """

    def __init__(self, model: HPoolViTForImageClassification, choices: list[Schedule] | None, seed: int):
        self.model, self.choices, self.seed = model, choices or [], seed
        self.own: Schedule = model.config.hvt_pool

    def draw(self, step: int):
        """Sets the schedule of this step."""
        if self.choices:
            self.model.set_hvt_pool(random.Random(f"{self.seed} {step}").choice(self.choices))

    def restore(self):
        """Sets the model's own schedule again, with which it is evaluated and saved."""
        if self.choices:
            self.model.set_hvt_pool(self.own)

    def each(self) -> Iterator[str]:
        """Yields the name of each choice while the model has that schedule; at the end the model has its own again."""
        try:
            for schedule in self.choices:
                self.model.set_hvt_pool(schedule)
                yield schedule_name(schedule)
        finally:
            self.restore()
