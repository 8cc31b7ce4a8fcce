"""What the processes of a launcher agree on before they classify: their devices, and the list of files."""

from collections.abc import Iterable
from typing import Any

import torch

from ..shared.console import needs
from ..shared.devices import choose_device
from .inputs import list_inputs


with needs("predict"):
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list


def choose_processes(name: str | None) -> tuple[PartialState, torch.device]:
    """The processes, and the device of this one."""
    device = None if name is None else choose_device(name)
    on_cpu = device.type == "cpu" if device else not torch.accelerator.is_available()
    state = PartialState(cpu=on_cpu)
    # `cuda` without a number is another device in each process.
    one_each = device is None or device == torch.device(state.device.type)
    return state, state.device if one_each else device


def find_files(images: Iterable[str], state: PartialState) -> tuple[list[str], list[str]]:
    """The files in order, and notes. The first process finds them, because standard input can be read only once."""
    message: list[Any] = [[], [], None]
    if state.is_main_process:
        try:
            message[:2] = list_inputs(images)
        except (ValueError, OSError) as error:
            message[2] = str(error)
    if state.num_processes > 1:
        broadcast_object_list(message)
    files, notes, problem = message
    if problem:
        raise ValueError(problem)
    return files, notes
