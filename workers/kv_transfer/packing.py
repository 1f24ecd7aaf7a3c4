"""Copies keys and values between a rank's cache and the bytes of a message."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.attention import LayerCache, Run
from placement.model.part import Part, Span
from placement.model.specs import DType
from placement.serving.kv.int8_layout import SCALE_BYTES, group_lengths
from placement.serving.kv.message_layout import MessageLayout, PackedTensor
from placement.serving.kv.peers import KvFormat
from placement.serving.kv.portions import PortionLayouts
from placement.serving.kv.runs import token_runs
from workers.host.device import TORCH_DTYPES
from workers.model.kv_cache import KVCache

_LARGEST_INT8 = 127


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerPlace:
    """Where the keys and values of one layer of a message lie, in a rank's cache and in bytes.

    Attributes:
        cache: the rank's cache of the layer.
        first_head: the model's number of the cache's first KV head.
        tensors: what the message has of the layer, with the runs of the rank's slots that it goes to or comes from.
        offset: the place of the layer's first byte in the message.
        head_dim: the numbers of a key, and of a value.
        dtype: the number type of the message.
        groups: for 8-bit integers, the tokens of a block of the source; None: the message has numbers of ``dtype``.
    """

    cache: LayerCache
    first_head: int
    tensors: tuple[tuple[PackedTensor, tuple[Run, ...]], ...]
    offset: int
    head_dim: int
    dtype: DType
    groups: int | None

    def pack(self, memory: Tensor) -> None:
        """Copies keys and values from the cache to ``memory``, bytes [N] that have the layer's whole message."""
        for tensor, runs in self.tensors:
            own, data = self._own(tensor), self._bytes(tensor, memory)
            shape = (len(tensor.kv_heads), tensor.num_tokens, self.head_dim)
            if self.groups is None:
                gather(own, runs, data.view(TORCH_DTYPES[self.dtype]).view(shape))
            else:
                numbers = torch.empty(shape)
                gather(own, runs, numbers)
                _quantize(numbers.numpy(), group_lengths(tensor.tokens, self.groups), data.numpy())

    def unpack(self, memory: Tensor) -> None:
        """Copies keys and values from ``memory`` to the cache, which converts them to its number type."""
        for tensor, runs in self.tensors:
            data = self._bytes(tensor, memory)
            shape = (len(tensor.kv_heads), tensor.num_tokens, self.head_dim)
            if self.groups is None:
                numbers = data.view(TORCH_DTYPES[self.dtype]).view(shape)
            else:
                numbers = _dequantize(data.numpy(), group_lengths(tensor.tokens, self.groups), shape)
            scatter(numbers, self._own(tensor), runs)

    def _own(self, tensor: PackedTensor) -> Tensor:
        heads = slice(tensor.kv_heads.start - self.first_head, tensor.kv_heads.stop - self.first_head)
        return (self.cache.values if tensor.is_value else self.cache.keys)[heads]

    def _bytes(self, tensor: PackedTensor, memory: Tensor) -> Tensor:
        start = tensor.offset - self.offset
        return memory[start : start + tensor.num_bytes]


@dataclass(kw_only=True)
class MessagePlaces:
    """Finds where the layers of one message lie in a rank's cache.

    Attributes:
        layout: the message.
        part: what the rank holds.
        runs: the slots of the sequence's tokens, of all ranks, in token order.
        layouts: the layouts that it comes from.
    """

    layout: MessageLayout
    part: Part
    cache: KVCache
    runs: Sequence[Run]
    layouts: PortionLayouts
    _own_runs: dict[tuple[Span, ...], tuple[Run, ...]] = field(default_factory=dict)

    def num_bytes(self, layer: int) -> int:
        """Counts the bytes of a layer of the model; it may be none."""
        return len(self.layout.layers.get(layer, Span(0, 0)))

    def of(self, layer: int) -> LayerPlace:
        """Returns the place of a layer of the model."""
        tensors = [tensor for tensor in self.layout.tensors if tensor.layer == layer]
        is_int8 = self.layouts.format is KvFormat.INT8
        return LayerPlace(
            cache=self.cache.layers[layer - self.part.layers.start],
            first_head=self.part.kv_heads.start,
            tensors=tuple((tensor, self._runs_of(tensor.tokens)) for tensor in tensors),
            offset=tensors[0].offset if tensors else 0,
            head_dim=self.layouts.head_dim,
            dtype=self.layouts.source.dtype,
            groups=self.layouts.source.block_size if is_int8 else None,
        )

    def _runs_of(self, tokens: tuple[Span, ...]) -> tuple[Run, ...]:
        if tokens not in self._own_runs:
            self._own_runs[tokens] = token_runs(self.runs, tokens, self.part.stripe)
        return self._own_runs[tokens]


def gather(cache: Tensor, runs: Sequence[Run], out: Tensor) -> None:
    """Copies runs of slots of ``cache`` [H, S, D], on any device, to ``out`` [H, T, D] in the host's memory."""
    if cache.device.type != "cpu":
        out.copy_(cache.index_select(1, slot_index(runs).to(cache.device)))
        return
    first = 0
    for start, stop in runs:
        out[:, first : first + stop - start].copy_(cache[:, start:stop])
        first += stop - start


def scatter(numbers: Tensor, cache: Tensor, runs: Sequence[Run]) -> None:
    """Copies ``numbers`` [H, T, D] in the host's memory to runs of slots of ``cache`` [H, S, D], on any device."""
    if cache.device.type != "cpu":
        cache.index_copy_(1, slot_index(runs).to(cache.device), numbers.to(cache.device, cache.dtype))
        return
    first = 0
    for start, stop in runs:
        cache[:, start:stop].copy_(numbers[:, first : first + stop - start])
        first += stop - start


def slot_index(runs: Sequence[Run]) -> Tensor:
    """Lists the slots of runs [T]."""
    return torch.cat([torch.arange(start, stop) for start, stop in runs])


def _quantize(numbers: NDArray[np.float32], lengths: Sequence[int], data: NDArray[np.uint8]) -> None:
    """Writes scales [H, G] and 8-bit integers [H, T, D] for ``numbers`` [H, T, D], which it changes, to ``data``."""
    starts = np.cumsum([0, *lengths[:-1]])
    largest = np.maximum.reduceat(np.maximum(numbers.max(axis=2), -numbers.min(axis=2)), starts, axis=1)
    scales = largest / np.float32(_LARGEST_INT8)
    split = scales.size * SCALE_BYTES
    data[:split] = scales.reshape(-1).view(np.uint8)
    with np.errstate(invalid="ignore"):  # numbers that are not finite stay so through their scale
        numbers /= np.repeat(np.where(scales == 0, np.float32(1), scales), lengths, axis=1)[..., None]
        np.rint(numbers, out=numbers)
        np.clip(numbers, -_LARGEST_INT8, _LARGEST_INT8, out=numbers)
        np.copyto(data[split:].view(np.int8).reshape(numbers.shape), numbers, casting="unsafe")


def _dequantize(data: NDArray[np.uint8], lengths: Sequence[int], shape: tuple[int, int, int]) -> Tensor:
    """Returns the numbers [H, T, D] that :func:`_quantize` wrote, in float32."""
    split = shape[0] * len(lengths) * SCALE_BYTES
    scales = np.frombuffer(data[:split].tobytes(), dtype=np.float32).reshape(shape[0], len(lengths))
    integers = data[split:].view(np.int8).reshape(shape)
    return torch.from_numpy(integers * np.repeat(scales, lengths, axis=1)[..., None])
