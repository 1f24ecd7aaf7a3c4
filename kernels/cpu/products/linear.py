"""Linear layers on CPUs, each with its weight in the form that this CPU multiplies fastest.

Shapes: T tokens of a batch, I inputs, O outputs.
"""

from typing import Protocol

import torch
from torch import Tensor

from kernels.cpu.machine.columns_ir import WHOLE, ColumnTile
from kernels.cpu.machine.threads import Operation
from kernels.cpu.products import matmul, quantized
from kernels.linear import Linear, PlainLinear
from kernels.rounded import Bits, RoundedLinear, RoundedWeight


class ProgramLinear(Protocol):
    """A linear layer that can be an operation of a :class:`kernels.cpu.layers.program.Program`."""

    @property
    def num_outputs(self) -> int:
        """Returns O."""

    @property
    def num_inputs(self) -> int:
        """Returns I."""

    def tiles(self, num_tokens: int) -> tuple[int, int]:
        """Returns the number of tiles and the rows of each, in which its input lies as ``[tiles, I / 2, rows, 2]``."""

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


class ColumnLinear(_PackedColumns):
    """A weight in columns, multiplied by :mod:`kernels.cpu.products.matmul`; a row has the same bits in any batch."""

    _weight: matmul.PackedWeight

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """Copies ``weight`` [O, I] and ``bias`` [O], and holds on to neither."""
        self._weight = matmul.PackedWeight(weight, bias)

    def __call__(self, x: Tensor) -> Tensor:
        return matmul.multiply(x, self._weight)

    def tiles(self, num_tokens: int) -> tuple[int, int]:
        """Implements :class:`ProgramLinear`."""
        return matmul.tile_shape(num_tokens)[:2]

    def product(
        self, num_tokens: int, num_threads: int, tiles: int, output: int, ticket: int, column_tile: ColumnTile = WHOLE
    ) -> Operation:
        """Implements :class:`ProgramLinear`."""
        return matmul.product(self._weight, num_tokens, num_threads, tiles, output, ticket, column_tile)


class PackedLinear:
    """A weight that oneDNN reorders into blocks once, instead of at each call.

    For CPUs that :mod:`kernels.cpu.products.matmul` has no code for. The operators are private to torch, so
    :func:`pack` checks whether they are there.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """Copies ``weight`` [O, I] and does not hold on to it; keeps ``bias`` [O]."""
        self._num_outputs = weight.shape[0]
        self._bias = bias
        self._num_bytes = weight.nbytes + (0 if bias is None else bias.nbytes)
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, _PACKED_FOR_TOKENS)

    @property
    def num_outputs(self) -> int:
        return self._num_outputs

    @property
    def num_bytes(self) -> int:
        return self._num_bytes

    def __call__(self, x: Tensor) -> Tensor:
        result: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
        return result


# The number of tokens that oneDNN chooses its blocks for; 16 was the best, or nearly so, from 1 to 2048 tokens.
_PACKED_FOR_TOKENS = 16


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

    def tiles(self, num_tokens: int) -> tuple[int, int]:
        """Implements :class:`ProgramLinear`."""
        return quantized.tile_shape(num_tokens, self._weight.bits)[:2]

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


def why_slow(bits: Bits, dtype: torch.dtype) -> str | None:
    """Says why rounded weights are slower here than plain ones in bfloat16; None where they are not."""
    missing = quantized.missing_features(bits)
    if missing:
        return f"this CPU lacks {' and '.join(missing)}"
    return None if dtype == torch.bfloat16 else f"only bfloat16, and not {str(dtype).removeprefix('torch.')}, is fast"


def pack(weight: Tensor, bias: Tensor | None) -> Linear:
    """Returns the fastest form of a weight on this CPU.

    A float32 weight stays plain. A bfloat16 weight is packed by this package, or else by torch, where one of them can.
    """
    if _has_columns(weight):
        return ColumnLinear(weight, bias)
    return PackedLinear(weight, bias) if _can_pack(weight) else PlainLinear(weight, bias)


def _has_columns(weight: Tensor) -> bool:
    return weight.dtype == torch.bfloat16 and weight.shape[1] % 2 == 0 and matmul.is_supported()


def _can_pack(weight: Tensor) -> bool:
    has_operators = all(hasattr(torch.ops.mkldnn, name) for name in ("_reorder_linear_weight", "_linear_pointwise"))
    return has_operators and weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
