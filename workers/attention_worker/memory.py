"""What an attention worker holds for a model rank: keys and values, block tables, and the names of blocks."""

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kernels.attention import LayerCache
from kernels.cpu.machine.pages import map_zeros
from placement.serving.offload.deltas import BadDelta, apply, copies
from placement.serving.offload.orders import Geometry, StepOrder
from workers.attention_worker.rows import DTYPES
from workers.transport.errors import BadFrame


def kv_bytes_of(geometry: Geometry) -> int:
    """Counts the bytes of a session's keys and values."""
    slots = geometry.num_blocks * geometry.width
    return 2 * geometry.num_layers * geometry.num_kv_heads * slots * geometry.head_dim * geometry.itemsize


def allocate(geometry: Geometry, device: torch.device) -> tuple[LayerCache, ...]:
    """Sets a session's memory aside; on a CPU only what is written takes any. Raises MemoryError, RuntimeError."""
    shape = (geometry.num_kv_heads, geometry.num_blocks * geometry.width, geometry.head_dim)
    dtype = DTYPES[geometry.itemsize]

    def zeros() -> Tensor:
        if device.type != "cpu":
            return torch.zeros(shape, dtype=dtype, device=device)
        return map_zeros(math.prod(shape) * dtype.itemsize).view(dtype).view(shape)

    return tuple(LayerCache(keys=zeros(), values=zeros()) for _ in range(geometry.num_layers))


@dataclass(slots=True, kw_only=True, eq=False)
class HeldMemory:
    """What is held for a model rank; it outlives the connection. One session's thread uses it at a time.

    Attributes:
        names: the hash of each named block, and the number of the order in which it was told.
        last_complete: the number of the last order that was carried out, with all before it.
        used_s: when a session last used it, on the clock of :func:`time.monotonic`.
    """

    geometry: Geometry
    device: torch.device
    layers: tuple[LayerCache, ...]
    tables: dict[int, tuple[int, ...]] = field(default_factory=dict)
    names: dict[int, tuple[bytes, int]] = field(default_factory=dict)
    last_complete: int = -1
    used_s: float = field(default_factory=time.monotonic)
    _complete: set[int] = field(default_factory=set)
    _copies: dict[int, list[tuple[int, Tensor, Tensor]]] = field(default_factory=dict)

    def begin(self, order: StepOrder, number: int) -> None:
        """Applies what an order says of tables and names. Raises BadFrame where it does not fit."""
        try:
            pairs = copies(self.tables, order.tables)
            self.tables = apply(self.tables, order.tables, num_blocks=self.geometry.num_blocks)
        except BadDelta as error:
            raise BadFrame(f"an order does not fit: {error}") from error
        if pairs:
            source, target = (self._slots(block for block in side) for side in zip(*pairs, strict=True))
            for layer in range(self.geometry.num_layers):
                self._copies.setdefault(layer, []).append((number, source, target))
        for block in order.forgotten:
            self.names.pop(block, None)
        for block, text_hash in order.names:
            self.names[block] = text_hash, number

    def copy(self, layer: int, number: int) -> None:
        """Copies blocks within a layer, as the orders up to ``number`` say.

        It is done when the layer's turn comes: what the orders before store there must be there first.
        """
        pending = self._copies.get(layer)
        if not pending:
            return
        cache = self.layers[layer]
        while pending and pending[0][0] <= number:
            _, source, target = pending.pop(0)
            for tensor in (cache.keys, cache.values):
                tensor.index_copy_(1, target, tensor.index_select(1, source))

    def complete(self, number: int) -> None:
        """Notes that an order is carried out in all layers."""
        self._complete.add(number)
        while self.last_complete + 1 in self._complete:
            self.last_complete += 1
            self._complete.remove(self.last_complete)

    def take_over(self) -> None:
        """Keeps keys, values and names for a new session, which begins without tables.

        A name that was told while the orders before it were under way is dropped: what it names is not all there.
        """
        for layer in range(self.geometry.num_layers):
            self.copy(layer, 1 << 62)
        self.tables = {}
        self.names = {
            block: (text_hash, number)
            for block, (text_hash, number) in self.names.items()
            if number <= self.last_complete + 1
        }
        self._complete.clear()

    def _slots(self, blocks: Iterable[int]) -> Tensor:
        width = self.geometry.width
        first = torch.tensor(list(blocks), dtype=torch.int64) * width
        return (first[:, None] + torch.arange(width)).flatten().to(self.device)
