"""LLVM IR of the loop that distributes a product's columns, 16 outputs each, over the threads that share it."""

from collections.abc import Sequence
from dataclasses import dataclass

from kernels.cpu.machine.work_ir import load_arguments, take_tickets

LANES = 16
LINE_BYTES = 64
_NEAR_BYTES = 4096  # ahead of what a thread reads; measured with 1 to 6 rows, where more or less is no faster


@dataclass(frozen=True, slots=True)
class ColumnTile:
    """One of ``count`` equally wide tiles of a product's outputs, the ``number``-th from 0."""

    number: int = 0
    count: int = 1

    def columns(self, num_columns: int) -> tuple[int, int]:
        """Returns the first column of the tile and how many it has, of ``num_columns`` columns of 16 outputs in all."""
        assert num_columns % self.count == 0, (self, num_columns)
        width = num_columns // self.count
        return self.number * width, width


WHOLE = ColumnTile()


def columns_function(
    fields: Sequence[str], inputs: Sequence[str], tile_arguments: str, *, rows_first: bool = False
) -> str:
    """Returns the function ``@product(args)``, which computes columns of a product until none is left.

    It takes columns by tickets. With some columns it computes all tiles of rows, and goes on to the next; with
    ``rows_first`` it computes all columns of a ticket for some rows, and goes on to the next tile of rows.

    Args:
        fields: the names of its arguments. Needed are the addresses ``weight``, ``bias``, ``output`` and ``ticket`` (of
            a zero); the functions ``wide_tile``, for ``columns`` columns at a time, and ``narrow_tile``, for one;
            ``output_tile`` and ``column_stride`` in bytes; ``num_columns`` and ``num_tiles``; and ``unit``, the number
            of columns that a ticket stands for.
        inputs: the names of those fields that move on by ``NAME_tile`` bytes from one tile of rows to the next.
        tile_arguments: the arguments of a tile's function: ``%NAME_here`` for inputs, ``%w``, ``%b`` and ``%o_here``
            for weight, bias and output, ``%ahead`` and ``%ahead_step``, or any field. The last two say what to prefetch
            with a weight's first line, and by how many bytes it moves on with each line. For one tile of rows it is a
            line some lines ahead; of several tiles each has its part of the next columns, so that memory is read while
            all of them are computed, and not while the first is.
    """
    outer, inner = ("row", "column") if rows_first else ("column", "row")
    call = f"{_PLACES}\n  call void %tile({tile_arguments})"
    bodies = {"column": _COLUMN, "row": _row(inputs)}
    return f"""
define void @product(ptr %args) {{
entry:{load_arguments(fields)}
  %weight_ptr = inttoptr i64 %weight to ptr
  %bias_ptr = inttoptr i64 %bias to ptr
  %output_ptr = inttoptr i64 %output to ptr
  %wide_ptr = inttoptr i64 %wide_tile to ptr
  %narrow_ptr = inttoptr i64 %narrow_tile to ptr
  %is_single = icmp eq i64 %num_tiles, 1
  %ahead_step = udiv i64 {LINE_BYTES}, %num_tiles
  %ahead_part = udiv i64 %column_stride, %num_tiles{take_tickets("num_columns", outer)}
{outer}:{_count(outer, "begin", f"{outer}_end")}{bodies[outer]}
  br label %{inner}
{inner}:{_count(inner, outer, inner)}{bodies[inner]}{call}{_next(inner, f"{outer}_end")}
{outer}_end:{_next(outer, "take")}
end:
  ret void
}}
"""


def _count(loop: str, before: str, again: str) -> str:
    """Returns the number of the column or of the tile of rows that a loop is at, which begins after ``before``."""
    name, first = ("c", "%first") if loop == "column" else ("i", "0")
    return f"\n  %{name} = phi i64 [{first}, %{before}], [%{name}_next, %{again}]"


def _next(loop: str, after: str) -> str:
    """Returns the end of a loop's body, which goes on with the next or to ``after``."""
    name, step, stop = ("c", "%step", "%stop") if loop == "column" else ("i", "1", "%num_tiles")
    return f"""
  %{name}_next = add i64 %{name}, {step}
  %more_{name} = icmp slt i64 %{name}_next, {stop}
  br i1 %more_{name}, label %{loop}, label %{after}"""


_COLUMN = f"""
  %missing = sub i64 %stop, %c
  %is_wide = icmp sge i64 %missing, %columns
  %tile = select i1 %is_wide, ptr %wide_ptr, ptr %narrow_ptr
  %step = select i1 %is_wide, i64 %columns, i64 1
  %w_at = mul i64 %c, %column_stride
  %w = getelementptr i8, ptr %weight_ptr, i64 %w_at
  %w_bytes = mul i64 %step, %column_stride
  %w_near = getelementptr i8, ptr %w, i64 {_NEAR_BYTES}
  %w_next = getelementptr i8, ptr %w, i64 %w_bytes
  %ahead_first = select i1 %is_single, ptr %w_near, ptr %w_next
  %b_at = mul i64 %c, {4 * LANES}
  %b = getelementptr i8, ptr %bias_ptr, i64 %b_at
  %o_at = mul i64 %c, {2 * LANES}"""

_PLACES = """
  %o = getelementptr i8, ptr %output_ptr, i64 %o_at
  %o_here = getelementptr i8, ptr %o, i64 %o_tile_at
  %ahead_by = mul i64 %i, %ahead_part
  %ahead = getelementptr i8, ptr %ahead_first, i64 %ahead_by"""


def _row(inputs: Sequence[str]) -> str:
    """Returns the code that finds a tile of rows in the inputs and the output."""
    moves = "".join(
        f"""
  %{name}_by = mul i64 %i, %{name}_tile
  %{name}_sum = add i64 %{name}, %{name}_by
  %{name}_here = inttoptr i64 %{name}_sum to ptr"""
        for name in inputs
    )
    return f"{moves}\n  %o_tile_at = mul i64 %i, %output_tile"
