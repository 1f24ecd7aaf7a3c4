"""Products with a bfloat16 weight on CPUs with AVX512-BF16: see :mod:`kernels.cpu.products.matmul_ir`.

For few tokens the code reads the weight at the speed of memory, and for many it computes at the speed of the vector
units. In between, where a library's matrix product does neither well, it gains the most.

Shapes: T tokens of a batch, I inputs, O outputs.
"""

import struct
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.cpu.machine import machine_code, threads
from kernels.cpu.machine.columns_ir import LANES, WHOLE, ColumnTile
from kernels.cpu.machine.pages import HUGE_PAGE, map_zeros
from kernels.cpu.machine.threads import Operation
from kernels.cpu.products.matmul_ir import ARGUMENTS, COLUMN_BYTES, HEADER, PRODUCT, tile, tile_name

_ARGUMENTS = struct.Struct(f"={len(ARGUMENTS)}q")
# (most rows of a tile, columns of a tile). Few rows are bound by memory, which is faster with one or two streams than
# with many. From 5 rows on a tile has as many sums as fit the 32 vector registers beside the operands, since with fewer
# it would wait for its own sums; 24 rows in one tile read the weight once.
_SHAPES = ((1, 1), (4, 2), (6, 4), (8, 3), (12, 2), (24, 1))
_MANY_ROWS = (8, 3)
# The columns of a ticket: enough that tickets cost nothing, and so few that all threads end together.
_MOST_UNIT, _UNITS_PER_THREAD = 8, 8


def can_run() -> bool:
    """Tells whether this CPU has the instructions of the code."""
    return "avx512bf16" in machine_code.cpu_features()


def is_supported() -> bool:
    """Tells whether the code is chosen: where the CPU has a matrix unit (AMX), libraries use that and are faster."""
    return can_run() and "amx-bf16" not in machine_code.cpu_features()


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


def tile_shape(num_tokens: int) -> tuple[int, int, int]:
    """Returns the number of tiles for a batch, the rows of each, and its columns. Tiles have equally many rows."""
    for most_rows, columns in _SHAPES:
        if num_tokens <= most_rows:
            return 1, num_tokens, columns
    most_rows, columns = _MANY_ROWS
    num_tiles = -(-num_tokens // most_rows)
    return num_tiles, -(-num_tokens // num_tiles), columns


def multiply(x: Tensor, weight: PackedWeight) -> Tensor:
    """Computes ``x W^T + b`` [T, O] of ``x`` [T, I], summed in float32 and rounded once."""
    num_tokens, num_inputs = x.shape
    assert num_inputs == weight.num_inputs and x.dtype == torch.bfloat16, (x.shape, x.dtype)
    if not num_tokens:
        return x.new_empty(0, weight.num_outputs)
    num_tiles, rows, _ = tile_shape(num_tokens)
    tiles = in_tiles(x, num_tiles, rows)
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
    x_row, output_row = 2 * weight.num_inputs, 2 * LANES * weight.num_columns
    arguments = _ARGUMENTS.pack(
        *(tiles, weight.columns[first:].data_ptr(), weight.bias[first * LANES :].data_ptr()),
        *(output + 2 * LANES * first, ticket),
        *(code[tile_name(rows, columns)], code[tile_name(rows, 1)]),
        *(rows * x_row, rows * output_row, output_row, weight.num_inputs // 2 * COLUMN_BYTES),
        *(weight.num_inputs // 2, num_columns, num_tiles, columns, unit),
    )
    return code["product"], arguments


def in_tiles(x: Tensor, num_tiles: int, rows: int) -> Tensor:
    """Lays ``x`` [T, I] out as pairs of inputs ``[tiles, I / 2, rows]``, with zeros for missing rows."""
    pairs = x.contiguous().view(torch.int32)
    missing = num_tiles * rows - len(x)
    if missing:
        pairs = F.pad(pairs, (0, 0, 0, missing))
    return pairs.view(num_tiles, rows, -1).transpose(1, 2).contiguous()


@cache
def _compiled() -> dict[str, int]:
    """Compiles the functions of all tiles and of ``product``, and returns their addresses by name."""
    shapes = {(rows, columns) for most, columns in (*_SHAPES, _MANY_ROWS) for rows in range(1, most + 1)}
    shapes |= {(rows, 1) for rows in range(1, _SHAPES[-1][0] + 1)}
    needed = sorted(shape for shape in shapes if _is_used(*shape))
    ir = HEADER + PRODUCT + "\n".join(tile(*shape) for shape in needed)
    return machine_code.addresses(ir, ["product", *(tile_name(*shape) for shape in needed)])


def _is_used(rows: int, columns: int) -> bool:
    """Tells whether :func:`tile_shape` ever returns the tile, or it is one for the columns that remain."""
    if columns == 1:
        return True
    shapes = {tile_shape(num_tokens)[1:] for num_tokens in range(1, 8 * _SHAPES[-1][0])}
    return (rows, columns) in shapes
