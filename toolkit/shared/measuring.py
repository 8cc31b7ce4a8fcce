"""Multiply-accumulates, speeds and memory of models side by side, and tables. Shared by the measuring programs."""

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


@torch.inference_mode()
def count_macs(model: nn.Module, image: torch.Tensor) -> int:
    """Multiply-accumulates for one image: half of what FlopCounterMode counts, attention in plain products."""
    return count_call_macs(partial(model, image))


def count_call_macs(call: Callable[[], Any]) -> int:
    """Multiply-accumulates of whatever `call` computes, a backward pass too."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() // 2


@torch.inference_mode()
def measure_speed(models: list[nn.Module], images: torch.Tensor, rounds: int) -> list[float]:
    return time_in_turns([partial(model, images) for model in models], len(images), rounds)


def time_in_turns(calls: list[Callable[[], Any]], num_images: int, rounds: int) -> list[float]:
    """Images per second of each call: the median over rounds in which all take turns."""
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
    """Seconds of a clock, read when the device has done all that it was given."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def resident_bytes(field: str) -> int | None:
    """`VmRSS`, the memory that this process has now, or `VmHWM`, the most it has had; None but on Linux."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    return int(re.search(rf"{field}:\s+(\d+)", status)[1]) * 1024


def quartiles(values: list[float], digits: int = 4) -> list[float]:
    """Lower quartile, median and upper quartile, to `digits` significant digits."""
    return [float(f"{value:.{digits}g}") for value in np.percentile(values, (25, 50, 75))]


def format_table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
