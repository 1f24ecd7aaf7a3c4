"""How a rounded weight lies in a GPU's memory, and how a product with it is cut. Nothing of Triton is imported here.

A block is so many inputs of one group. Blocks follow each other, each with all outputs side by side, so that whichever
outputs a program takes, their codes of a block are one dense piece; scales and offsets lie likewise. A byte with two
codes of 4 bits has those of inputs half a block apart: either half of a block's bytes then multiplies inputs that are
neighbours.

Shapes: T tokens of a batch, I inputs, O outputs, P outputs padded, G groups of g inputs, B inputs of a block.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.rounded import Bits, RoundedWeight

TILE_OUTPUTS = 64  # outputs are padded to it
MOST_TOKENS = 256  # of a batch that is multiplied from the codes: for more the weight is worth writing out
_MOST_INPUTS, _LEAST_INPUTS = 128, 32  # of a block: tensor cores multiply 16 inputs at once, and a block has two halves
# Warps of a tile by its tokens, which are no more than registers hold sums for. Few tokens wait for memory, and for
# the widening of the codes: two warps widen them in a third fewer instructions than four, which on Hopper share one
# product in a less handy layout.
_WARPS = {16: 2, 32: 2, 64: 4}
_WIDE_WARPS = {16: 4}  # of float32: it takes three products, and registers for them
_MOST_STAGES, _STAGE_BYTES = 5, 64 * 1024  # tiles on their way to a program, of which several fit a multiprocessor
# Inputs are cut into parts until there are so many programs for each multiprocessor, so that enough codes are on
# their way; a part is a few blocks, or what it adds up at the end costs more than it saves.
_PROGRAMS, _LEAST_BLOCKS = 3, 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """How a program is cut: tokens that meet TILE_OUTPUTS at once, its warps, and tiles on their way from memory."""

    tokens: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TiledWeight:
    """A rounded weight as the kernels read it.

    Attributes:
        codes: int8 [I / B, P, B]; or uint8 [I / B, P, B / 2], codes of 4 bits stored plus 8, in whose low halves are
            the first B / 2 inputs of the block.
        scales: float32 [G, P], 0 for padding.
        offsets: likewise, or None.
        order: int64 [I], the input that each code belongs to; None: in order.
        num_outputs: O.
        block: B.
    """

    codes: Tensor
    scales: Tensor
    offsets: Tensor | None
    order: Tensor | None
    num_outputs: int
    block: int

    @property
    def bits(self) -> Bits:
        """Of a code."""
        return 8 if self.codes.dtype == torch.int8 else 4

    @property
    def num_inputs(self) -> int:
        """I."""
        return self.codes.shape[0] * self.block

    @property
    def blocks_per_group(self) -> int:
        """g / B."""
        return self.codes.shape[0] // self.scales.shape[0]

    @property
    def num_bytes(self) -> int:
        """Memory that it takes."""
        return sum(x.nbytes for x in (self.codes, self.scales, self.offsets, self.order) if x is not None)


def takes(weight: RoundedWeight) -> bool:
    """Whether a weight's groups can be cut into blocks."""
    return weight.group_size % _LEAST_INPUTS == 0


def tiled(weight: RoundedWeight) -> TiledWeight:
    """The weight, which :func:`takes` it, laid out anew."""
    group_size = weight.group_size
    block = min(_MOST_INPUTS, group_size & -group_size)  # the largest power of 2 that divides the group
    missing = -weight.num_outputs % TILE_OUTPUTS
    codes = weight.codes
    if weight.bits == 4:
        halves = torch.stack((codes & 15, codes >> 4), dim=-1).view(len(codes), -1, 2, block // 2)
        codes = (halves[:, :, 0] | (halves[:, :, 1] << 4)).flatten(1)
    codes = F.pad(codes, (0, 0, 0, missing)).view(weight.num_outputs + missing, weight.num_inputs // block, -1)
    return TiledWeight(
        codes=codes.transpose(0, 1).contiguous(),
        scales=_padded(weight.scales, missing),
        offsets=None if weight.offsets is None else _padded(weight.offsets, missing),
        order=weight.order,
        num_outputs=weight.num_outputs,
        block=block,
    )


def _padded(factors: Tensor, missing: int) -> Tensor:
    """``factors`` [O, G] as [G, P]."""
    return F.pad(factors, (0, 0, 0, missing)).T.contiguous()


def tile_for(num_tokens: int, *, block: int, bits: Bits, itemsize: int) -> Tile:
    """The tile for a batch: its tokens as a power of 2 from 16 on, and tiles of codes and inputs as memory allows."""
    warps = _WIDE_WARPS if itemsize == 4 else _WARPS
    tokens = min((size for size in warps if size >= num_tokens), default=max(warps))
    stage_bytes = TILE_OUTPUTS * block * bits // 8 + tokens * block * itemsize
    num_stages = max(2, min(_MOST_STAGES, _STAGE_BYTES // stage_bytes))
    return Tile(tokens=tokens, num_warps=warps[tokens], num_stages=num_stages)


def cut(num_tiles: int, num_blocks: int, num_multiprocessors: int) -> int:
    """Blocks of a part of the inputs; each part is summed by another program for each of ``num_tiles``."""
    wanted = -(-_PROGRAMS * num_multiprocessors // num_tiles)
    return -(-num_blocks // max(1, min(wanted, num_blocks // _LEAST_BLOCKS)))
