"""Linear layers, each with its weight in the form that its device computes fastest from.

Shapes: T tokens of a batch, I inputs, O outputs.
"""

import importlib
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.cpu.machine.columns_ir import WHOLE, Strip
from kernels.cpu.products import matmul, quantized
from kernels.cpu.products.quantized import RoundedWeight
from kernels.cuda import gpus, quantized_tiles


class Linear(Protocol):
    """``x W^T + b``."""

    @property
    def num_outputs(self) -> int:
        """O."""

    @property
    def num_bytes(self) -> int:
        """Memory that the weight and the bias take."""

    def __call__(self, x: Tensor) -> Tensor:
        """``x`` [T, I] to [T, O], in the same dtype."""


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


class PlainLinear:
    """The weight as the checkpoint has it: what the other forms must agree with."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """Of ``weight`` [O, I] and ``bias`` [O]; holds on to both."""
        self._weight = weight
        self._bias = bias

    @property
    def num_outputs(self) -> int:
        return self._weight.shape[0]

    @property
    def num_bytes(self) -> int:
        return self._weight.nbytes + (0 if self._bias is None else self._bias.nbytes)

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self._weight, self._bias)


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


class RoundedLinear:
    """A rounded weight, of which parts are widened for each call: what the other form must agree with."""

    def __init__(self, weight: RoundedWeight, bias: Tensor | None) -> None:
        """Of ``weight`` [O, I] and ``bias`` [O]; holds on to both."""
        self._weight = weight
        self._bias = bias
        most = _WIDENED_AT_ONCE[weight.codes.device.type == "cuda"]
        self._rows_at_once = max(1, most // weight.num_inputs)

    @property
    def num_outputs(self) -> int:
        return self._weight.num_outputs

    @property
    def num_bytes(self) -> int:
        return self._weight.num_bytes + (0 if self._bias is None else self._bias.nbytes)

    def __call__(self, x: Tensor) -> Tensor:
        weight, step = self._weight, self._rows_at_once
        if weight.order is not None:
            x = x.index_select(1, weight.order)
        output = x.new_empty(len(x), weight.num_outputs)
        for start in range(0, weight.num_outputs, step):
            part = quantized.dequantize(weight.rows(start, start + step), x.dtype)
            bias = None if self._bias is None else self._bias[start : start + step]
            output[:, start : start + step] = F.linear(x, part, bias)
        return output


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


# Numbers of a rounded weight: a part that stays in a CPU's cache, or one that keeps a GPU busy.
_WIDENED_AT_ONCE = {False: 1 << 19, True: 1 << 24}


def pack_rounded(weight: RoundedWeight, bias: Tensor | None, dtype: torch.dtype) -> Linear:
    """The fastest form for inputs of ``dtype`` on the device where ``weight`` is."""
    on_cpu = weight.codes.device.type == "cpu"
    if on_cpu and dtype == torch.bfloat16 and quantized.is_supported(weight):
        return RoundedColumnLinear(weight, bias)
    if gpus.runs_triton(weight.codes.device) and quantized_tiles.takes(weight):
        # By name, because the module imports Triton, which machines without a GPU need not have.
        linear: Linear = importlib.import_module("kernels.cuda.quantized").TiledLinear(weight, bias)
        return linear
    return RoundedLinear(weight, bias)


def shared(linear: Linear) -> Shared | None:
    """The layer as it is shared by a team of threads, where it can be."""
    if isinstance(linear, ColumnLinear) or (isinstance(linear, RoundedColumnLinear) and linear.is_plain):
        return linear
    return None


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
