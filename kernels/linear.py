"""Linear layers, each with its weight in the form that its device computes fastest from.

Shapes: T tokens of a batch, I inputs, O outputs.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


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


class PackedLinear:
    """The weight reordered once into blocks, as oneDNN would do for each call (see MKL's packed GEMM).

    Reads the weight at close to the memory's speed for a few tokens, where the plain layout reads at half of it.
    The operators are private to torch: :func:`pack` looks whether they are there.
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


def pack(weight: Tensor, bias: Tensor | None) -> Linear:
    """The fastest form for this CPU: packed where torch can and it pays, else plain."""
    return PackedLinear(weight, bias) if _can_pack(weight) else PlainLinear(weight, bias)


def _can_pack(weight: Tensor) -> bool:
    has_operators = all(hasattr(torch.ops.mkldnn, name) for name in ("_reorder_linear_weight", "_linear_pointwise"))
    return has_operators and weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
