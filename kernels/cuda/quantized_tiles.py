"""The layout of a rounded weight in a GPU's memory, and the tiling of products with it. Triton is not imported here.

A block is a number of inputs of one group. Blocks follow each other, each with all outputs side by side, so that the
codes of a block are dense in memory for any range of outputs; so are scales and offsets. A byte with two codes of 4
bits has those of inputs half a block apart, so that the low halves of a block's bytes belong to neighbouring inputs,
and so do the high halves.

Shapes: T tokens of a batch, I inputs, O outputs, P outputs padded, G groups of g inputs, B inputs of a block.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.rounded import Bits, RoundedWeight

TILE_OUTPUTS = 64  # outputs are padded to a multiple of it
MOST_TOKENS = 256  # the most tokens that are multiplied by the codes; for more, widening the weight pays
# The inputs of a block: tensor cores multiply 16 inputs at once, and a block has two halves.
_MOST_INPUTS, _LEAST_INPUTS = 128, 32
# The warps of a tile by its tokens; registers hold sums for no more tokens. Few tokens wait for memory and for the
# widening of the codes, which takes a third fewer instructions with two warps than with four, since on Hopper four
# warps share one product in a less convenient layout.
_WARPS = {16: 2, 32: 2, 64: 4}
_WIDE_WARPS = {16: 4}  # for float32, which takes three products and the registers for them
# The tiles that a program prefetches, and their memory: several programs must fit a multiprocessor.
_MOST_STAGES, _STAGE_BYTES = 5, 64 * 1024
# Inputs are cut into parts until each multiprocessor has so many programs, so that enough codes are being loaded. A
# part has at least a few blocks, or adding the parts at the end would cost more than it saves.
_PROGRAMS, _LEAST_BLOCKS = 3, 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """The shape of a program: its tokens beside TILE_OUTPUTS outputs, its warps, and the tiles that it prefetches."""

    tokens: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TiledWeight:
    """A rounded weight as the kernels read it.

    Attributes:
        codes: the codes, int8 [I / B, P, B]; or uint8 [I / B, P, B / 2] for codes of 4 bits, which are stored plus 8.
            The low halves of bytes have the first B / 2 inputs of the block.
        scales: the scales, float32 [G, P], 0 for padding.
        offsets: the offsets, likewise; None: all are 0.
        order: the input that each code belongs to, int64 [I]; None: they are in order.
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
        """Returns the bits of a code."""
        return 8 if self.codes.dtype == torch.int8 else 4

    @property
    def num_inputs(self) -> int:
        """Returns I."""
        return self.codes.shape[0] * self.block

    @property
    def blocks_per_group(self) -> int:
        """Returns g / B."""
        return self.codes.shape[0] // self.scales.shape[0]

    @property
    def num_bytes(self) -> int:
        """Returns the memory that it takes."""
        return sum(x.nbytes for x in (self.codes, self.scales, self.offsets, self.order) if x is not None)


def can_tile(weight: RoundedWeight) -> bool:
    """Tells whether a weight's groups can be cut into blocks."""
    return weight.group_size % _LEAST_INPUTS == 0


def tiled(weight: RoundedWeight) -> TiledWeight:
    """Lays out a weight that :func:`can_tile` accepts."""
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
    """Lays ``factors`` [O, G] out as [G, P]."""
    return F.pad(factors, (0, 0, 0, missing)).T.contiguous()


def tile_for(num_tokens: int, *, block: int, bits: Bits, itemsize: int) -> Tile:
    """Returns the tile for a batch: a power of 2 from 16 tokens on, and as many stages as memory allows."""
    warps = _WIDE_WARPS if itemsize == 4 else _WARPS
    tokens = min((size for size in warps if size >= num_tokens), default=max(warps))
    stage_bytes = TILE_OUTPUTS * block * bits // 8 + tokens * block * itemsize
    num_stages = max(2, min(_MOST_STAGES, _STAGE_BYTES // stage_bytes))
    return Tile(tokens=tokens, num_warps=warps[tokens], num_stages=num_stages)


def cut(num_tiles: int, num_blocks: int, num_multiprocessors: int) -> int:
    """Returns the blocks of each part of the inputs; for each of ``num_tiles`` a program sums one part."""
    wanted = -(-_PROGRAMS * num_multiprocessors // num_tiles)
    return -(-num_blocks // max(1, min(wanted, num_blocks // _LEAST_BLOCKS)))
