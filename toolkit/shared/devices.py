"""Which device computes, and how precisely it may."""

from contextlib import AbstractContextManager, nullcontext

import torch


# What CPUs call their bfloat16 units, in the words of `torch.cpu.get_capabilities`.
BFLOAT16_UNITS = ("avx512_bf16", "amx_bf16", "bf16")


def choose_device(name: str | None) -> torch.device:
    """
    The device that the user named. Without a name, an accelerator if there is one.

    Raises:
        ValueError: if it cannot be used.
    """
    if name is None:
        return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    # PyTorch without CUDA raises an AssertionError.
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"`device={name}` cannot be used: {str(error).splitlines()[0]}") from error
    return device


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device has units for bfloat16. On others it is emulated, which takes longer than float32."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    # Older releases of PyTorch do not tell what a CPU can do.
    if device.type != "cpu" or not hasattr(torch.cpu, "get_capabilities"):
        return False
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(unit) for unit in BFLOAT16_UNITS)


def mixed_precision(device: torch.device) -> AbstractContextManager:
    """A context in which products are computed in bfloat16, on devices that have units for it."""
    return torch.autocast(device.type, torch.bfloat16) if has_bfloat16(device) else nullcontext()
