"""The protocol of linear layers, and the plain form that every other form must agree with.

Shapes: T tokens of a batch, I inputs, O outputs.
"""

from typing import Protocol

import torch.nn.functional as F
from torch import Tensor


class Linear(Protocol):
    """A linear layer, which computes ``x W^T + b``."""

    @property
    def num_outputs(self) -> int:
        """Returns O."""

    @property
    def num_bytes(self) -> int:
        """Returns the memory that weight and bias take."""

    def __call__(self, x: Tensor) -> Tensor:
        """Computes [T, O] from ``x`` [T, I], in the same dtype."""


class PlainLinear:
    """A linear layer whose weight stays as in the checkpoint."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """Keeps ``weight`` [O, I] and ``bias`` [O] without a copy."""
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
