"""Products with a bfloat16 weight: see :mod:`kernels.cpu.products.matmul_ir` and :mod:`kernels.cpu.products.amx_ir`.

For few tokens the code reads the weight at the speed of memory, and for many it computes at the speed of the vector or
matrix units. In between, where a library's matrix product does neither well, it gains the most.

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
from kernels.cpu.machine.target import Target, chosen
from kernels.cpu.machine.threads import Operation
from kernels.cpu.products import amx_ir
from kernels.cpu.products.matmul_ir import ARGUMENTS, COLUMN_BYTES, PRODUCT, header, pair_bytes, tile
from kernels.cpu.products.tiling import MATRIX_SHAPES, Layout, shapes, tile_name, unit_for, used_shapes

_ARGUMENTS = struct.Struct(f"={len(ARGUMENTS)}q")
_AMX_ARGUMENTS = struct.Struct(f"={len(amx_ir.ARGUMENTS)}q")
_MOST_TOKENS = 200  # from there on the same tiles are used again


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

    @property
    def column_bytes(self) -> int:
        """Returns the bytes of a column."""
        return self.num_inputs // 2 * COLUMN_BYTES

    @property
    def layout(self) -> Layout:
        """Returns how the input lies that it is multiplied with."""
        return layout_for(chosen(), self.num_inputs)

    def tile_shape(self, num_tokens: int) -> tuple[int, int, int]:
        """Returns the number of tiles for a batch, the rows of each, and its columns."""
        fitting = MATRIX_SHAPES if self.layout is Layout.ROWS else shapes(chosen())
        return fitting.shape_for(num_tokens)


def layout_for(target: Target, num_inputs: int) -> Layout:
    """Returns how the input lies for a weight with so many inputs."""
    if target.has_matrix_unit and num_inputs % amx_ir.INPUTS == 0:
        return Layout.ROWS
    return Layout.PAIRS if target.multiplies_pairs else Layout.FLOATS


def huge_empty(shape: tuple[int, ...]) -> Tensor:
    """Allocates 32-bit integers, on huge pages where the system has them, so that reads walk the page tables less."""
    num_bytes = 4 * torch.Size(shape).numel()
    if num_bytes < HUGE_PAGE:
        return torch.empty(shape, dtype=torch.int32)
    return map_zeros(num_bytes).view(torch.int32).view(shape)


def multiply(x: Tensor, weight: PackedWeight) -> Tensor:
    """Computes ``x W^T + b`` [T, O] of ``x`` [T, I], summed in float32 and rounded once."""
    num_tokens, num_inputs = x.shape
    assert num_inputs == weight.num_inputs and x.dtype == torch.bfloat16, (x.shape, x.dtype)
    if not num_tokens:
        return x.new_empty(0, weight.num_outputs)
    num_tiles, rows, _ = weight.tile_shape(num_tokens)
    tiles = in_tiles(x, num_tiles, rows, weight.layout)
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
    first, num_columns = column_tile.columns(weight.num_columns)
    num_tiles, rows, columns = weight.tile_shape(num_tokens)
    unit = unit_for(num_columns, columns, num_threads, weight.column_bytes)
    code, wide_tile, narrow_tile = _functions(weight.layout, rows, columns)
    output_row = 2 * LANES * weight.num_columns
    fields = (
        *(tiles, weight.columns[first:].data_ptr(), weight.bias[first * LANES :].data_ptr()),
        *(output + 2 * LANES * first, ticket, wide_tile, narrow_tile),
        *(weight.num_inputs // 2 * pair_bytes(weight.layout, rows), rows * output_row, output_row),
        *(weight.column_bytes, weight.num_inputs // 2, num_columns, num_tiles, columns, unit),
    )
    if weight.layout is Layout.ROWS:
        return code, _AMX_ARGUMENTS.pack(*fields, rows)
    return code, _ARGUMENTS.pack(*fields)


def _functions(layout: Layout, rows: int, columns: int) -> tuple[int, int, int]:
    """Returns the addresses of ``product``, and of the tiles of ``columns`` columns and of one column."""
    if layout is Layout.ROWS:
        code, registers = _compiled_for_amx(), -(-rows // amx_ir.TOKENS)
        return code["product"], code[tile_name(registers, columns)], code[tile_name(registers, 1)]
    code = _compiled()
    return code["product"], code[tile_name(rows, columns)], code[tile_name(rows, 1)]


def in_tiles(x: Tensor, num_tiles: int, rows: int, layout: Layout) -> Tensor:
    """Lays ``x`` [T, I] out in tiles, with zeros for missing rows; a single row stays as it is."""
    missing = num_tiles * rows - len(x)
    if missing:
        x = F.pad(x, (0, 0, 0, missing))
    if layout is Layout.ROWS or rows == 1:
        return x.contiguous()
    numbers = x.float() if layout is Layout.FLOATS else x.contiguous().view(torch.int32)
    return numbers.view(num_tiles, rows, -1).transpose(1, 2).contiguous()


@cache
def _compiled_for_amx() -> dict[str, int]:
    """Compiles the functions for a matrix unit, and returns their addresses by name."""
    names = ["product", *(tile_name(*shape) for shape in amx_ir.SHAPES)]
    return machine_code.addresses(amx_ir.module(chosen()), names)


@cache
def _compiled() -> dict[str, int]:
    """Compiles the functions of all tiles and of ``product``, and returns their addresses by name."""
    names = ["product", *(tile_name(*shape) for shape in _needed(chosen()))]
    return machine_code.addresses(module(chosen()), names)


def module(target: Target) -> str:
    """Returns the LLVM IR of ``product`` and of all tiles, but those of a matrix unit."""
    return header(target) + PRODUCT + "\n".join(tile(target, *shape) for shape in _needed(target))


def _needed(target: Target) -> list[tuple[int, int]]:
    return used_shapes(shapes(target).shape_for, _MOST_TOKENS)
