"""Measure multiply-accumulates, speed and memory of models side by side, and print tables."""

import re
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


class Logits(nn.Module):
    """
    A classifier whose output is one tensor, the logits: what exporters and comparisons expect.

    Args:
        model: a model whose output is a tensor, or an object with `logits`.
        options: keywords of the model's forward pass, such as `interpolate_pos_encoding`.
    """

    def __init__(self, model: nn.Module, **options: Any):
        super().__init__()
        self.model = model
        self.options = options

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        outputs = self.model(pixel_values, **self.options)
        return outputs if isinstance(outputs, torch.Tensor) else outputs.logits


# The counter follows gradients through the modules, and fails at a parameter that is a module's input without them.
@torch.enable_grad()
def count_macs(model: nn.Module, image: torch.Tensor) -> int:
    """The multiply-accumulates of a model for `image`, a batch of one."""
    return count_call_macs(partial(model, image))


def count_call_macs(call: Callable[[], Any]) -> int:
    """
    The multiply-accumulates of `call`, which may include a backward pass: half of the operations that
    `FlopCounterMode` counts, with attention as plain matrix products.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() // 2


@torch.inference_mode()
def measure_speed(models: list[nn.Module], images: torch.Tensor, rounds: int) -> list[float]:
    """Images per second of each model, as `time_in_turns` measures them."""
    return time_in_turns([partial(model, images) for model in models], len(images), rounds)


def time_in_turns(calls: list[Callable[[], Any]], num_images: int, rounds: int) -> list[float]:
    """
    Images per second of each call. The calls take turns, after one warm-up each, so that a busy machine slows down all
    of them alike.

    Args:
        calls: what to time.
        num_images: how many images each call processes.
        rounds: how many turns each call gets; the median counts.
    """
    for call in calls:
        call()
    rates = [[] for _ in calls]
    for _ in range(rounds):
        for rate, call in zip(rates, calls, strict=True):
            start = time.perf_counter()
            call()
            rate.append(num_images / (time.perf_counter() - start))
    return list(map(statistics.median, rates))


def timer(device: str | torch.device) -> float:
    """The time in seconds, read after the device has finished its work."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def resident_bytes(field: str) -> int | None:
    """The memory of this process: `VmRSS` is what it has now, `VmHWM` the most it has had. None except on Linux."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    return int(re.search(rf"{field}:\s+(\d+)", status)[1]) * 1024


def quartiles(values: list[float], digits: int = 4) -> list[float]:
    """Lower quartile, median and upper quartile, to `digits` significant digits."""
    return [float(f"{value:.{digits}g}") for value in np.percentile(values, (25, 50, 75))]


def format_table(header: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
