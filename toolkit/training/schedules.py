"""One model for several speeds: training draws a pooling schedule for every step, evaluation visits each of them."""

import random
from collections.abc import Iterator

from hpool_vit import HPoolViTForImageClassification


Schedule = list[int] | None


def schedule_name(schedule: Schedule) -> str:
    """A schedule as the flags write it: `1,5,9`, or `none`."""
    return ",".join(map(str, schedule or [])) or "none"


class ScheduleSampler:
    """
    Args:
        model: whose schedule changes; it has stages for all of `choices`.
        choices: the schedules to draw from, each as often as the others; None: the model keeps its own.
        seed: of the draws. All processes draw the same, and a resumed run what it would have drawn.
    """

    def __init__(self, model: HPoolViTForImageClassification, choices: list[Schedule] | None, seed: int):
        self.model, self.choices, self.seed = model, choices or [], seed
        self.own: Schedule = model.config.hvt_pool

    def draw(self, step: int):
        """Gives the model the schedule of this step."""
        if self.choices:
            self.model.set_hvt_pool(random.Random(f"{self.seed} {step}").choice(self.choices))

    def restore(self):
        """Gives the model its own schedule again, with which it is evaluated and saved."""
        if self.choices:
            self.model.set_hvt_pool(self.own)

    def each(self) -> Iterator[str]:
        """The names of the choices, the model having each in turn, and in the end its own again."""
        try:
            for schedule in self.choices:
                self.model.set_hvt_pool(schedule)
                yield schedule_name(schedule)
        finally:
            self.restore()
