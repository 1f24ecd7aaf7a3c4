"""Holds how fast devices were measured to be, and derives their shares of a model from it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSpeed:
    """The speed of a device, measured with the kernels and threads that serve.

    Devices that share memory are measured at the same time.

    Attributes:
        weight_bytes_per_s: bytes of weights that it reads in a second in products with few tokens, as decode has them.
        flops_per_s: floating-point operations in a second (a multiply and an add count as two) in products with many
            tokens, as prefill has them.
    """

    weight_bytes_per_s: float
    flops_per_s: float

    def __post_init__(self) -> None:
        assert all(0 < rate < math.inf for rate in (self.weight_bytes_per_s, self.flops_per_s)), self


@dataclass(frozen=True, slots=True, kw_only=True)
class NotMeasured:
    """The speed of a device is not known; ``cause`` is one line for the user."""

    cause: str


def shares_by_speed(speeds: Sequence[DeviceSpeed]) -> tuple[float, ...]:
    """Returns the shares of a model's weights, of any scale, with which all devices read theirs in the same time.

    The speed of reading weights decides, since most steps of an answer are decodes, which read all weights for a few
    tokens. The speed of computing would count where prompts are long and answers short.
    """
    return tuple(speed.weight_bytes_per_s for speed in speeds)
