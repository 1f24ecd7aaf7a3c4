"""A layer of a decoder as works of a :class:`kernels.cpu.layers.program.Program`: see :mod:`kernels.cpu.layers.fused`.

Shapes as there.
"""

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kernels.attention import LayerCache, Window
from kernels.cpu.layers import program
from kernels.cpu.layers.partial import SumWork
from kernels.cpu.layers.program import Program
from kernels.cpu.machine.columns_ir import WHOLE, Strip
from kernels.cpu.products.linear import Shared
from kernels.cpu.rows import rows

SPARE_ROWS = 32
"""Rows of a product beyond its tokens, at most: those of one tile."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """A layer whose products a team can share. A rank without heads, or columns, has neither product of these."""

    window: Window
    attention_norm: Tensor
    qkv: Shared | None
    qk_norm: Tensor | None
    output: Shared | None
    attention_post_norm: Tensor | None
    ffn_norm: Tensor
    gate_up: Shared | None
    down: Shared | None
    ffn_post_norm: Tensor | None

    @property
    def hidden_size(self) -> int:
        """E."""
        return self.attention_norm.shape[0]

    @property
    def attended_size(self) -> int:
        """H * D."""
        return 0 if self.output is None else self.output.num_inputs


class Turns(Protocol):
    """Cosine and signed sine of every token's angles, each [T, 1, D]."""

    @property
    def cos(self) -> Tensor: ...
    @property
    def sin(self) -> Tensor: ...


class Buffers:
    """Activations of at most ``num_tokens`` tokens; products write whole tiles, beyond the last token."""

    def __init__(self, layers: Sequence[Layer], head_dim: int, num_tokens: int, *, ladder: bool) -> None:
        """``later`` is the place for every other update of a ``ladder``."""
        self.num_tokens = num_tokens
        layer = layers[0]
        ffn_size = 0 if layer.down is None else layer.down.num_inputs
        self.residual = self._rows(layer.hidden_size)
        self.normed = self._rows(layer.hidden_size)
        self.update = self._rows(layer.hidden_size)
        self.later = self._rows(layer.hidden_size if ladder else 0)
        self.qkv = self._rows(0 if layer.qkv is None else layer.qkv.num_outputs)
        self.query = self._rows(layer.attended_size)
        self.attended = self._rows(layer.attended_size)
        self.gate_up = self._rows(2 * ffn_size)
        self.activated = self._rows(ffn_size)
        self.tiles = self._rows(max(layer.hidden_size, layer.attended_size, ffn_size))
        self.slots = torch.empty(num_tokens, dtype=torch.int64)
        windows = {layer.window for layer in layers}
        self.cos = {window: self._rows(head_dim) for window in windows}
        self.sin = {window: self._rows(head_dim) for window in windows}

    def from_row(self, first_row: int) -> "Buffers":
        """The same memory without its first rows: what is computed there does not touch those, nor their spare rows."""
        rest = copy(self)
        rest.num_tokens = self.num_tokens - first_row
        for name in (
            "residual",
            "normed",
            "update",
            "qkv",
            "query",
            "attended",
            "gate_up",
            "activated",
            "tiles",
            "slots",
        ):
            setattr(rest, name, getattr(self, name)[first_row:])
        rest.cos = {window: rows[first_row:] for window, rows in self.cos.items()}
        rest.sin = {window: rows[first_row:] for window, rows in self.sin.items()}
        return rest

    def fill(self, embedded: Tensor, slots: Tensor, turns: Mapping[Window, Turns]) -> None:
        """With the inputs of a step: as :meth:`kernels.cpu.layers.fused.FusedLayers.run` has them."""
        num_tokens = len(embedded)
        self.residual[:num_tokens] = embedded
        self.slots[:num_tokens] = slots
        for window, turn in turns.items():
            self.cos[window][:num_tokens] = turn.cos[:, 0]
            self.sin[window][:num_tokens] = turn.sin[:, 0]

    def total(self, num_tokens: int, *, ladder: bool) -> Tensor:
        """The residual and the updates that are still to be added to it: [T, E]."""
        total = self.residual[:num_tokens] + self.update[:num_tokens]
        return total + self.later[:num_tokens] if ladder else total

    def _rows(self, width: int) -> Tensor:
        return torch.empty(self.num_tokens + SPARE_ROWS, width, dtype=torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Writer:
    """Appends a layer's works to a program."""

    program: Program
    buffers: Buffers
    num_tokens: int
    num_threads: int
    head_dim: int
    eps: float

    def norm(self, weight: Tensor, update: Tensor, *, adds: bool) -> None:
        """Residual to normed; before, the update to the residual."""
        buffers = self.buffers
        fields = rows.norm_fields(update, buffers.residual, weight, buffers.normed, self.eps)
        self._each_row(rows.norm_name(weight, adds=adds), weight.shape[0], fields)

    def norm_update(self, weight: Tensor | None) -> None:
        """The update in place, where the layer has such a norm."""
        if weight is not None:
            update = self.buffers.update
            fields = rows.norm_fields(update, update, weight, update, self.eps)
            self._each_row(rows.norm_name(weight, adds=False), weight.shape[0], fields)

    def activate(self, activation: str) -> None:
        """Gate and up to activated."""
        gate_up, output = self.buffers.gate_up, self.buffers.activated
        fields = rows.gated_fields(gate_up, output)
        self._each_row(rows.gated_name(activation), gate_up.shape[1], fields)

    def product(self, linear: Shared, x: Tensor, output: Tensor) -> None:
        """``x`` times the weight."""
        self._multiply(linear, self._tiles(linear, x), output, WHOLE)

    def summed_product(self, linear: Shared | None, x: Tensor, output: Tensor, sum_work: SumWork | None) -> None:
        """The same, zeros without a weight, which is a part of a sum over ranks; and that sum, where something sums
        within the program.

        While one strip of it is on its way, the next is computed (FastAttention's tiling all-reduce, by columns, so
        that the weight is read once).
        """
        update = output[: self.num_tokens]
        count = 1 if sum_work is None else sum_work.num_strips(update)
        tiles = 0 if linear is None else self._tiles(linear, x)
        if linear is None:
            self.program.add(*program.work("zeros_work", self.program.ticket(), update.data_ptr(), update.nbytes))
        for number in range(count):
            strip = Strip(number, count)
            if linear is not None:
                self._multiply(linear, tiles, output, strip)
            if sum_work is not None:
                self.program.add(sum_work.function, sum_work.job(update, self.program.ticket(), strip))

    def _tiles(self, linear: Shared, x: Tensor) -> int:
        """Address of ``x`` in tiles, which it is laid out in where several tokens are not one already."""
        num_tiles, num_rows = linear.tiles(self.num_tokens)
        assert num_tiles * num_rows <= self.num_tokens + SPARE_ROWS, (num_tiles, num_rows, self.num_tokens)
        if num_rows == 1:
            return x.data_ptr()
        lay_out = program.tiles(
            x.data_ptr(),
            self.buffers.tiles.data_ptr(),
            num_tokens=self.num_tokens,
            num_pairs=linear.num_inputs // 2,
            shape=(num_tiles, num_rows),
            num_threads=self.num_threads,
            ticket=self.program.ticket(),
        )
        self.program.add(*lay_out)
        return self.buffers.tiles.data_ptr()

    def _multiply(self, linear: Shared, tiles: int, output: Tensor, strip: Strip) -> None:
        """Tiles at an address times a strip of the weight."""
        ticket = self.program.ticket()
        self.program.add(*linear.product(self.num_tokens, self.num_threads, tiles, output.data_ptr(), ticket, strip))

    def turn(self, layer: Layer, cache: LayerCache) -> None:
        """Queries, keys and values to where attention reads them."""
        buffers, num_kv_heads = self.buffers, cache.keys.shape[0]
        num_heads = layer.attended_size // self.head_dim
        assert layer.qkv is not None and layer.qkv.num_outputs == (num_heads + 2 * num_kv_heads) * self.head_dim, layer
        tensors = (buffers.qkv, buffers.cos[layer.window], buffers.sin[layer.window], buffers.slots, buffers.query)
        pointers = (x.data_ptr() for x in tensors)
        strides = (x.stride(0) * x.itemsize for x in tensors)
        weight = layer.qk_norm
        name = "turn_wide_work" if weight is not None and weight.dtype == torch.float32 else "turn_work"
        norm = (0 if weight is None else weight.data_ptr(), rows.float_bits(self.eps))
        scalars = (num_heads, num_kv_heads, self.head_dim, cache.keys.data_ptr(), cache.values.data_ptr())
        unit = -(-self.num_tokens // (4 * self.num_threads))
        job = (self.program.ticket(), self.num_tokens, unit, *pointers, *strides, *scalars)
        self.program.add(*program.work(name, *job, cache.keys.shape[1], *norm))

    def _each_row(self, name: str, width: int, fields: tuple[int, ...]) -> None:
        ticket = self.program.ticket()
        size = self.num_tokens * width
        self.program.add(*rows.each_row(name, self.num_tokens, size, self.num_threads, ticket, fields))
