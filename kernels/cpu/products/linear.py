"""Linear layers on CPUs, each with its weight in the form that this CPU computes fastest from.

Shapes: T tokens of a batch, I inputs, O outputs.
"""

from typing import Protocol

import torch
from torch import Tensor

from kernels.cpu.machine.columns_ir import WHOLE, Strip
from kernels.cpu.products import matmul, quantized
from kernels.linear import Linear, PlainLinear
from kernels.rounded import RoundedLinear, RoundedWeight


class Shared(Protocol):
    """A linear layer as one work of a :class:`kernels.cpu.layers.program.Program`, which a team of threads shares."""

    @property
    def num_outputs(self) -> int:
        """O."""

    @property
    def num_inputs(self) -> int:
        """I."""

    def tiles(self, num_tokens: int) -> tuple[int, int]:
        """How its input lies, ``[tiles, I / 2, rows, 2]``: tiles, and rows of each."""

    def product(
        self, num_tokens: int, num_threads: int, tiles: int, output: int, ticket: int, strip: Strip = WHOLE
    ) -> tuple[int, bytes]:
        """The work and its job, from the addresses of the input, of ``[tiles * rows, O]`` numbers, and of a zero.

        Of a ``strip`` of the output alone, which is a part of those numbers.
        """


class ColumnLinear:
    """The weight in columns, multiplied by :mod:`kernels.cpu.products.matmul`: the same bits in any batch."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """Of ``weight`` [O, I] and ``bias`` [O]; both are copied and not held on to."""
        self._weight = matmul.PackedWeight(weight, bias)

    @property
    def num_outputs(self) -> int:
        return self._weight.num_outputs

    @property
    def num_bytes(self) -> int:
        return self._weight.num_bytes

    @property
    def num_inputs(self) -> int:
        """I."""
        return self._weight.num_inputs

    def __call__(self, x: Tensor) -> Tensor:
        return matmul.multiply(x, self._weight)

    def tiles(self, num_tokens: int) -> tuple[int, int]:
        """As :class:`Shared` says."""
        return matmul.tile_shape(num_tokens)[:2]

    def product(
        self, num_tokens: int, num_threads: int, tiles: int, output: int, ticket: int, strip: Strip = WHOLE
    ) -> tuple[int, bytes]:
        """As :class:`Shared` says."""
        return matmul.product(self._weight, num_tokens, num_threads, tiles, output, ticket, strip)


class PackedLinear:
    """The weight reordered once into blocks by oneDNN, which would else do it for each call.

    For CPUs that :mod:`kernels.cpu.products.matmul` has no code for. The operators are private to torch:
    :func:`pack` looks whether they are there.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """Of ``weight`` [O, I] and ``bias`` [O]; the weight is copied and not held on to."""
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


# What oneDNN's choice of blocks is tuned to; 16 was the best, or near it, from 1 to 2048 tokens.
_PACKED_FOR_TOKENS = 16


class RoundedColumnLinear:
    """A rounded weight in columns, multiplied by :mod:`kernels.cpu.products.quantized`: the same bits in any batch."""

    def __init__(self, weight: RoundedWeight, bias: Tensor | None) -> None:
        """Of ``weight`` [O, I] and ``bias`` [O]; both are copied and not held on to."""
        self._weight = quantized.PackedWeight(weight, bias)

    @property
    def num_outputs(self) -> int:
        return self._weight.num_outputs

    @property
    def num_bytes(self) -> int:
        return self._weight.num_bytes

    @property
    def num_inputs(self) -> int:
        """I."""
        return self._weight.num_inputs

    @property
    def is_plain(self) -> bool:
        """Whether its inputs are multiplied as they are: neither in another order, nor summed by groups first."""
        return self._weight.order is None and not self._weight.has_offsets

    def __call__(self, x: Tensor) -> Tensor:
        return quantized.multiply(x, self._weight)

    def tiles(self, num_tokens: int) -> tuple[int, int]:
        """As :class:`Shared` says."""
        return quantized.tile_shape(num_tokens, self._weight.bits)[:2]

    def product(
        self, num_tokens: int, num_threads: int, tiles: int, output: int, ticket: int, strip: Strip = WHOLE
    ) -> tuple[int, bytes]:
        """As :class:`Shared` says, of one that ``is_plain``."""
        return quantized.product(self._weight, num_tokens, num_threads, tiles, tiles, output, ticket, strip)


def shared(linear: Linear) -> Shared | None:
    """The layer as it is shared by a team of threads, where it can be."""
    if isinstance(linear, ColumnLinear) or (isinstance(linear, RoundedColumnLinear) and linear.is_plain):
        return linear
    return None


def pack_rounded(weight: RoundedWeight, bias: Tensor | None, dtype: torch.dtype) -> Linear:
    """The fastest form of a rounded weight for inputs of ``dtype``."""
    if dtype == torch.bfloat16 and quantized.is_supported(weight):
        return RoundedColumnLinear(weight, bias)
    return RoundedLinear(weight, bias)


def pack(weight: Tensor, bias: Tensor | None) -> Linear:
    """The fastest form for this CPU: float32 stays plain, bfloat16 is packed by us, else by torch, where one can."""
    if _has_columns(weight):
        return ColumnLinear(weight, bias)
    return PackedLinear(weight, bias) if _can_pack(weight) else PlainLinear(weight, bias)


def _has_columns(weight: Tensor) -> bool:
    return weight.dtype == torch.bfloat16 and weight.shape[1] % 2 == 0 and matmul.is_supported()


def _can_pack(weight: Tensor) -> bool:
    has_operators = all(hasattr(torch.ops.mkldnn, name) for name in ("_reorder_linear_weight", "_linear_pointwise"))
    return has_operators and weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
