"""LLVM IR of the loop that hands out a product's columns, 16 outputs each, to the threads that share it."""

from collections.abc import Sequence
from dataclasses import dataclass

from kernels.cpu.machine.work_ir import load_job, take_tickets

LANES = 16


@dataclass(frozen=True, slots=True)
class Strip:
    """The ``number``-th of ``count`` parts of a product's outputs, as wide as the others."""

    number: int = 0
    count: int = 1

    def of(self, num_columns: int) -> tuple[int, int]:
        """The first of its columns of 16 outputs, and how many there are."""
        assert num_columns % self.count == 0, (self, num_columns)
        width = num_columns // self.count
        return self.number * width, width


WHOLE = Strip()


def columns_work(job: Sequence[str], inputs: Sequence[str], arguments: str) -> str:
    """``@work(job)``: takes columns until none is left, and computes all tiles of rows with them.

    Args:
        job: names of its fields. Needed are addresses ``weight``, ``bias``, ``output`` and ``ticket``, a zero;
            functions ``wide_tile``, for ``columns`` columns at a time, and ``narrow_tile`` for one of the rest;
            ``output_tile`` and ``column_stride`` in bytes; ``num_columns``, ``num_tiles``; and ``unit``, how many
            columns a ticket stands for.
        inputs: of the fields, those that move with the tile of rows, by the bytes in the field ``NAME_tile``.
        arguments: of a tile's function: ``%NAME_here`` for inputs, ``%w``, ``%b`` and ``%o_here`` for weight, bias
            and output, or any field.
    """
    moves = "".join(
        f"""
  %{name}_by = mul i64 %i, %{name}_tile
  %{name}_sum = add i64 %{name}, %{name}_by
  %{name}_here = inttoptr i64 %{name}_sum to ptr"""
        for name in inputs
    )
    return f"""
define void @work(ptr %job) {{
entry:{load_job(job)}
  %weight_ptr = inttoptr i64 %weight to ptr
  %bias_ptr = inttoptr i64 %bias to ptr
  %output_ptr = inttoptr i64 %output to ptr
  %wide_ptr = inttoptr i64 %wide_tile to ptr
  %narrow_ptr = inttoptr i64 %narrow_tile to ptr{take_tickets("num_columns", "column")}
column:
  %c = phi i64 [%first, %begin], [%c_next, %column_end]
  %missing = sub i64 %stop, %c
  %is_wide = icmp sge i64 %missing, %columns
  %tile = select i1 %is_wide, ptr %wide_ptr, ptr %narrow_ptr
  %step = select i1 %is_wide, i64 %columns, i64 1
  %w_at = mul i64 %c, %column_stride
  %w = getelementptr i8, ptr %weight_ptr, i64 %w_at
  %b_at = mul i64 %c, {4 * LANES}
  %b = getelementptr i8, ptr %bias_ptr, i64 %b_at
  %o_at = mul i64 %c, {2 * LANES}
  %o = getelementptr i8, ptr %output_ptr, i64 %o_at
  br label %row
row:
  %i = phi i64 [0, %column], [%i_next, %row]{moves}
  %o_tile_at = mul i64 %i, %output_tile
  %o_here = getelementptr i8, ptr %o, i64 %o_tile_at
  call void %tile({arguments})
  %i_next = add i64 %i, 1
  %more_rows = icmp slt i64 %i_next, %num_tiles
  br i1 %more_rows, label %row, label %column_end
column_end:
  %c_next = add i64 %c, %step
  %more_columns = icmp slt i64 %c_next, %stop
  br i1 %more_columns, label %column, label %take
end:
  ret void
}}
"""
