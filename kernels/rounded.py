"""Weights that are rounded to 8 or 4 bits in groups of inputs, on any device (weight-only quantization).

An output's weights are ``code * scale`` in each group of inputs, or ``code * scale + offset``. Inputs and outputs of
a product keep their number type.

Shapes: T tokens of a batch, I inputs, O outputs, G groups of inputs, g inputs of a group.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Bits = Literal[4, 8]

# How many numbers are rounded at once, so that they stay in the cache.
_ROUNDED_AT_ONCE = 1 << 18
# The scales that are tried for 4 bits, relative to the one that maps the largest weight of the group to -8.
_CLIP_FACTORS = (1.1, 1.0, 0.92, 0.85)
# How many numbers are widened at once: as many as stay in a CPU's cache, or as keep a GPU busy.
_WIDENED_AT_ONCE = {False: 1 << 19, True: 1 << 24}


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundedWeight:
    """A weight [O, I], rounded in groups of inputs.

    Attributes:
        codes: the codes, int8 [O, I]; or uint8 [O, I / 2], where a byte holds two codes of 4 bits, from -8 to 7 and
            stored plus 8, the first in its low half.
        scales: the scales, float32 [O, G].
        offsets: the offsets, float32 [O, G]; None: all are 0.
        order: the input that each column of ``codes`` belongs to, int64 [I]; None: they are in order.
    """

    codes: Tensor
    scales: Tensor
    offsets: Tensor | None = None
    order: Tensor | None = None

    def __post_init__(self) -> None:
        assert self.codes.dtype in (torch.int8, torch.uint8), self.codes.dtype
        assert self.scales.dtype == torch.float32 and len(self.scales) == len(self.codes), self.scales.shape
        assert self.num_inputs % self.scales.shape[1] == 0, (self.num_inputs, self.scales.shape)
        assert self.offsets is None or self.offsets.shape == self.scales.shape, self.offsets

    @property
    def bits(self) -> Bits:
        """Returns the bits of a code."""
        return 8 if self.codes.dtype == torch.int8 else 4

    @property
    def num_outputs(self) -> int:
        """Returns O."""
        return self.codes.shape[0]

    @property
    def num_inputs(self) -> int:
        """Returns I."""
        return self.codes.shape[1] * (8 // self.bits)

    @property
    def group_size(self) -> int:
        """Returns g."""
        return self.num_inputs // self.scales.shape[1]

    @property
    def num_bytes(self) -> int:
        """Returns the memory that it takes."""
        return sum(x.nbytes for x in (self.codes, self.scales, self.offsets, self.order) if x is not None)

    def rows(self, start: int, stop: int) -> "RoundedWeight":
        """Returns the outputs from ``start`` to ``stop``, as views."""
        offsets = None if self.offsets is None else self.offsets[start:stop]
        return RoundedWeight(
            codes=self.codes[start:stop], scales=self.scales[start:stop], offsets=offsets, order=self.order
        )


def round_weight(weight: Tensor, *, bits: Bits, group_size: int) -> RoundedWeight:
    """Rounds a weight [O, I] to the nearest codes. I must be a multiple of ``group_size``, which must be even.

    Codes of 8 bits go from -127 to 127, and the largest weight of a group gets one of these. Codes of 4 bits go from -8
    to 7. For these, several scales are tried that clip the largest weights more or less; each is refitted to its codes
    by least squares, and a group gets the one with the smallest squared error.
    """
    num_outputs, num_inputs = weight.shape
    assert num_inputs % group_size == 0 and group_size % 2 == 0, (num_inputs, group_size)
    dtype = torch.int8 if bits == 8 else torch.uint8
    codes = torch.empty(num_outputs, num_inputs * bits // 8, dtype=dtype, device=weight.device)
    scales = torch.empty(num_outputs, num_inputs // group_size, device=weight.device)
    step = max(1, _ROUNDED_AT_ONCE // num_inputs) if weight.device.type == "cpu" else num_outputs
    round_groups = _round_to_8_bits if bits == 8 else _round_to_4_bits
    for start in range(0, num_outputs, step):
        rows = weight[start : start + step].float()
        rounded, scale = round_groups(rows.view(len(rows), -1, group_size))
        rounded = rounded.view(len(rows), num_inputs)
        codes[start : start + step] = rounded.to(torch.int8) if bits == 8 else pack_nibbles(rounded)
        scales[start : start + step] = scale
    return RoundedWeight(codes=codes, scales=scales)


def _round_to_8_bits(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the codes, as float, and the scales [rows, G] of ``groups`` [rows, G, g]."""
    scale = groups.abs().amax(-1) / 127
    return (groups * _inverse(scale)[..., None]).round_().clamp_(-127, 127), scale


def _round_to_4_bits(groups: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`_round_to_8_bits`. With w the weights, q their codes, the best scale is <w,q> / <q,q>.

    The squared error is then <w,w> - <w,q>^2 / <q,q>, so the codes with the largest <w,q>^2 / <q,q> are taken.
    """
    low, high = groups.aminmax(dim=-1)
    largest = torch.where(high > -low, high, low) / -8  # signed: the scale that takes it to -8
    best_gain, best_scale, best_inverse = (torch.zeros_like(largest) for _ in range(3))
    for factor in _CLIP_FACTORS:
        inverse = _inverse(largest * factor)
        codes = _nearest_nibbles(groups, inverse)
        agreement = torch.linalg.vecdot(groups, codes)
        scale = agreement * _inverse(torch.linalg.vecdot(codes, codes))
        gain = agreement * scale
        better = gain > best_gain
        best_gain = torch.where(better, gain, best_gain)
        best_scale = torch.where(better, scale, best_scale)
        best_inverse = torch.where(better, inverse, best_inverse)
    return _nearest_nibbles(groups, best_inverse), best_scale


def _nearest_nibbles(groups: Tensor, inverse: Tensor) -> Tensor:
    """Multiplies ``groups`` [rows, G, g] by ``inverse`` [rows, G], and rounds to codes."""
    return (groups * inverse[..., None]).round_().clamp_(-8, 7)


def _inverse(x: Tensor) -> Tensor:
    """Returns 1 / x, and 0 for 0."""
    return torch.where(x == 0, 0.0, 1.0 / x)


def pack_nibbles(codes: Tensor) -> Tensor:
    """Packs codes from -8 to 7 [O, I] into bytes, as in ``RoundedWeight.codes``."""
    biased = (codes + 8).to(torch.uint8)
    return biased[:, 0::2] | (biased[:, 1::2] << 4)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """Returns the codes that :func:`pack_nibbles` packed, as int8."""
    halves = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1)
    return halves.to(torch.int8) - 8


def dequantize(weight: RoundedWeight, dtype: torch.dtype) -> Tensor:
    """Computes the weight [O, I] that the codes stand for in float32, with its columns in the order of ``codes``."""
    codes = weight.codes if weight.bits == 8 else unpack_nibbles(weight.codes)
    values = codes.view(weight.num_outputs, -1, weight.group_size) * weight.scales[..., None]
    if weight.offsets is not None:
        values += weight.offsets[..., None]
    return values.view(weight.num_outputs, -1).to(dtype)


class RoundedLinear:
    """A linear layer whose rounded weight is widened part by part at each call; other forms must agree with it."""

    def __init__(self, weight: RoundedWeight, bias: Tensor | None) -> None:
        """Keeps ``weight`` [O, I] and ``bias`` [O] without a copy."""
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
            part = dequantize(weight.rows(start, start + step), x.dtype)
            bias = None if self._bias is None else self._bias[start : start + step]
            output[:, start : start + step] = F.linear(x, part, bias)
        return output
