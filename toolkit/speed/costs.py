"""What an image costs under a schedule: multiply-accumulates, counted exactly, or seconds on this machine."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from hpool_vit import HPoolViTConfig

from ..inspection.stats import model_stats
from ..inspection.trace import block_macs
from ..shared.measuring import time_in_turns
from .schedules import Fitter, Schedule, schedule_fields


TIMING_ROUNDS = 5


class MacsCost:
    """
    Multiply-accumulates for one image, as [`model_stats`] counts them. Without pooling they are those of the model's
    source, which computes all tokens in its last block too.

    Args:
        config: the configuration of the model.
    """

    name = "macs"

    def __init__(self, config: HPoolViTConfig):
        self.config = config.with_schedule(None)
        self.num_patches = config.tokens_per_stage()[0]
        # The embeddings and the head, which no schedule changes.
        self.rest = model_stats(self.config)["macs"] - sum(block_macs(self.config))
        self.unpooled = self.rest + sum(block_macs(self.config, pooled_only=False))
        self.known: dict[Schedule, int] = {(): self.unpooled}

    def __call__(self, schedule: Schedule) -> int:
        if schedule not in self.known:
            config = self.config.with_schedule(**schedule_fields(schedule, self.num_patches))
            self.known[schedule] = self.rest + sum(block_macs(config))
        return self.known[schedule]


class TimeCost:
    """
    Seconds for one image on this machine: a sum of what the blocks compute, of what their stages do for each token and
    of what each stage takes anyway. A few schedules that are timed in turns tell how much each of them counts.

    Args:
        macs: the other cost of the same model.
        timed: pairs of a schedule and its seconds; without pooling comes first.
    """

    name = "time"

    def __init__(self, macs: MacsCost, timed: list[tuple[Schedule, float]]):
        self.macs = macs
        self.rates = non_negative_fit(
            np.array([self.parts(schedule) for schedule, _ in timed]), np.array([seconds for _, seconds in timed])
        )
        self.unpooled = self(())

    def parts(self, schedule: Schedule) -> list[float]:
        num_tokens, gathered = self.macs.num_patches, 0
        for _, merged in schedule:
            gathered += num_tokens
            num_tokens -= merged
        return [self.macs(schedule), gathered, len(schedule)]

    def __call__(self, schedule: Schedule) -> float:
        return float(np.dot(self.rates, self.parts(schedule)))

    @staticmethod
    def measure(model: nn.Module, pixel_values: torch.Tensor, macs: MacsCost) -> list[tuple[Schedule, float]]:
        """Times about ten schedules of the model with `pixel_values`, one batch: what `timed` takes."""
        schedules = calibration_schedules(macs.num_patches, model.config.num_hidden_layers)
        return list(zip(schedules, seconds_per_image(model, pixel_values, schedules), strict=True))


def calibration_schedules(num_patches: int, num_blocks: int) -> list[Schedule]:
    """Schedules of few and many blocks, early and late, that merge little and much."""
    fitter = Fitter(lambda schedule: 0, num_patches, num_blocks)
    middle, late = num_blocks // 2, num_blocks - 1
    chosen: list[Schedule] = [()]
    for blocks, tokens in (
        ([1], num_patches / 3), ([middle], num_patches / 2), ([late], 1), ([late], num_patches / 2),
        ([1, middle], num_patches / 4), ([middle, late], 1), (range(1, num_blocks, 2), num_patches / num_blocks),
        (range(num_blocks), 1), (range(num_blocks), num_patches / num_blocks / 1.5),
    ):  # fmt: skip
        parts = {block: 1.0 for block in blocks if block < num_blocks}
        if parts:
            chosen.append(fitter.scaled(parts, tokens))
    return list(dict.fromkeys(chosen))


def seconds_per_image(model: nn.Module, pixel_values: torch.Tensor, schedules: list[Schedule]) -> list[float]:
    """The median seconds per image of each schedule, timed in turns with one batch."""
    num_patches = model.config.tokens_per_stage()[0]
    calls: list[Callable[[], Any]] = []
    for schedule in schedules:
        calls.append(partial(run, model, schedule_fields(schedule, num_patches), pixel_values))
    with torch.inference_mode():
        rates = time_in_turns(calls, len(pixel_values), TIMING_ROUNDS)
    return [1 / rate for rate in rates]


def run(model: nn.Module, fields: dict[str, Any], pixel_values: torch.Tensor) -> None:
    model.change_schedule(**fields)
    # Without pooling, all tokens of the last block, as the model's source computes them.
    pooled = model.base_model(pixel_values, pooled_only=bool(fields["hvt_pool"])).pooler_output
    model.classifier(pooled).cpu()  # copying waits for an accelerator


def non_negative_fit(parts: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Least squares relative to `values`, without the columns whose factor would be negative."""
    used = list(range(parts.shape[1]))
    factors = np.zeros(parts.shape[1])
    while used:
        solution = np.linalg.lstsq(parts[:, used] / values[:, None], np.ones(len(values)), rcond=None)[0]
        if solution.min() >= 0:
            factors[used] = solution
            break
        used.pop(int(solution.argmin()))
    return factors
