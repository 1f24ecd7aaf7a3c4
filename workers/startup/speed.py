"""Measures how fast this rank's device is, by products such as decode and prefill have, with the kernels that serve.

The products read weights of :data:`_BYTES` again and again, so that no cache up to that size holds any of them. Ranks
that are measured together get ready first, wait for each other, and then measure for the same time. So ranks that share
a machine's memory are measured while they share it.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from kernels.linear import Linear
from kernels.rounded import RoundedWeight
from kernels.select import kernels_for, pack_rounded
from placement.errors import NotEnoughMemory
from placement.measured.speed import DeviceSpeed
from placement.model.quantization import GROUP_SIZES, Quantization
from placement.model.specs import DType
from placement.planning.memory import format_bytes
from workers.host.cores import claim_cores
from workers.host.device import TORCH_DTYPES, Device, use_device

# All weights, and one weight, which exists in two forms while it is packed.
_BYTES, _WEIGHT_BYTES = 224 * 2**20, 32 * 2**20
_NUM_INPUTS = 4096
_BITS = {Quantization.INT8: 8, Quantization.INT4: 4}
_DECODED, _PREFILLED = 4, 64  # tokens
_PREFILL_S, _DECODE_S = 0.2, 0.5
_LEAST_TURNS = 3
_GPU_TURNS = 8  # turns through all layers before the host waits for a GPU, which takes as long as a turn or two


@dataclass(frozen=True, slots=True, kw_only=True)
class Products:
    """The products to measure: the number type of the inputs, and how the weights are rounded."""

    dtype: DType
    quantization: Quantization = Quantization.NONE

    @property
    def weight_bits(self) -> int:
        """Returns the bits of a weight, without the scale of its group."""
        return _BITS.get(self.quantization, 8 * self.dtype.itemsize)

    @property
    def num_outputs(self) -> int:
        """Returns the outputs of each layer, whose weights take ``_WEIGHT_BYTES``."""
        return 8 * _WEIGHT_BYTES // (_NUM_INPUTS * self.weight_bits)


def measure_speed(device: Device, products: Products, *, meet: Callable[[], None]) -> DeviceSpeed:
    """Measures the device for 0.7 s, on a thread and cores such as steps have.

    Before that it compiles code and makes 224 MiB of weights, which it frees at the end.

    Args:
        meet: a function that is called once all is ready. It returns when the others are ready too, or raises to end.

    Raises:
        NotEnoughMemory: the device has not twice the memory that this takes.
    """
    needed = 2 * (_BYTES + _WEIGHT_BYTES)
    if device.available_memory_bytes < needed:
        raise NotEnoughMemory(
            field="memory of " + device.name,
            problem=f"is too little to measure its speed: {format_bytes(needed)} must be free, and "
            f"{format_bytes(max(device.available_memory_bytes, 0))} are",
            fix="Free memory, or write shares into serving.parallelism.",
        )
    on_cpu = device.torch_device.type == "cpu"
    claim = claim_cores(device.num_threads) if on_cpu else None
    begin = partial(use_device, device.torch_device) if claim is None else claim.pin
    try:
        with ThreadPoolExecutor(1, thread_name_prefix="speed", initializer=begin) as executor:
            return executor.submit(_measure, device.torch_device, products, meet).result()
    finally:
        if claim is not None:
            claim.release()  # the thread that executes steps takes them anew


@torch.inference_mode()
def _measure(device: torch.device, products: Products, meet: Callable[[], None]) -> DeviceSpeed:
    layers = _layers(device, products)
    dtype = TORCH_DTYPES[products.dtype]
    few, many = (torch.ones(count, _NUM_INPUTS, dtype=dtype, device=device) for count in (_DECODED, _PREFILLED))
    _seconds(layers, few, device)
    _seconds(layers[:1], many, device)
    meet()
    prefill_s = _median_s(layers[:1], many, device, _PREFILL_S)
    decode_s = _median_s(layers, few, device, _DECODE_S)
    num_bytes = sum(layer.num_bytes for layer in layers)
    if device.type == "cuda":
        del layers
        torch.cuda.empty_cache()
    return DeviceSpeed(
        weight_bytes_per_s=num_bytes / decode_s,
        flops_per_s=2 * _PREFILLED * products.num_outputs * _NUM_INPUTS / prefill_s,
    )


def _layers(device: torch.device, products: Products) -> list[Linear]:
    """Makes layers that have a weight of their own each, in the form that serves."""
    kernels, layers = kernels_for(device), []
    shape, dtype = (products.num_outputs, _NUM_INPUTS), TORCH_DTYPES[products.dtype]
    for _ in range(_BYTES // _WEIGHT_BYTES):
        if products.quantization is Quantization.NONE:
            weight = torch.full(shape, 1 / 64, dtype=dtype, device=device)
            layers.append(kernels.pack(weight, None))
        else:
            layers.append(pack_rounded(_rounded(products, device), None, dtype))
    return layers


def _rounded(products: Products, device: torch.device) -> RoundedWeight:
    """Makes a weight whose codes are all alike, since their values make no difference to the time."""
    num_bytes = _NUM_INPUTS * products.weight_bits // 8
    code = torch.int8 if products.quantization is Quantization.INT8 else torch.uint8
    codes = torch.full((products.num_outputs, num_bytes), 0x11, dtype=code, device=device)
    scales = torch.full((products.num_outputs, _NUM_INPUTS // GROUP_SIZES[0]), 1 / 64, device=device)
    return RoundedWeight(codes=codes, scales=scales)


def _median_s(layers: Sequence[Linear], x: Tensor, device: torch.device, duration_s: float) -> float:
    """Returns the median time of a turn through all layers, over ``duration_s`` or a few turns that take longer."""
    until_s = time.monotonic() + duration_s
    turns: list[float] = []
    while time.monotonic() < until_s or len(turns) < _LEAST_TURNS:
        turns.append(_seconds(layers, x, device))
    return statistics.median(turns)


def _seconds(layers: Sequence[Linear], x: Tensor, device: torch.device) -> float:
    """Returns the time of one turn through all layers."""
    on_gpu = device.type == "cuda"
    turns = _GPU_TURNS if on_gpu else 1
    started = time.perf_counter()
    for layer in (layer for _ in range(turns) for layer in layers):
        layer(x)
    if on_gpu:
        torch.cuda.synchronize(device)
    return (time.perf_counter() - started) / turns
