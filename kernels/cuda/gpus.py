"""Queries a GPU before its kernels are chosen. Triton is not imported here."""

import importlib.util
from functools import cache

import torch


def runs_triton(device: torch.device) -> bool:
    """Tells whether the device is a GPU with bfloat16 instructions (Ampere and later), and Triton is installed."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


@cache
def num_multiprocessors(device: torch.device) -> int:
    """Returns the number of multiprocessors of a GPU; 1 for the interpreter, so that programs take several parts."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
