"""What is asked of a GPU before its kernels are chosen. Nothing of Triton is imported here."""

import importlib.util
from functools import cache

import torch


def runs_triton(device: torch.device) -> bool:
    """Whether the device is a GPU that multiplies bfloat16 by itself (Ampere and later), and Triton is here."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


@cache
def num_multiprocessors(device: torch.device) -> int:
    """Of a GPU; for the interpreter few, so that programs take several parts each."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
