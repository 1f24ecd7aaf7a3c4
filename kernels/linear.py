"""Linear layers: their protocol, and the plain form that every other must agree with.

Shapes: T tokens of a batch, I inputs, O outputs.
"""

from typing import Protocol

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
