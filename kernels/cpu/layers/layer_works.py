"""A decoder's layer as operations of a :class:`kernels.cpu.layers.program.Program`.

Shapes are those of :mod:`kernels.cpu.layers.fused`.
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
from kernels.cpu.machine.columns_ir import WHOLE, ColumnTile
from kernels.cpu.products.linear import ProgramLinear
from kernels.cpu.products.tiling import MOST_ROWS, Layout
from kernels.cpu.rows import rows

SPARE_ROWS = MOST_ROWS
"""The most rows that a product writes beyond its tokens: those of one tile."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """The weights of a layer that a program can run.

    A rank without heads has neither ``qkv`` nor ``output``; one without columns has neither ``gate_up`` nor ``down``.
    """

    window: Window
    attention_norm: Tensor
    qkv: ProgramLinear | None
    qk_norm: Tensor | None
    output: ProgramLinear | None
    attention_post_norm: Tensor | None
    ffn_norm: Tensor
    gate_up: ProgramLinear | None
    down: ProgramLinear | None
    ffn_post_norm: Tensor | None

    @property
    def hidden_size(self) -> int:
        """Returns E."""
        return self.attention_norm.shape[0]

    @property
    def linears(self) -> tuple[ProgramLinear, ...]:
        """Returns the linear layers that it has."""
        linears = (self.qkv, self.output, self.gate_up, self.down)
        return tuple(linear for linear in linears if linear is not None)

    @property
    def attended_size(self) -> int:
        """Returns H * D."""
        return 0 if self.output is None else self.output.num_inputs


class RopeTables(Protocol):
    """The cosine and signed sine of every token's rotary angles, each [T, 1, D]."""

    @property
    def cos(self) -> Tensor: ...
    @property
    def sin(self) -> Tensor: ...


# The bfloat16 numbers that each number of a product's input takes in tiles; none where rows are read as they lie.
_HALVES = {Layout.ROWS: 0, Layout.PAIRS: 1, Layout.FLOATS: 2}


class Buffers:
    """Memory for the activations of at most ``num_tokens`` tokens, and for the spare rows that products write."""

    def __init__(self, layers: Sequence[Layer], head_dim: int, num_tokens: int, *, ladder: bool) -> None:
        """Allocates the memory. ``later`` holds every second update of a ``ladder``, and is empty else."""
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
        halves = max((_HALVES[linear.layout] for layer in layers for linear in layer.linears), default=0)
        self.tiles = self._rows(halves * max(layer.hidden_size, layer.attended_size, ffn_size))
        self.slots = torch.empty(num_tokens, dtype=torch.int64)
        windows = {layer.window for layer in layers}
        self.cos = {window: self._rows(head_dim) for window in windows}
        self.sin = {window: self._rows(head_dim) for window in windows}

    def from_row(self, first_row: int) -> "Buffers":
        """Returns the same memory without its first rows, which a computation in the rest does not touch."""
        rest = copy(self)
        rest.num_tokens = self.num_tokens - first_row
        for name in _ROW_BUFFERS:
            setattr(rest, name, getattr(self, name)[first_row:])
        rest.cos = {window: rows[first_row:] for window, rows in self.cos.items()}
        rest.sin = {window: rows[first_row:] for window, rows in self.sin.items()}
        return rest

    def fill(self, embedded: Tensor, slots: Tensor, rope: Mapping[Window, RopeTables]) -> None:
        """Copies the inputs of a step into the buffers: those of :meth:`kernels.cpu.layers.fused.FusedLayers.run`."""
        num_tokens = len(embedded)
        self.residual[:num_tokens] = embedded
        self.slots[:num_tokens] = slots
        for window, tables in rope.items():
            self.cos[window][:num_tokens] = tables.cos[:, 0]
            self.sin[window][:num_tokens] = tables.sin[:, 0]

    def total(self, num_tokens: int, *, ladder: bool) -> Tensor:
        """Returns the residual plus the updates that are still to be added to it: [T, E]."""
        total = self.residual[:num_tokens] + self.update[:num_tokens]
        return total + self.later[:num_tokens] if ladder else total

    def _rows(self, width: int) -> Tensor:
        return torch.empty(self.num_tokens + SPARE_ROWS, width, dtype=torch.bfloat16)


_ROW_BUFFERS = (
    *("residual", "normed", "update", "qkv", "query", "attended"),
    *("gate_up", "activated", "tiles", "slots"),
)
# ``later`` is not among them: a ladder's steps are never split.


@dataclass(frozen=True, slots=True)
class Writer:
    """Appends the operations of a layer to a program.

    Attributes:
        program: the program that is written.
        buffers: the memory that the operations read and write.
        num_tokens: T.
        num_threads: how many threads run the program.
        head_dim: D.
        eps: the constant that every norm adds to the mean square.
    """

    program: Program
    buffers: Buffers
    num_tokens: int
    num_threads: int
    head_dim: int
    eps: float

    def norm(self, weight: Tensor, update: Tensor, *, adds: bool) -> None:
        """Norms the residual into ``normed``; with ``adds``, adds the update to the residual before that."""
        buffers = self.buffers
        fields = rows.norm_fields(update, buffers.residual, weight, buffers.normed, self.eps)
        self._each_row(rows.norm_name(weight, adds=adds), weight.shape[0], fields)

    def norm_update(self, weight: Tensor | None) -> None:
        """Norms the update in place, where the layer has such a norm."""
        if weight is not None:
            update = self.buffers.update
            fields = rows.norm_fields(update, update, weight, update, self.eps)
            self._each_row(rows.norm_name(weight, adds=False), weight.shape[0], fields)

    def activate(self, activation: str) -> None:
        """Applies the gated activation to ``gate_up``, into ``activated``."""
        gate_up, output = self.buffers.gate_up, self.buffers.activated
        fields = rows.gated_fields(gate_up, output)
        self._each_row(rows.gated_name(activation), gate_up.shape[1], fields)

    def product(self, linear: ProgramLinear, x: Tensor, output: Tensor) -> None:
        """Multiplies ``x`` by the weight."""
        self._multiply(linear, self._tiles(linear, x), output, WHOLE)

    def reduced_product(
        self, linear: ProgramLinear | None, x: Tensor, output: Tensor, sum_work: SumWork | None
    ) -> None:
        """Multiplies ``x`` by the weight, and all-reduces the result where ``sum_work`` does that in the program.

        A rank without this weight contributes zeros. While one column tile is all-reduced, the next is computed (the
        tiling all-reduce of FastAttention, here by columns, so that the weight is read once).
        """
        update = output[: self.num_tokens]
        count = 1 if sum_work is None else sum_work.num_column_tiles(update)
        tiles = 0 if linear is None else self._tiles(linear, x)
        if linear is None:
            self.program.add(*program.operation("fill_zeros", self.program.ticket(), update.data_ptr(), update.nbytes))
        for number in range(count):
            column_tile = ColumnTile(number, count)
            if linear is not None:
                self._multiply(linear, tiles, output, column_tile)
            if sum_work is not None:
                self.program.add(sum_work.function, sum_work.arguments(update, self.program.ticket(), column_tile))

    def _tiles(self, linear: ProgramLinear, x: Tensor) -> int:
        """Returns the address of ``x`` in tiles, which are packed where they interleave several tokens."""
        num_tiles, num_rows = linear.tiles(self.num_tokens)
        assert num_tiles * num_rows <= self.num_tokens + SPARE_ROWS, (num_tiles, num_rows, self.num_tokens)
        if num_rows == 1 or linear.layout is Layout.ROWS:
            return x.data_ptr()
        packing = program.pack_tiles(
            x.data_ptr(),
            self.buffers.tiles.data_ptr(),
            num_tokens=self.num_tokens,
            num_pairs=linear.num_inputs // 2,
            shape=(num_tiles, num_rows),
            num_threads=self.num_threads,
            ticket=self.program.ticket(),
            widens=linear.layout is Layout.FLOATS,
        )
        self.program.add(*packing)
        return self.buffers.tiles.data_ptr()

    def _multiply(self, linear: ProgramLinear, tiles: int, output: Tensor, column_tile: ColumnTile) -> None:
        """Multiplies the tiles at an address by the weight's columns of one column tile."""
        addresses = tiles, output.data_ptr(), self.program.ticket()
        self.program.add(*linear.product(self.num_tokens, self.num_threads, *addresses, column_tile))

    def rotate(self, layer: Layer, cache: LayerCache) -> None:
        """Applies the rotary embedding to queries and keys, and stores keys and values in the cache."""
        buffers, num_kv_heads = self.buffers, cache.keys.shape[0]
        num_heads = layer.attended_size // self.head_dim
        assert layer.qkv is not None and layer.qkv.num_outputs == (num_heads + 2 * num_kv_heads) * self.head_dim, layer
        tensors = (buffers.qkv, buffers.cos[layer.window], buffers.sin[layer.window], buffers.slots, buffers.query)
        pointers = (x.data_ptr() for x in tensors)
        strides = (x.stride(0) * x.itemsize for x in tensors)
        weight = layer.qk_norm
        name = "rotate_wide_rows" if weight is not None and weight.dtype == torch.float32 else "rotate_rows"
        norm = (0 if weight is None else weight.data_ptr(), rows.float_bits(self.eps))
        scalars = (num_heads, num_kv_heads, self.head_dim, cache.keys.data_ptr(), cache.values.data_ptr())
        unit = -(-self.num_tokens // (4 * self.num_threads))
        arguments = (self.program.ticket(), self.num_tokens, unit, *pointers, *strides, *scalars)
        self.program.add(*program.operation(name, *arguments, cache.keys.shape[1], *norm))

    def _each_row(self, name: str, width: int, fields: tuple[int, ...]) -> None:
        ticket = self.program.ticket()
        size = self.num_tokens * width
        self.program.add(*rows.each_row(name, self.num_tokens, size, self.num_threads, ticket, fields))
