"""Linear layers on CPUs, each with its weight in the form that this CPU multiplies fastest.

Shapes: T tokens of a batch, I inputs, O outputs.
"""

from typing import Protocol

import torch
from torch import Tensor

from kernels.cpu.machine.columns_ir import WHOLE, ColumnTile
from kernels.cpu.machine.threads import Operation
from kernels.cpu.products import matmul, quantized
from kernels.cpu.products.tiling import Layout
from kernels.linear import Linear, PlainLinear
from kernels.rounded import RoundedLinear, RoundedWeight


class ProgramLinear(Protocol):
    """A linear layer that can be an operation of a :class:`kernels.cpu.layers.program.Program`."""

    @property
    def num_outputs(self) -> int:
        """Returns O."""

    @property
    def num_inputs(self) -> int:
        """Returns I."""

    @property
    def layout(self) -> Layout:
        """Returns how its input lies in memory, where tiles have several rows."""

    def tiles(self, num_tokens: int) -> tuple[int, int]:
        """Returns the number of tiles and the rows of each, in which its input lies."""

    def product(
        self, num_tokens: int, num_threads: int, tiles: int, output: int, ticket: int, column_tile: ColumnTile = WHOLE
    ) -> Operation:
        """Makes the operation of the product.

        Args:
            num_tokens: T.
            num_threads: how many threads share it.
            tiles: the address of the input.
            output: the address of ``[tiles * rows, O]`` numbers.
            ticket: the address of a zero.
            column_tile: the part of the output that is computed; it lies where it does in the whole.
        """


class _PackedColumns:
    """The sizes of a linear layer whose weight is packed in columns."""

    _weight: matmul.PackedWeight | quantized.PackedWeight

    @property
    def num_outputs(self) -> int:
        """Returns O."""
        return self._weight.num_outputs

    @property
    def num_bytes(self) -> int:
        """Returns the memory that weight and bias take."""
        return self._weight.num_bytes

    @property
    def num_inputs(self) -> int:
        """Returns I."""
        return self._weight.num_inputs

    @property
    def layout(self) -> Layout:
        """Implements :class:`ProgramLinear`."""
        return self._weight.layout

    def tiles(self, num_tokens: int) -> tuple[int, int]:
        """Implements :class:`ProgramLinear`."""
        return self._weight.tile_shape(num_tokens)[:2]


class ColumnLinear(_PackedColumns):
    """A weight in columns, multiplied by :mod:`kernels.cpu.products.matmul`; a row has the same bits in any batch."""

    _weight: matmul.PackedWeight

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """Copies ``weight`` [O, I] and ``bias`` [O], and holds on to neither."""
        self._weight = matmul.PackedWeight(weight, bias)

    def __call__(self, x: Tensor) -> Tensor:
        return matmul.multiply(x, self._weight)

    def product(
        self, num_tokens: int, num_threads: int, tiles: int, output: int, ticket: int, column_tile: ColumnTile = WHOLE
    ) -> Operation:
        """Implements :class:`ProgramLinear`."""
        return matmul.product(self._weight, num_tokens, num_threads, tiles, output, ticket, column_tile)


class RoundedColumnLinear(_PackedColumns):
    """A rounded weight in columns, multiplied by :mod:`kernels.cpu.products.quantized`.

    A row has the same bits in any batch.
    """

    _weight: quantized.PackedWeight

    def __init__(self, weight: RoundedWeight, bias: Tensor | None) -> None:
        """Copies ``weight`` [O, I] and ``bias`` [O], and holds on to neither."""
        self._weight = quantized.PackedWeight(weight, bias)

    @property
    def is_plain(self) -> bool:
        """Tells whether inputs are multiplied as they are: neither reordered, nor summed by groups first."""
        return self._weight.order is None and not self._weight.has_offsets

    def __call__(self, x: Tensor) -> Tensor:
        return quantized.multiply(x, self._weight)

    def product(
        self, num_tokens: int, num_threads: int, tiles: int, output: int, ticket: int, column_tile: ColumnTile = WHOLE
    ) -> Operation:
        """Implements :class:`ProgramLinear`, where the weight ``is_plain``."""
        return quantized.product(self._weight, num_tokens, num_threads, tiles, tiles, output, ticket, column_tile)


def program_linear(linear: Linear) -> ProgramLinear | None:
    """Returns the layer as one that a program can run; None where no program can."""
    if isinstance(linear, ColumnLinear) or (isinstance(linear, RoundedColumnLinear) and linear.is_plain):
        return linear
    return None


def pack_rounded(weight: RoundedWeight, bias: Tensor | None, dtype: torch.dtype) -> Linear:
    """Returns the fastest form of a rounded weight for inputs of ``dtype``."""
    if dtype == torch.bfloat16 and quantized.is_supported(weight):
        return RoundedColumnLinear(weight, bias)
    return RoundedLinear(weight, bias)


def why_slow(dtype: torch.dtype) -> str | None:
    """Says why rounded weights are slower here than plain ones in bfloat16; None where they are not."""
    return None if dtype == torch.bfloat16 else f"only bfloat16, and not {str(dtype).removeprefix('torch.')}, is fast"


def pack(weight: Tensor, bias: Tensor | None) -> Linear:
    """Returns the fastest form of a weight: in columns where it is bfloat16, else plain."""
    has_columns = weight.dtype == torch.bfloat16 and weight.shape[1] % 2 == 0
    return ColumnLinear(weight, bias) if has_columns else PlainLinear(weight, bias)
