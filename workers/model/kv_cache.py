"""The KV cache of a rank: allocated once, before the first request, and never grown."""

from dataclasses import dataclass

import torch

from kernels.attention import LayerCache
from placement.errors import NotEnoughMemory
from placement.model.part import Span
from placement.model.specs import ModelSpec
from workers.host.device import Device


@dataclass(frozen=True, slots=True, kw_only=True)
class KVCache:
    """Keys and values of the layers a rank holds, first layer first. Each tensor is [K, S, D]."""

    layers: tuple[LayerCache, ...]


def allocate_kv_cache(
    model: ModelSpec,
    *,
    num_slots: int,
    dtype: torch.dtype,
    device: Device,
    layers: Span | None = None,
    kv_heads: Span | None = None,
) -> KVCache:
    """A zeroed cache of ``num_slots`` for the given layers and KV heads, or all.

    Raises:
        NotEnoughMemory: the device has less memory left than the cache needs.
    """
    num_layers = model.num_layers if layers is None else len(layers)
    num_kv_heads = model.num_kv_heads if kv_heads is None else len(kv_heads)
    shape = (num_kv_heads, num_slots, model.head_dim)
    needed_bytes = 2 * num_layers * num_kv_heads * num_slots * model.head_dim * dtype.itemsize
    available_bytes = device.available_memory_bytes
    if needed_bytes > available_bytes:
        problem = f"needs {needed_bytes} bytes of KV, and {device.name} has {available_bytes} left"
        raise NotEnoughMemory(field="num_blocks", value=num_slots, problem=problem, fix="Use fewer KV blocks.")
    return KVCache(
        layers=tuple(
            LayerCache(
                keys=torch.zeros(shape, dtype=dtype, device=device.torch_device),
                values=torch.zeros(shape, dtype=dtype, device=device.torch_device),
            )
            for _ in range(num_layers)
        )
    )


def kv_cache_bytes(cache: KVCache) -> int:
    """Bytes that the cache occupies."""
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
