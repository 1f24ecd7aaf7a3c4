"""Products with a bfloat16 weight: see :mod:`kernels.cpu.products.matmul_ir`.

For few tokens the code reads the weight at the speed of memory, and for many it computes at the speed of the vector
units. In between, where a library's matrix product does neither well, it gains the most.

Shapes: T tokens of a batch, I inputs, O outputs.
"""

import struct
from dataclasses import dataclass
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.cpu.machine import machine_code, threads
from kernels.cpu.machine.columns_ir import LANES, WHOLE, ColumnTile
from kernels.cpu.machine.pages import HUGE_PAGE, map_zeros
from kernels.cpu.machine.target import Target, chosen
from kernels.cpu.machine.threads import Operation
from kernels.cpu.products.matmul_ir import ARGUMENTS, COLUMN_BYTES, PRODUCT, header, pair_bytes, tile, tile_name

_ARGUMENTS = struct.Struct(f"={len(ARGUMENTS)}q")
# The columns of a ticket: enough that tickets cost nothing, and so few that all threads end together.
_MOST_SUMS = 24  # so that some registers are left for masks, too
_MOST_UNIT, _UNITS_PER_THREAD = 8, 8


class PackedWeight:
    """A weight that is packed in columns, ``[O / 16, I / 2, 16, 2]``."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """Copies ``weight`` [O, I], bfloat16 with I even, and ``bias`` [O]."""
        num_outputs, num_inputs = weight.shape
        assert weight.dtype == torch.bfloat16 and num_inputs % 2 == 0, weight.shape
        self.num_outputs, self.num_inputs = num_outputs, num_inputs
        self.num_columns = -(-num_outputs // LANES)
        missing = self.num_columns * LANES - num_outputs
        padded = F.pad(weight, (0, 0, 0, missing)) if missing else weight.contiguous()
        pairs = padded.view(torch.int32)  # [O, I / 2]
        self.columns = huge_empty((self.num_columns, num_inputs // 2, LANES))
        self.columns.copy_(pairs.view(self.num_columns, LANES, -1).transpose(1, 2))
        given = torch.zeros(num_outputs) if bias is None else bias.float()
        self.bias = F.pad(given, (0, missing))

    @property
    def num_bytes(self) -> int:
        """Returns the memory that weight and bias take."""
        return self.columns.nbytes + self.bias.nbytes


def huge_empty(shape: tuple[int, ...]) -> Tensor:
    """Allocates 32-bit integers, on huge pages where the system has them, so that reads walk the page tables less."""
    num_bytes = 4 * torch.Size(shape).numel()
    if num_bytes < HUGE_PAGE:
        return torch.empty(shape, dtype=torch.int32)
    return map_zeros(num_bytes).view(torch.int32).view(shape)


@dataclass(frozen=True, slots=True)
class Shapes:
    """The shapes of a target's tiles.

    Attributes:
        few: the most rows and the columns of the only tile of a batch, by its rows.
        many: the most rows and the columns of each of several tiles.
    """

    few: tuple[tuple[int, int], ...]
    many: tuple[int, int]

    def shape_for(self, num_tokens: int) -> tuple[int, int, int]:
        """Returns the number of tiles for a batch, the rows of each, and its columns. Tiles have equally many rows."""
        for most_rows, columns in self.few:
            if num_tokens <= most_rows:
                return 1, num_tokens, columns
        most_rows, columns = self.many
        num_tiles = -(-num_tokens // most_rows)
        return num_tiles, -(-num_tokens // num_tiles), columns


@cache
def shapes(target: Target) -> Shapes:
    """Returns the shapes with as many sums as fit the target's registers, beside a weight of each column and an input.

    With fewer a tile would wait for its own sums; with all rows in one tile the weight is read once. Few rows are bound
    by memory, which is faster with one or two streams than with many.
    """
    if target.multiplies_pairs:  # measured on Zen 4
        return Shapes(few=((1, 1), (4, 2), (6, 4), (8, 3), (12, 2), (24, 1)), many=(8, 3))
    vectors = (target.registers - 2) // target.registers_per_column
    fitting = [(min(vectors // columns - 1, _MOST_SUMS // columns), columns) for columns in (4, 3, 2, 1)]
    few = [(rows, columns) for rows, columns in fitting if rows > 1]
    one_row = (1, 2) if vectors >= 4 else (1, 1)
    return Shapes(few=(one_row, *few), many=max(few, key=partial(_products_per_operand, target)))


def _products_per_operand(target: Target, shape: tuple[int, int]) -> float:
    """Returns how many vectors are multiplied for each input loaded, and each vector of weights loaded or widened."""
    rows, columns = shape
    vectors = columns * target.registers_per_column
    return rows * vectors / (rows + 2 * vectors)


def tile_shape(num_tokens: int) -> tuple[int, int, int]:
    """Returns the number of tiles for a batch, the rows of each, and its columns, on the chosen target."""
    return shapes(chosen()).shape_for(num_tokens)


def multiply(x: Tensor, weight: PackedWeight) -> Tensor:
    """Computes ``x W^T + b`` [T, O] of ``x`` [T, I], summed in float32 and rounded once."""
    num_tokens, num_inputs = x.shape
    assert num_inputs == weight.num_inputs and x.dtype == torch.bfloat16, (x.shape, x.dtype)
    if not num_tokens:
        return x.new_empty(0, weight.num_outputs)
    num_tiles, rows, _ = tile_shape(num_tokens)
    tiles = in_tiles(x, num_tiles, rows, widens=widens_inputs())
    output = torch.empty(num_tiles * rows, weight.num_columns * LANES, dtype=torch.bfloat16)
    ticket = torch.zeros(1, dtype=torch.int64)
    num_threads = min(torch.get_num_threads(), weight.num_columns)
    operation = product(weight, num_tokens, num_threads, tiles.data_ptr(), output.data_ptr(), ticket.data_ptr())
    threads.run(*operation, num_threads)
    return output[:num_tokens, : weight.num_outputs]


def product(
    weight: PackedWeight,
    num_tokens: int,
    num_threads: int,
    tiles: int,
    output: int,
    ticket: int,
    column_tile: ColumnTile = WHOLE,
) -> Operation:
    """Makes the operation of :func:`multiply`: see :meth:`kernels.cpu.products.linear.ProgramLinear.product`."""
    num_tiles, rows, columns = tile_shape(num_tokens)
    first, num_columns = column_tile.columns(weight.num_columns)
    share = num_columns // (num_threads * _UNITS_PER_THREAD)
    unit = max(1, min(share, _MOST_UNIT)) if share < columns else min(share, _MOST_UNIT) // columns * columns
    code = _compiled()
    output_row = 2 * LANES * weight.num_columns
    arguments = _ARGUMENTS.pack(
        *(tiles, weight.columns[first:].data_ptr(), weight.bias[first * LANES :].data_ptr()),
        *(output + 2 * LANES * first, ticket),
        *(code[tile_name(rows, columns)], code[tile_name(rows, 1)]),
        *(weight.num_inputs // 2 * pair_bytes(chosen(), rows), rows * output_row, output_row),
        weight.num_inputs // 2 * COLUMN_BYTES,
        *(weight.num_inputs // 2, num_columns, num_tiles, columns, unit),
    )
    return code["product"], arguments


def widens_inputs() -> bool:
    """Tells whether tiles of several rows hold the input in float32."""
    return not chosen().multiplies_pairs


def in_tiles(x: Tensor, num_tiles: int, rows: int, *, widens: bool) -> Tensor:
    """Lays ``x`` [T, I] out as pairs of inputs ``[tiles, I / 2, rows]``, with zeros for missing rows.

    Where it widens and tiles have several rows, it lays float32 out as ``[tiles, I, rows]``.
    """
    pairs = x.float() if widens and rows > 1 else x.contiguous().view(torch.int32)
    missing = num_tiles * rows - len(x)
    if missing:
        pairs = F.pad(pairs, (0, 0, 0, missing))
    return pairs.view(num_tiles, rows, -1).transpose(1, 2).contiguous()


@cache
def _compiled() -> dict[str, int]:
    """Compiles the functions of all tiles and of ``product``, and returns their addresses by name."""
    names = ["product", *(tile_name(*shape) for shape in _needed(chosen()))]
    return machine_code.addresses(module(chosen()), names)


def module(target: Target) -> str:
    """Returns the LLVM IR of ``product`` and of all tiles."""
    return header(target) + PRODUCT + "\n".join(tile(target, *shape) for shape in _needed(target))


def _needed(target: Target) -> list[tuple[int, int]]:
    """Returns the rows and columns of all tiles that are used, and of those for remaining columns."""
    most_rows = shapes(target).few[-1][0]
    used = {shapes(target).shape_for(num_tokens)[1:] for num_tokens in range(1, 8 * most_rows)}
    return sorted(used | {(rows, 1) for rows in range(1, most_rows + 1)})
