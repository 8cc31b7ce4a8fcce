"""Measure what a step takes besides time: memory, in a fresh process, and energy, if the machine reports it."""

import multiprocessing
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from models import Unavailable
from modes import Row, import_libraries, prepare

from hpool_vit.toolkit.shared.measuring import resident_bytes


MB = 1e6
# Loaded once, in the process of which the fresh ones are copies.
PRELOADED = [
    "torch.utils.flop_counter",
    "transformers.models.auto.modeling_auto",
    "transformers.models.vit.modeling_vit",
    "hpool_vit.modeling_hpool_vit",
    "timm",
]


def in_fresh_process(function: Callable, *args) -> Any:
    """
    Returns the result of `function(*args)` in a process that has computed nothing before.

    Raises:
        Unavailable: if `function` raises an error, or if the process is killed because it runs out of memory.
    """
    # Loading the libraries takes seconds: the fresh processes are copies of one that has, except on Windows.
    kind = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(kind)
    context.set_forkserver_preload(PRELOADED)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, function, args))
    process.start()
    sender.close()
    try:
        answer, reason = receiver.recv()
    except EOFError:
        process.join()
        killed = process.exitcode == -9
        reason = "out of memory: the process was killed" if killed else f"ended with status {process.exitcode}"
        raise Unavailable(reason) from None
    process.join()
    if reason:
        raise Unavailable(reason)
    return answer


def _answer(sender, function: Callable, args: tuple):
    try:
        answer = function(*args), None
    except Exception as error:
        answer = None, short_reason(error)
    sender.send(answer)
    sender.close()


def short_reason(error: BaseException, length: int = 160) -> str:
    """An error in one short line."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return "out of memory"
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
    reason = lines[0] if lines else ""
    if not isinstance(error, Unavailable):
        reason = f"{type(error).__name__}: {reason}"
    return reason if len(reason) <= length else reason[: length - 1] + "…"


def reset_peak():
    """Starts `VmHWM` anew."""
    with suppress(OSError):  # if that is not allowed, building the model counts too
        Path("/proc/self/clear_refs").write_text("5")


def step_memory(row: Row, scratch: Path) -> float | None:
    """
    The peak of resident memory during a step, in MB (10⁶ bytes), above what the process has with all libraries loaded:
    weights, activations, in training gradients and AdamW's moments, and the allocator's waste. Call it in a fresh
    process. None if the system does not report it.
    """
    torch.set_num_threads(row.threads)
    row.check()
    import_libraries(row.mode)
    before = resident_bytes("VmRSS")
    step = prepare(row, scratch)
    step.call()
    reset_peak()
    step.call()
    peak = resident_bytes("VmHWM")
    return None if peak is None or before is None else round((peak - before) / MB, 1)


class CudaMemory:
    """The peak that PyTorch's tensors of one row take on a CUDA device, above what others held when this was made."""

    def __init__(self, device: str):
        self.device = torch.device(device)
        self.before = torch.cuda.memory_allocated(self.device)

    def reset(self):
        """Starts the peak anew. Call this when the model is built and warm."""
        torch.cuda.reset_peak_memory_stats(self.device)

    def peak_mb(self) -> float:
        torch.cuda.synchronize(self.device)
        return round((torch.cuda.max_memory_allocated(self.device) - self.before) / MB, 1)


class RaplMeter:
    """
    The energy of the processor packages since this was made, from Linux's powercap (Intel and AMD). It counts
    everything that runs on the machine.

    Raises:
        Unavailable: if there is no such counter.
        OSError: if only root may read it.
    """

    source = "RAPL, processor packages, all processes"

    def __init__(self, root: Path = Path("/sys/class/powercap")):
        zones = sorted(zone for zone in root.glob("intel-rapl:*") if re.fullmatch(r"intel-rapl:\d+", zone.name))
        if not zones:
            raise Unavailable(f"{root} has no energy counter")
        self.zones = [(zone / "energy_uj", int((zone / "max_energy_range_uj").read_text())) for zone in zones]
        self.last = self.counters()
        self.total = 0

    def counters(self) -> list[int]:
        return [int(counter.read_text()) for counter, _ in self.zones]

    def joules(self) -> float:
        now = self.counters()
        for (_, span), before, after in zip(self.zones, self.last, now, strict=True):
            self.total += after - before if after >= before else after - before + span  # it wrapped around
        self.last = now
        return self.total / 1e6


class NvmlMeter:
    """The energy of a CUDA device since its driver was loaded."""

    source = "NVML, the GPU"

    def __init__(self, device: str):
        import pynvml

        pynvml.nvmlInit()
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        self.read = lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)

    def joules(self) -> float:
        return self.read() / 1e3


def open_energy_meter(device: str) -> tuple[RaplMeter | NvmlMeter | None, str]:
    """The meter of a device or None, and one line that says what it measures or why there is none."""
    try:
        meter = NvmlMeter(device) if torch.device(device).type == "cuda" else RaplMeter()
    except ImportError:
        return None, "not available: needs nvidia-ml-py (pip install nvidia-ml-py)"
    except Exception as error:  # NVML's errors have a base class of their own
        return None, f"not available: {short_reason(error)}"
    return meter, meter.source
