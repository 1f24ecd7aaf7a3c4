"""LLVM IR of the matrix product of :mod:`kernels.cpu.products.matmul` for CPUs with a matrix unit (AMX).

One instruction multiplies a tile register of 16 tokens by 32 inputs with one of 32 inputs by 16 outputs. The weight's
columns, ``[O / 16, I / 2, 16, 2]``, are such tiles already, and the input's rows ``[T, I]`` are read as they lie. A
tile has one or two tile registers of tokens and as many of outputs. An output's sum goes through all inputs in the same
order whatever the tile, so its bits depend on its own row alone.
"""

from kernels.cpu.machine.columns_ir import LANES, columns_function
from kernels.cpu.machine.numbers_ir import HALVES, WIDE, narrow
from kernels.cpu.machine.target import Target
from kernels.cpu.products.matmul_ir import bias
from kernels.cpu.products.tiling import tile_name

TOKENS = 16
"""The tokens of a tile register."""

INPUTS = 32
"""The inputs of a tile register; a weight must have a multiple of them."""

ARGUMENTS = (
    *("x", "weight", "bias", "output", "ticket", "wide_tile", "narrow_tile"),
    *("x_tile", "output_tile", "row_stride", "column_stride"),
    *("num_pairs", "num_columns", "num_tiles", "columns", "unit", "rows"),
)
"""The arguments of ``product``: those of :mod:`kernels.cpu.products.matmul_ir`, and the rows of a tile."""

SHAPES = ((1, 1), (1, 2), (2, 1), (2, 2))
"""The tile registers of tokens, and the columns, of all tiles."""

_HEADER = """
declare void @llvm.x86.ldtilecfg(ptr)
declare void @llvm.x86.tilerelease()
declare void @llvm.x86.tilezero(i8)
declare void @llvm.x86.tileloadd64(i8, ptr, i64)
declare void @llvm.x86.tilestored64(i8, ptr, i64)
declare void @llvm.x86.tdpbf16ps(i8, i8, i8)
declare void @llvm.memset.p0.i64(ptr, i8, i64, i1)
"""
_LINE, _REGISTER = 64, 1024  # bytes of a row of a tile register, and of all its rows
# Where the tile registers' configuration has the bytes of register 0's rows, and their number; see Intel's manual.
_ROW_BYTES_AT, _ROWS_AT = 16, 48
_SUMS, _INPUTS, _WEIGHTS = 0, 4, 6  # the first tile register of each kind


def tile(target: Target, registers: int, columns: int) -> str:
    """Returns the function that multiplies ``rows`` rows of ``x`` by ``columns`` columns and adds the bias."""
    assert registers in (1, 2) and columns in (1, 2), (registers, columns)
    places = [(i, c) for i in range(registers) for c in range(columns)]
    width = columns * _LINE
    stores = "".join(
        f"""
  %sum_to_{i}_{c} = getelementptr i8, ptr %sums, i64 {i * TOKENS * width + c * _LINE}
  call void @llvm.x86.tilestored64(i8 {_sum(i, c, columns)}, ptr %sum_to_{i}_{c}, i64 {width})"""
        for i, c in places
    )
    zeros = "".join(f"\n  call void @llvm.x86.tilezero(i8 {_sum(i, c, columns)})" for i, c in places)
    return f"""
define void @{tile_name(registers, columns)}(ptr noalias %x, ptr noalias %weight, i64 %column_stride,
    ptr noalias %bias, ptr noalias %output, i64 %row_stride, i64 %num_pairs, i64 %rows) {{
entry:
  %config = alloca [64 x i8], align 64
  %sums = alloca [{registers * columns * _REGISTER} x i8], align 64{_configure(registers, columns)}{zeros}
  %x_stride = shl i64 %num_pairs, 2
  %num_steps = lshr i64 %num_pairs, {(INPUTS // 2).bit_length() - 1}
  br label %loop
loop:
  %step = phi i64 [0, %entry], [%next, %loop]{_multiply(registers, columns)}
  %next = add i64 %step, 1
  %more = icmp slt i64 %next, %num_steps
  br i1 %more, label %loop, label %store
store:{stores}
  call void @llvm.x86.tilerelease(){_output(target, columns)}
done:
  ret void
}}
"""


def _sum(register: int, column: int, columns: int) -> int:
    return _SUMS + register * columns + column


def _configure(registers: int, columns: int) -> str:
    """Returns code that tells the matrix unit the shapes of all tile registers, of which the last may be short."""
    fewer = f"""
  %is_short = icmp slt i64 %rows, {TOKENS}
  %rows_0 = select i1 %is_short, i64 %rows, i64 {TOKENS}
  %rows_1 = sub i64 %rows, {TOKENS}
  call void @llvm.memset.p0.i64(ptr %config, i8 0, i64 64, i1 false)
  store i8 1, ptr %config"""
    shapes = [(_sum(i, c, columns), f"%rows_{i}") for i in range(registers) for c in range(columns)]
    shapes += [(_INPUTS + i, f"%rows_{i}") for i in range(registers)]
    shapes += [(_WEIGHTS + c, str(INPUTS // 2)) for c in range(columns)]
    sets = "".join(
        f"""
  %bytes_at_{n} = getelementptr i8, ptr %config, i64 {_ROW_BYTES_AT + 2 * n}
  store i16 {_LINE}, ptr %bytes_at_{n}
  %rows_at_{n} = getelementptr i8, ptr %config, i64 {_ROWS_AT + n}
  %count_{n} = trunc i64 {rows} to i8
  store i8 %count_{n}, ptr %rows_at_{n}"""
        for n, rows in shapes
    )
    return fewer + sets + "\n  call void @llvm.x86.ldtilecfg(ptr %config)"


def _multiply(registers: int, columns: int) -> str:
    """Returns code that adds the products of the next 32 inputs to all sums."""
    text = f"""
  %x_at = mul i64 %step, {_LINE}
  %x_here_0 = getelementptr i8, ptr %x, i64 %x_at
  %w_at = mul i64 %step, {_REGISTER}
  %w_here_0 = getelementptr i8, ptr %weight, i64 %w_at"""
    for i in range(registers):
        if i:
            text += f"""
  %x_by_{i} = mul i64 %x_stride, {TOKENS * i}
  %x_here_{i} = getelementptr i8, ptr %x_here_0, i64 %x_by_{i}"""
        text += f"\n  call void @llvm.x86.tileloadd64(i8 {_INPUTS + i}, ptr %x_here_{i}, i64 %x_stride)"
    for c in range(columns):
        if c:
            text += f"\n  %w_here_{c} = getelementptr i8, ptr %w_here_{c - 1}, i64 %column_stride"
        text += f"\n  call void @llvm.x86.tileloadd64(i8 {_WEIGHTS + c}, ptr %w_here_{c}, i64 {_LINE})"
        for i in range(registers):
            operands = f"i8 {_sum(i, c, columns)}, i8 {_INPUTS + i}, i8 {_WEIGHTS + c}"
            text += f"\n  call void @llvm.x86.tdpbf16ps({operands})"
    return text


def _output(target: Target, columns: int) -> str:
    """Returns the loop that adds the bias to the sums of each row, rounds them and stores them."""
    loads, stores = "", ""
    for c in range(columns):
        loads += bias(c)
        stores += f"""
  %sum_at_{c} = getelementptr i8, ptr %sums_here, i64 {_LINE * c}
  %sum_{c} = load {WIDE}, ptr %sum_at_{c}, align 64
  %total_{c} = fadd {WIDE} %sum_{c}, %bias_{c}{narrow(target, f"rounded_{c}", f"total_{c}")}
  %to_{c} = getelementptr i8, ptr %output_here, i64 {2 * LANES * c}
  store {HALVES} %rounded_{c}, ptr %to_{c}, align 2"""
    return f"""{loads}
  br label %row
row:
  %r = phi i64 [0, %store], [%r_next, %row]
  %sums_by = mul i64 %r, {columns * _LINE}
  %sums_here = getelementptr i8, ptr %sums, i64 %sums_by
  %output_by = mul i64 %r, %row_stride
  %output_here = getelementptr i8, ptr %output, i64 %output_by{stores}
  %r_next = add i64 %r, 1
  %more_rows = icmp slt i64 %r_next, %rows
  br i1 %more_rows, label %row, label %done"""


def module(target: Target) -> str:
    """Returns the LLVM IR of ``product`` and of all tiles."""
    return _HEADER + _PRODUCT + "".join(tile(target, *shape) for shape in SHAPES)


# Rows first: the weights of a ticket stay in the second-level cache, and the rows are read from beyond it once for it.
_PRODUCT = columns_function(
    ARGUMENTS,
    ("x",),
    "ptr %x_here, ptr %w, i64 %column_stride, ptr %b, ptr %o_here, i64 %row_stride, i64 %num_pairs, i64 %rows",
    rows_first=True,
)
