"""Which device computes."""

import torch


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
