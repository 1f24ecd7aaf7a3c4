"""Weights rounded to 8 or 4 bits, in groups of inputs, and products with them.

An output's weights are ``code * scale`` in each group of inputs, or ``code * scale + offset``. Inputs and outputs of
the product keep their number type ("weight-only"). On CPUs with AVX512-BF16 a bfloat16 product is computed by code of
our own from packed weights: see :mod:`kernels.cpu.products.quantized_ir`.

Shapes: T tokens of a batch, I inputs, O outputs, G groups of inputs, g inputs of a group.
"""

import struct
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.cpu.machine import machine_code, threads
from kernels.cpu.machine.columns_ir import LANES, WHOLE, Strip
from kernels.cpu.products.matmul import huge_empty, in_tiles
from kernels.cpu.products.quantized_ir import HEADER, JOB, PAIRS_PER_LINE, WORK, tile, tile_name

Bits = Literal[4, 8]

_JOB = struct.Struct(f"={len(JOB)}q")
# Columns of a tile, by its rows: enough sums that the dot products do not wait for each other, and no more than fit
# the vector registers beside operands and tables. Measured on Zen 4.
_COLUMNS: dict[Bits, tuple[int, ...]] = {4: (8, 8, 6, 5, 4, 3), 8: (8, 5, 4, 4, 3, 3)}
_MOST_ROWS = 24
# A ticket's columns: see kernels.cpu.products.matmul.
_MOST_UNIT, _UNITS_PER_THREAD = 8, 8
# Numbers that are gone over at once, so that they stay in the cache.
_ROUNDED_AT_ONCE, _PACKED_AT_ONCE = 1 << 18, 1 << 19
# Scales that are tried for 4 bits, relative to the one that takes the largest weight of the group to -8.
_CLIP_FACTORS = (1.1, 1.0, 0.92, 0.85)


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundedWeight:
    """A weight [O, I] in groups of inputs.

    Attributes:
        codes: int8 [O, I]; or uint8 [O, I / 2], where a byte has two codes of 4 bits, from -8 to 7 and stored plus 8,
            the first in its low half.
        scales: float32 [O, G].
        offsets: float32 [O, G]; None: all are 0.
        order: int64 [I], the input that each column of ``codes`` belongs to; None: in order.
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
        """Of a code."""
        return 8 if self.codes.dtype == torch.int8 else 4

    @property
    def num_outputs(self) -> int:
        """O."""
        return self.codes.shape[0]

    @property
    def num_inputs(self) -> int:
        """I."""
        return self.codes.shape[1] * (8 // self.bits)

    @property
    def group_size(self) -> int:
        """g."""
        return self.num_inputs // self.scales.shape[1]

    @property
    def num_bytes(self) -> int:
        """Memory that it takes."""
        return sum(x.nbytes for x in (self.codes, self.scales, self.offsets, self.order) if x is not None)

    def rows(self, start: int, stop: int) -> "RoundedWeight":
        """The outputs from ``start`` to ``stop``, as views."""
        offsets = None if self.offsets is None else self.offsets[start:stop]
        return RoundedWeight(
            codes=self.codes[start:stop], scales=self.scales[start:stop], offsets=offsets, order=self.order
        )


def round_weight(weight: Tensor, *, bits: Bits, group_size: int) -> RoundedWeight:
    """The weight [O, I] rounded to the nearest codes; I is a multiple of ``group_size``, which is even.

    8 bits: codes from -127 to 127, the largest weight of a group at either end. 4 bits: codes from -8 to 7; of several
    scales that clip the largest weights more or less, each refitted to its codes by least squares, a group gets the one
    with the smallest squared error.
    """
    num_outputs, num_inputs = weight.shape
    assert num_inputs % group_size == 0 and group_size % 2 == 0, (num_inputs, group_size)
    dtype = torch.int8 if bits == 8 else torch.uint8
    codes = torch.empty(num_outputs, num_inputs * bits // 8, dtype=dtype, device=weight.device)
    scales = torch.empty(num_outputs, num_inputs // group_size, device=weight.device)
    step = max(1, _ROUNDED_AT_ONCE // num_inputs) if weight.device.type == "cpu" else num_outputs
    round_groups = _round_to_8_bits if bits == 8 else _round_to_4_bits
    for start in range(0, num_outputs, step):
        some = weight[start : start + step].float()
        rounded, scale = round_groups(some.view(len(some), -1, group_size))
        rounded = rounded.view(len(some), num_inputs)
        codes[start : start + step] = rounded.to(torch.int8) if bits == 8 else pack_nibbles(rounded)
        scales[start : start + step] = scale
    return RoundedWeight(codes=codes, scales=scales)


def _round_to_8_bits(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Codes, as float, and scales [rows, G] of ``groups`` [rows, G, g]."""
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
    """``groups`` [rows, G, g] times ``inverse`` [rows, G], as codes."""
    return (groups * inverse[..., None]).round_().clamp_(-8, 7)


def _inverse(x: Tensor) -> Tensor:
    """1 / x, and 0 for 0."""
    return torch.where(x == 0, 0.0, 1.0 / x)


def pack_nibbles(codes: Tensor) -> Tensor:
    """Codes from -8 to 7 [O, I] as ``RoundedWeight.codes`` has them."""
    biased = (codes + 8).to(torch.uint8)
    return biased[:, 0::2] | (biased[:, 1::2] << 4)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """What :func:`pack_nibbles` was given, as int8."""
    halves = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1)
    return halves.to(torch.int8) - 8


def dequantize(weight: RoundedWeight, dtype: torch.dtype) -> Tensor:
    """The weight [O, I] that the codes stand for, computed in float32; its columns in the order of ``codes``."""
    codes = weight.codes if weight.bits == 8 else unpack_nibbles(weight.codes)
    values = codes.view(weight.num_outputs, -1, weight.group_size) * weight.scales[..., None]
    if weight.offsets is not None:
        values += weight.offsets[..., None]
    return values.view(weight.num_outputs, -1).to(dtype)


def is_supported(weight: RoundedWeight) -> bool:
    """Whether this CPU can run the code for such a weight."""
    features = machine_code.cpu_features()
    has_instructions = "avx512bf16" in features and (weight.bits == 4 or "avx512vbmi" in features)
    return has_instructions and weight.group_size % (2 * PAIRS_PER_LINE[weight.bits]) == 0


class PackedWeight:
    """A rounded weight in columns of 16 outputs, as :mod:`kernels.cpu.products.quantized_ir` describes them."""

    def __init__(self, weight: RoundedWeight, bias: Tensor | None) -> None:
        """Copies ``weight``, which :func:`is_supported`, and ``bias`` [O]."""
        self.bits, self.group_size = weight.bits, weight.group_size
        self.num_outputs, self.num_inputs = weight.num_outputs, weight.num_inputs
        self.order = weight.order
        self.has_offsets = weight.offsets is not None
        self.num_columns = -(-self.num_outputs // LANES)
        self.num_groups = self.num_inputs // self.group_size
        self.num_lines = self.group_size // (2 * PAIRS_PER_LINE[self.bits])
        missing = self.num_columns * LANES - self.num_outputs
        heads = 2 if self.has_offsets else 1
        lines = huge_empty((self.num_columns, self.num_groups, heads + self.num_lines, LANES))
        lines[:, :, 0] = _per_column(weight.scales, missing)
        if weight.offsets is not None:
            # A code of 8 bits stands for its value and a half there.
            half = weight.scales / 2 if self.bits == 8 else 0
            lines[:, :, 1] = _per_column(weight.offsets - half, missing)
        step = max(1, _PACKED_AT_ONCE // (LANES * self.num_inputs))
        for start in range(0, self.num_columns, step):
            columns = lines[start : start + step, :, heads:]
            codes = weight.codes[start * LANES : (start + step) * LANES]
            codes = F.pad(codes, (0, 0, 0, len(columns) * LANES - len(codes)))
            packed = _lines_of_nibbles(codes) if self.bits == 4 else _lines_of_bytes(codes, halves=self.has_offsets)
            columns.copy_(packed.view(torch.int32).view(columns.shape))
        self.lines = lines
        given = torch.zeros(self.num_outputs) if bias is None else bias.float()
        self.bias = F.pad(given, (0, missing))

    @property
    def num_bytes(self) -> int:
        """Memory that it takes."""
        return self.lines.nbytes + self.bias.nbytes + (0 if self.order is None else self.order.nbytes)


def _per_column(factors: Tensor, missing: int) -> Tensor:
    """``factors`` [O, G] as [O / 16, G, 16], padded, the bits of float32 as integers."""
    padded = F.pad(factors, (0, 0, 0, missing)).view(-1, LANES, factors.shape[1])
    return padded.transpose(1, 2).contiguous().view(torch.int32)


def _lines_of_nibbles(codes: Tensor) -> Tensor:
    """``codes`` uint8 [O, I / 2], a byte for each pair of inputs, as words [O / 16, lines, 16, 2] of 4 pairs."""
    pairs = codes.view(len(codes) // LANES, LANES, -1, 4)  # [columns, outputs, lines, pairs]
    first, second = (pairs & 15).short(), (pairs >> 4).short()
    words = [x[..., 0] | (x[..., 1] << 4) | (x[..., 2] << 8) | (x[..., 3] << 12) for x in (first, second)]
    return torch.stack(words, dim=-1).transpose(1, 2).contiguous().flatten(2)


def _lines_of_bytes(codes: Tensor, *, halves: bool) -> Tensor:
    """``codes`` int8 [O, I] as sign and magnitude, bytes [O / 16, lines, outputs / 4, pair, output % 4, 2].

    With ``halves`` the magnitude is that of the code and a half, rounded down.
    """
    magnitude = codes ^ (codes >> 7) if halves else codes.abs()  # -1 - code where that is below 0
    signed = magnitude | (codes & -128)
    pairs = signed.view(torch.int16).view(len(codes) // LANES, 4, 4, -1, 2)  # [columns, quarter, % 4, lines, pair]
    return pairs.permute(0, 3, 1, 4, 2).contiguous().flatten(2)


def tile_shape(num_tokens: int, bits: Bits) -> tuple[int, int, int]:
    """Tiles, rows of each, and columns at a time, for a batch: rows are dealt out evenly."""
    num_tiles = -(-num_tokens // _MOST_ROWS)
    rows = -(-num_tokens // num_tiles)
    by_rows = _COLUMNS[bits]
    return num_tiles, rows, by_rows[rows - 1] if num_tiles == 1 and rows <= len(by_rows) else 1


def multiply(x: Tensor, weight: PackedWeight) -> Tensor:
    """``x`` [T, I] in bfloat16 times the weight, transposed, plus the bias: [T, O].

    Summed in float32 and rounded once; a token has the same bits in every batch.
    """
    num_tokens, num_inputs = x.shape
    assert num_inputs == weight.num_inputs and x.dtype == torch.bfloat16, (x.shape, x.dtype)
    if not num_tokens:
        return x.new_empty(0, weight.num_outputs)
    num_tiles, rows, _ = tile_shape(num_tokens, weight.bits)
    x = x if weight.order is None else x.index_select(1, weight.order)
    tiles = in_tiles(x, num_tiles, rows)
    sums = _group_sums(x, weight, num_tiles, rows) if weight.has_offsets else tiles
    output = torch.empty(num_tiles * rows, weight.num_columns * LANES, dtype=torch.bfloat16)
    ticket = torch.zeros(1, dtype=torch.int64)
    num_threads = min(torch.get_num_threads(), weight.num_columns)
    addresses = (tiles.data_ptr(), sums.data_ptr(), output.data_ptr(), ticket.data_ptr())
    threads.run(*product(weight, num_tokens, num_threads, *addresses), num_threads)
    return output[:num_tokens, : weight.num_outputs]


def product(
    weight: PackedWeight,
    num_tokens: int,
    num_threads: int,
    tiles: int,
    sums: int,
    output: int,
    ticket: int,
    strip: Strip = WHOLE,
) -> tuple[int, bytes]:
    """The work of a product and its job, from the addresses of what :func:`multiply` has: inputs, output, a zero.

    ``sums`` are those of the inputs' groups, which only a weight with offsets needs. Of a ``strip`` of the output
    alone, whose place is in the same memory.
    """
    first, num_columns = strip.of(weight.num_columns)
    num_tiles, rows, columns = tile_shape(num_tokens, weight.bits)
    code = _compiled(weight.bits, weight.has_offsets)
    row_bytes = weight.num_columns * LANES * 2
    job = _JOB.pack(
        *(tiles, sums, weight.lines[first:].data_ptr(), weight.bias[first * LANES :].data_ptr()),
        output + 2 * LANES * first,
        *(ticket, code[tile_name(rows, columns)], code[tile_name(rows, 1)]),
        *(rows * weight.num_inputs * 2, rows * weight.num_groups * 4, rows * row_bytes, row_bytes),
        *(weight.lines.stride(0) * 4, weight.num_groups, weight.num_lines, num_columns, num_tiles, columns),
        _unit(num_columns, columns, num_threads),
    )
    return code["work"], job


def _unit(num_columns: int, columns: int, num_threads: int) -> int:
    """Columns of a ticket: whole tiles, unless there are so few that a thread would get none."""
    share = num_columns // (num_threads * _UNITS_PER_THREAD)
    if num_columns < num_threads * columns:
        return max(1, share)
    return max(1, min(share, _MOST_UNIT) // columns) * columns


def _group_sums(x: Tensor, weight: PackedWeight, num_tiles: int, rows: int) -> Tensor:
    """Of each token's inputs in each group: [tiles, G, rows] in float32, with zeros for the rows that are missing."""
    sums = x.view(len(x), weight.num_groups, weight.group_size).sum(-1, dtype=torch.float32)
    padded = F.pad(sums, (0, 0, 0, num_tiles * rows - len(x)))
    return padded.view(num_tiles, rows, -1).transpose(1, 2).contiguous()


@cache
def _compiled(bits: Bits, offsets: bool) -> dict[str, int]:
    """Where the code of every tile is, by its name, and of ``work``."""
    shapes = {tile_shape(num_tokens, bits)[1:] for num_tokens in range(1, _MOST_ROWS + 1)}
    needed = sorted(shapes | {(rows, 1) for rows, _ in shapes})
    ir = HEADER + WORK + "\n".join(tile(*shape, bits=bits, offsets=offsets) for shape in needed)
    return machine_code.addresses(ir, ["work", *(tile_name(*shape) for shape in needed)])
