"""Unpacks the weights of GPTQ checkpoints (Frantar et al. 2023; in the layout of AutoGPTQ and GPTQModel).

A 32-bit word holds ``32 / bits`` unsigned codes, the first in its lowest bits; a weight is ``scale * (code - zero)``.

Shapes: I inputs, O outputs, G groups of g inputs.
"""

import torch
from torch import Tensor

from kernels.rounded import Bits, RoundedWeight, pack_nibbles


def unpack(
    codes: Tensor, zeros: Tensor, scales: Tensor, groups: Tensor, *, bits: Bits, zero_shift: int, offsets: bool
) -> RoundedWeight:
    """Unpacks the weight [O, I] of one layer.

    Args:
        codes: the checkpoint's ``qweight``, int32 [I * bits / 32, O].
        zeros: its ``qzeros``, int32 [G, O * bits / 32].
        scales: its ``scales`` [G, O].
        groups: its ``g_idx``, the group of each input [I].
        zero_shift: the number that is added to the stored zero points.
        offsets: whether zero points may differ from the middle of the codes.

    Raises:
        ValueError: groups are of unequal sizes, or a zero point is not in the middle though ``offsets`` is false.
    """
    middle = 1 << (bits - 1)
    order = _order(groups, num_groups=len(scales))
    signed = _fields(codes.T.contiguous(), bits) - middle  # [O, I]
    if order is not None:
        signed = signed[:, order]
    factors = scales.T.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    middles = (_fields(zeros, bits).T + zero_shift - middle).contiguous()  # [O, G]
    if not offsets and middles.any():
        raise ValueError("zero points differ from the middle")
    return RoundedWeight(
        codes=pack_nibbles(signed) if bits == 4 else signed.to(torch.int8),
        scales=factors,
        offsets=-middles * factors if offsets else None,
        order=order,
    )


def _order(groups: Tensor, *, num_groups: int) -> Tensor | None:
    """Returns the inputs sorted by group, or None where they are in that order already. Raises ValueError."""
    sizes = torch.bincount(groups.clamp(0, num_groups), minlength=num_groups + 1)
    size = len(groups) // num_groups
    if groups.min() < 0 or not bool((sizes[:num_groups] == size).all()):
        raise ValueError("groups are of unequal sizes")
    order = groups.argsort(stable=True)
    return None if torch.equal(order, torch.arange(len(order), device=order.device)) else order


def _fields(words: Tensor, bits: Bits) -> Tensor:
    """Unpacks the unsigned codes in the words' last dim to int16: [..., n] to [..., n * 32 / bits]."""
    lowest = words.contiguous().view(torch.uint8)  # little-endian bytes, the first fields first
    if bits == 8:
        return lowest.short()
    return torch.stack((lowest & 15, lowest >> 4), dim=-1).flatten(-2).short()
