"""LLVM IR of the matrix product of :mod:`kernels.cpu.products.matmul`: register tiles, and the loop over them.

The weight lies in columns of 16 outputs, ``[O / 16, I / 2, 16, 2]`` in bfloat16. One vector register holds the weights
of two inputs for 16 outputs, and AVX512-BF16's dot product of pairs adds both products to 16 float32 sums. A tile keeps
``rows`` times ``columns`` such sums in registers while it goes through all inputs in order. So an output's sum and its
bits depend on its own row alone, and not on the batch, the tile or the thread.

The input lies in tiles of ``rows`` tokens, ``[T / rows, I / 2, rows, 2]``, so that a tile reads it in one stream.
"""

from kernels.cpu.machine.columns_ir import LANES, columns_function

COLUMN_BYTES = 64
"""The bytes of one pair of inputs in a column of the weight: one vector, and one cache line."""

# For few rows the hardware's own prefetch suffices; with more rows the loop reads lines too rarely for it. Measured on
# Zen 4 with 1 to 24 rows and weights on huge pages.
_PREFETCH_FROM_ROWS = 9
_PREFETCH_BYTES = 2048

ARGUMENTS = (
    *("x", "weight", "bias", "output", "ticket", "wide_tile", "narrow_tile"),
    *("x_tile", "output_tile", "row_stride", "column_stride"),
    *("num_pairs", "num_columns", "num_tiles", "columns", "unit"),
)
"""The arguments of ``product``, 64 bits each: those of :func:`~kernels.cpu.machine.columns_ir.columns_function`, and
``num_pairs``, the number of pairs of inputs."""

HEADER = """
declare <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float>, <32 x bfloat>, <32 x bfloat>)
declare void @llvm.prefetch.p0(ptr, i32, i32, i32)
"""


def tile_name(rows: int, columns: int) -> str:
    """Returns the name of a tile's function."""
    return f"tile_{rows}_{columns}"


def tile(rows: int, columns: int) -> str:
    """Returns the function that multiplies ``x`` [I / 2, rows, 2] by ``columns`` columns and adds the bias."""
    sums = [(row, column) for row in range(rows) for column in range(columns)]
    lines = [
        f"define void @{tile_name(rows, columns)}(ptr noalias %x, ptr noalias %weight, i64 %column_stride,",
        "    ptr noalias %bias, ptr noalias %output, i64 %row_stride, i64 %num_pairs) {",
        "entry:",
        *(_bias(column) for column in range(columns)),
        "  br label %loop",
        "loop:",
        "  %pair = phi i64 [0, %entry], [%next, %loop]",
        *(f"  %sum_{r}_{c} = phi <16 x float> [%bias_{c}, %entry], [%new_{r}_{c}, %loop]" for r, c in sums),
        f"  %at = mul i64 %pair, {COLUMN_BYTES}",
        *(_weight(column, prefetch=rows >= _PREFETCH_FROM_ROWS) for column in range(columns)),
        f"  %x_at = mul i64 %pair, {4 * rows}",
        "  %x_here = getelementptr i8, ptr %x, i64 %x_at",
        *(_input(row, columns) for row in range(rows)),
        "  %next = add i64 %pair, 1",
        "  %more = icmp slt i64 %next, %num_pairs",
        "  br i1 %more, label %loop, label %done",
        "done:",
        *(row_output(row, columns) for row in range(rows)),
        "  ret void",
        "}",
    ]
    return "\n".join(lines)


def _bias(column: int) -> str:
    return f"""
  %bias_at_{column} = getelementptr i8, ptr %bias, i64 {4 * LANES * column}
  %bias_{column} = load <16 x float>, ptr %bias_at_{column}, align 4"""


def _weight(column: int, *, prefetch: bool) -> str:
    before = "%weight" if column == 0 else f"%start_{column - 1}"
    step = "0" if column == 0 else "%column_stride"
    text = f"""
  %start_{column} = getelementptr i8, ptr {before}, i64 {step}
  %here_{column} = getelementptr i8, ptr %start_{column}, i64 %at
  %w_{column} = load <32 x bfloat>, ptr %here_{column}, align 64"""
    if prefetch:
        text += f"""
  %ahead_{column} = getelementptr i8, ptr %here_{column}, i64 {_PREFETCH_BYTES}
  call void @llvm.prefetch.p0(ptr %ahead_{column}, i32 0, i32 3, i32 1)"""
    return text


def _input(row: int, columns: int) -> str:
    """Returns code that spreads a token's pair of inputs to all lanes, for a broadcast operand of the dot product."""
    text = f"""
  %pair_at_{row} = getelementptr i8, ptr %x_here, i64 {4 * row}
  %pair_{row} = load i32, ptr %pair_at_{row}, align 4
  %single_{row} = insertelement <16 x i32> poison, i32 %pair_{row}, i32 0
  %spread_{row} = shufflevector <16 x i32> %single_{row}, <16 x i32> poison, <16 x i32> zeroinitializer
  %x_{row} = bitcast <16 x i32> %spread_{row} to <32 x bfloat>"""
    for c in range(columns):
        product = "call <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512"
        text += f"""
  %new_{row}_{c} = {product}(<16 x float> %sum_{row}_{c}, <32 x bfloat> %w_{c}, <32 x bfloat> %x_{row})"""
    return text


def row_output(row: int, columns: int) -> str:
    """Returns code that rounds a row's sums, ``%new_ROW_COLUMN``, and stores them in ``%output``."""
    text = f"""
  %row_at_{row} = mul i64 %row_stride, {row}
  %row_{row} = getelementptr i8, ptr %output, i64 %row_at_{row}"""
    for c in range(columns):
        text += f"""
  %narrow_{row}_{c} = fptrunc <16 x float> %new_{row}_{c} to <16 x bfloat>
  %to_{row}_{c} = getelementptr i8, ptr %row_{row}, i64 {2 * LANES * c}
  store <16 x bfloat> %narrow_{row}_{c}, ptr %to_{row}_{c}, align 2"""
    return text


PRODUCT = columns_function(
    ARGUMENTS,
    ("x",),
    "ptr %x_here, ptr %w, i64 %column_stride, ptr %b, ptr %o_here, i64 %row_stride, i64 %num_pairs",
)
