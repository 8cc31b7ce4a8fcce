"""Runs a program with Accelerate's FSDP in CPU processes, where Accelerate would otherwise skip it.

torchrun … fsdp_on_cpu.py [-m MODULE | PROGRAM] ARGUMENTS
"""

import os
import runpy
import sys

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType


def main():
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    torch.distributed.init_process_group("gloo")
    # The result on a machine with GPUs, where Accelerate does not skip FSDP.
    PartialState._prepare_backend = lambda self, *args: ("gloo", DistributedType.MULTI_GPU)
    is_module = sys.argv[1] == "-m"
    sys.argv = sys.argv[2 if is_module else 1 :]
    run = runpy.run_module if is_module else runpy.run_path
    try:
        run(sys.argv[0], run_name="__main__")
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
