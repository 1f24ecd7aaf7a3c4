"""Selects the variant of the operations for a device, and the form of its rounded weights."""

import importlib

import torch
from torch import Tensor

from kernels import reference
from kernels.cpu import variant as cpu
from kernels.cpu.products import linear as cpu_linear
from kernels.cuda import gpus, quantized_tiles
from kernels.linear import Linear
from kernels.protocol import Kernels
from kernels.rounded import RoundedLinear, RoundedWeight


def kernels_for(device: torch.device | str) -> Kernels:
    """Returns the fastest variant for a torch device; devices without their own variant run the reference."""
    device = torch.device(device)
    if device.type == "cpu":
        return cpu
    if gpus.runs_triton(device):
        # Imported by name, because the module imports Triton, which machines without a GPU need not have.
        variant: Kernels = importlib.import_module("kernels.cuda.variant").open_kernels(device)
        return variant
    return reference


def pack_rounded(weight: RoundedWeight, bias: Tensor | None, dtype: torch.dtype) -> Linear:
    """Returns the fastest form of a rounded weight for inputs of ``dtype``, on the device of ``weight``."""
    device = weight.codes.device
    if gpus.runs_triton(device) and quantized_tiles.can_tile(weight):
        # Imported by name, because the module imports Triton, which machines without a GPU need not have.
        linear: Linear = importlib.import_module("kernels.cuda.quantized").TiledLinear(weight, bias)
        return linear
    if device.type == "cpu":
        return cpu_linear.pack_rounded(weight, bias, dtype)
    return RoundedLinear(weight, bias)


def why_rounded_is_slow(device: torch.device, dtype: torch.dtype) -> str | None:
    """Says why a device decodes more slowly with rounded weights than with plain ones; None where it does not.

    Without code of its own for them, a device widens them anew at every step.
    """
    if device.type == "cpu":
        return cpu_linear.why_slow(dtype)
    return None if gpus.runs_triton(device) else "this GPU runs no Triton"
