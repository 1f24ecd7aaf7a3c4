"""How fast devices were measured to be, and what that says of their shares."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSpeed:
    """What a device did, measured with the kernels and threads that serve, beside those that it shares memory with.

    Attributes:
        weight_bytes_per_s: bytes of weights that it reads in a second, in products with a few tokens, as in decode.
        flops_per_s: floating-point operations of a second, two for each multiply and add, in products with as many
            tokens as in prefill.
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
    """Shares of a model's weights, of any scale, with which all devices read theirs in the same time.

    By how fast they read weights: a decode step reads all of them for a few tokens, and most steps of an answer are
    decodes. How fast they compute would count where prompts are long and answers short.
    """
    return tuple(speed.weight_bytes_per_s for speed in speeds)
