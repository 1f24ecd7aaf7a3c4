"""Products with rounded weights: see :mod:`kernels.cpu.products.quantized_ir`.

The weights are those of :mod:`kernels.rounded`, packed once.

Shapes: T tokens of a batch, I inputs, O outputs, G groups of inputs, g inputs of a group.
"""

import struct
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.cpu.machine import machine_code, threads
from kernels.cpu.machine.columns_ir import LANES, WHOLE, ColumnTile
from kernels.cpu.machine.target import Target, chosen, has
from kernels.cpu.machine.threads import Operation
from kernels.cpu.products.matmul import huge_empty, in_tiles
from kernels.cpu.products.matmul_ir import pair_bytes
from kernels.cpu.products.quantized_ir import ARGUMENTS, PAIRS_PER_LINE, PRODUCT, Format, header, tile
from kernels.cpu.products.tiling import Layout, shapes, tile_name, unit_for, used_shapes
from kernels.rounded import Bits, RoundedWeight

_ARGUMENTS = struct.Struct(f"={len(ARGUMENTS)}q")
# The columns of a tile with tables, by its rows: enough that the dot products do not wait for each other's sums, and no
# more than fit the vector registers beside operands and tables. Measured on Zen 4.
_COLUMNS: dict[int, tuple[int, ...]] = {4: (8, 8, 6, 5, 4, 3), 8: (8, 5, 4, 4, 3, 3)}
_MOST_ROWS = 24
# How many numbers are packed at once, so that they stay in the cache.
_PACKED_AT_ONCE = 1 << 19


def is_supported(weight: RoundedWeight) -> bool:
    """Tells whether there is code for such a weight."""
    return weight.group_size % (2 * PAIRS_PER_LINE[weight.bits]) == 0


def has_tables(bits: Bits) -> bool:
    """Tells whether the chosen target looks codes of ``bits`` up in tables.

    On CPUs with a matrix unit, which are Intel's, that is faster for codes of 4 bits alone, and for one token.
    """
    target = chosen()
    if bits == 4:
        return target.multiplies_pairs
    return target.multiplies_pairs and has("avx512vbmi") and not target.has_matrix_unit


class PackedWeight:
    """A rounded weight in columns of 16 outputs, which :mod:`kernels.cpu.products.quantized_ir` describes."""

    def __init__(self, weight: RoundedWeight, bias: Tensor | None) -> None:
        """Copies ``weight``, which :func:`is_supported` must accept, and ``bias`` [O]."""
        self.bits, self.group_size = weight.bits, weight.group_size
        self.num_outputs, self.num_inputs = weight.num_outputs, weight.num_inputs
        self.order = weight.order
        self.has_offsets = weight.offsets is not None
        self.form = Format(bits=self.bits, offsets=self.has_offsets, tables=has_tables(self.bits))
        self.num_columns = -(-self.num_outputs // LANES)
        self.num_groups = self.num_inputs // self.group_size
        self.num_lines = self.group_size // (2 * PAIRS_PER_LINE[self.bits])
        missing = self.num_columns * LANES - self.num_outputs
        heads = 2 if self.has_offsets else 1
        lines = huge_empty((self.num_columns, self.num_groups, heads + self.num_lines, LANES))
        lines[:, :, 0] = _per_column(weight.scales, missing)
        if weight.offsets is not None:
            # With tables and offsets, a code of 8 bits stands for its value plus a half.
            half = weight.scales / 2 if self.bits == 8 and self.form.tables else 0
            lines[:, :, 1] = _per_column(weight.offsets - half, missing)
        step = max(1, _PACKED_AT_ONCE // (LANES * self.num_inputs))
        for start in range(0, self.num_columns, step):
            columns = lines[start : start + step, :, heads:]
            codes = weight.codes[start * LANES : (start + step) * LANES]
            codes = F.pad(codes, (0, 0, 0, len(columns) * LANES - len(codes)))
            columns.copy_(_lines(codes, self.form).view(torch.int32).view(columns.shape))
        self.lines = lines
        given = torch.zeros(self.num_outputs) if bias is None else bias.float()
        self.bias = F.pad(given, (0, missing))

    @property
    def num_bytes(self) -> int:
        """Returns the memory that weight and bias take."""
        return self.lines.nbytes + self.bias.nbytes + (0 if self.order is None else self.order.nbytes)

    @property
    def layout(self) -> Layout:
        """Returns how the input lies that it is multiplied with."""
        return self.form.layout

    def tile_shape(self, num_tokens: int) -> tuple[int, int, int]:
        """Returns the number of tiles for a batch, the rows of each, and its columns. Tiles have equally many rows."""
        return shape_for(chosen(), self.form, num_tokens)


def _per_column(factors: Tensor, missing: int) -> Tensor:
    """Lays ``factors`` [O, G] out as [O / 16, G, 16], padded, with the bits of float32 as integers."""
    padded = F.pad(factors, (0, 0, 0, missing)).view(-1, LANES, factors.shape[1])
    return padded.transpose(1, 2).contiguous().view(torch.int32)


def _lines(codes: Tensor, form: Format) -> Tensor:
    """Lays codes, int8 [O, I] or uint8 [O, I / 2] with two codes of 4 bits, out as lines: see quantized_ir."""
    if not form.tables:
        return _lines_of_words(codes) if form.bits == 4 else _lines_of_rows(codes)
    return _lines_of_nibbles(codes) if form.bits == 4 else _lines_of_bytes(codes, halves=form.offsets)


def _lines_of_words(codes: Tensor) -> Tensor:
    """Lays codes of 4 bits out as words [O / 16, lines, 16] of their two's complement, the first in the lowest bits."""
    words = (codes ^ 0x88).contiguous().view(torch.int32)  # codes are stored plus 8
    return words.view(len(codes) // LANES, LANES, -1).transpose(1, 2).contiguous()


def _lines_of_rows(codes: Tensor) -> Tensor:
    """Lays codes of 8 bits out as bytes [O / 16, I, 16]."""
    return codes.view(len(codes) // LANES, LANES, -1).transpose(1, 2).contiguous()


def _lines_of_nibbles(codes: Tensor) -> Tensor:
    """Lays ``codes`` uint8 [O, I / 2], a byte for a pair of inputs, out as words [O / 16, lines, 16, 2] of 4 pairs."""
    pairs = codes.view(len(codes) // LANES, LANES, -1, 4)  # [columns, outputs, lines, pairs]
    first, second = (pairs & 15).short(), (pairs >> 4).short()
    words = [x[..., 0] | (x[..., 1] << 4) | (x[..., 2] << 8) | (x[..., 3] << 12) for x in (first, second)]
    return torch.stack(words, dim=-1).transpose(1, 2).contiguous().flatten(2)


def _lines_of_bytes(codes: Tensor, *, halves: bool) -> Tensor:
    """Lays ``codes`` int8 [O, I] out as sign and magnitude, in bytes [O / 16, lines, outputs / 4, pair, output % 4, 2].

    With ``halves`` the magnitude is that of the code plus a half, rounded down.
    """
    magnitude = codes ^ (codes >> 7) if halves else codes.abs()  # -1 - code where that is below 0
    signed = magnitude | (codes & -128)
    pairs = signed.view(torch.int16).view(len(codes) // LANES, 4, 4, -1, 2)  # [columns, quarter, % 4, lines, pair]
    return pairs.permute(0, 3, 1, 4, 2).contiguous().flatten(2)


def _columns_of_one(target: Target) -> int:
    """Returns the columns of a tile of one token: so many that products do not wait for each other's sums, and no more.

    Each is a stream of its own in memory.
    """
    return min(4 if target.lanes < 16 else 8, (target.registers - 4) // target.registers_per_column)


def shape_for(target: Target, form: Format, num_tokens: int) -> tuple[int, int, int]:
    """Returns what :meth:`PackedWeight.tile_shape` does, for any target."""
    if not form.tables:
        num_tiles, rows, columns = shapes(target).shape_for(num_tokens)
        return num_tiles, rows, _columns_of_one(target) if num_tokens == 1 else columns
    num_tiles = -(-num_tokens // _MOST_ROWS)
    rows = -(-num_tokens // num_tiles)
    by_rows = _COLUMNS[form.bits]
    return num_tiles, rows, by_rows[rows - 1] if num_tiles == 1 and rows <= len(by_rows) else 1


def multiply(x: Tensor, weight: PackedWeight) -> Tensor:
    """Computes ``x W^T + b`` [T, O] of ``x`` [T, I] in bfloat16, summed in float32 and rounded once.

    A token has the same bits in every batch.
    """
    num_tokens, num_inputs = x.shape
    assert num_inputs == weight.num_inputs and x.dtype == torch.bfloat16, (x.shape, x.dtype)
    if not num_tokens:
        return x.new_empty(0, weight.num_outputs)
    num_tiles, rows, _ = weight.tile_shape(num_tokens)
    x = x if weight.order is None else x.index_select(1, weight.order)
    tiles = in_tiles(x, num_tiles, rows, weight.layout)
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
    column_tile: ColumnTile = WHOLE,
) -> Operation:
    """Makes the operation of :func:`multiply`: see :meth:`kernels.cpu.products.linear.ProgramLinear.product`.

    ``sums`` is the address of the sums of the inputs' groups, which only a weight with offsets needs.
    """
    first, num_columns = column_tile.columns(weight.num_columns)
    num_tiles, rows, columns = weight.tile_shape(num_tokens)
    code = _compiled(weight.form)
    row_bytes = weight.num_columns * LANES * 2
    arguments = _ARGUMENTS.pack(
        *(tiles, sums, weight.lines[first:].data_ptr(), weight.bias[first * LANES :].data_ptr()),
        output + 2 * LANES * first,
        *(ticket, code[tile_name(rows, columns)], code[tile_name(rows, 1)]),
        *(weight.num_inputs // 2 * pair_bytes(weight.layout, rows), rows * weight.num_groups * 4),
        *(rows * row_bytes, row_bytes),
        *(weight.lines.stride(0) * 4, weight.num_groups, weight.num_lines, num_columns, num_tiles, columns),
        unit_for(num_columns, columns, num_threads, weight.lines.stride(0) * 4),
    )
    return code["product"], arguments


def _group_sums(x: Tensor, weight: PackedWeight, num_tiles: int, rows: int) -> Tensor:
    """Sums each token's inputs by groups: [tiles, G, rows] in float32, with zeros for missing rows."""
    sums = x.view(len(x), weight.num_groups, weight.group_size).sum(-1, dtype=torch.float32)
    padded = F.pad(sums, (0, 0, 0, num_tiles * rows - len(x)))
    return padded.view(num_tiles, rows, -1).transpose(1, 2).contiguous()


@cache
def _compiled(form: Format) -> dict[str, int]:
    """Compiles the functions of all tiles and of ``product``, and returns their addresses by name."""
    names = ["product", *(tile_name(*shape) for shape in _needed(chosen(), form))]
    return machine_code.addresses(module(chosen(), form), names)


def module(target: Target, form: Format) -> str:
    """Returns the LLVM IR of ``product`` and of all tiles."""
    return header(form) + PRODUCT + "\n".join(tile(target, form, *shape) for shape in _needed(target, form))


def _needed(target: Target, form: Format) -> list[tuple[int, int]]:
    return used_shapes(partial(shape_for, target, form), 8 * _MOST_ROWS)
