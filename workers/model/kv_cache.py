"""Allocates the KV cache of a rank once, before the first request; it never grows.

On a CPU it is asked of the system, which gives a page, of zeros, when it is first written. So a large cache costs no
time at the start, and of the memory only what sequences have used. Its pages are huge ones where the system has them:
attention streams through them in half the time.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.attention import LayerCache
from kernels.cpu.machine.pages import map_zeros
from placement.errors import NotEnoughMemory
from placement.model.part import Span, kept_states
from placement.model.specs import ModelSpec
from workers.host.device import Device


@dataclass(frozen=True, slots=True, kw_only=True)
class KVCache:
    """The keys and values of the layers that a rank holds, first layer first. Each tensor is [K, S, D] for S slots."""

    layers: tuple[LayerCache, ...]


def allocate_kv_cache(
    model: ModelSpec,
    *,
    num_slots: int,
    dtype: torch.dtype,
    device: Device,
    layers: Span | None = None,
    kv_heads: Span | None = None,
    one_for_all: bool = False,
) -> KVCache:
    """Allocates a zeroed cache of ``num_slots`` for the given layers and KV heads, or for all.

    Args:
        one_for_all: whether all layers use the same memory, as nothing in it outlasts a layer.

    Raises:
        NotEnoughMemory: the device has less memory left than the cache needs.
    """
    states = kept_states(
        model,
        Span(0, model.num_layers) if layers is None else layers,
        Span(0, model.num_kv_heads) if kv_heads is None else kv_heads,
    )
    needed_bytes = (
        num_slots * dtype.itemsize * sum(it.elements_per_token for it in states[: 1 if one_for_all else None])
    )
    available_bytes = device.available_memory_bytes
    if needed_bytes > available_bytes:
        problem = f"needs {needed_bytes} bytes of KV, and {device.name} has {available_bytes} left"
        raise NotEnoughMemory(field="num_blocks", problem=problem, fix="Use fewer KV blocks.")
    shapes = [(state.num_kv_heads, num_slots, state.head_dim) for state in states]
    if one_for_all:
        return KVCache(layers=(_allocate(shapes[0], dtype, device.torch_device),) * len(shapes))
    return KVCache(layers=tuple(_allocate(shape, dtype, device.torch_device) for shape in shapes))


def _allocate(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> LayerCache:
    return LayerCache(keys=_zeros(shape, dtype, device), values=_zeros(shape, dtype, device))


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    num_bytes = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or not num_bytes:
        return torch.zeros(shape, dtype=dtype, device=device)
    return map_zeros(num_bytes).view(dtype).view(shape)


def kv_cache_bytes(cache: KVCache) -> int:
    """Counts the bytes that the cache occupies."""
    layers = {id(layer): layer for layer in cache.layers}  # all may be one
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in layers.values())
