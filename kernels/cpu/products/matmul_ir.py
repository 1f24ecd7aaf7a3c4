"""LLVM IR of the matrix product of :mod:`kernels.cpu.products.matmul`: register tiles, and the loop over them.

The weight lies in columns of 16 outputs, ``[O / 16, I / 2, 16, 2]`` in bfloat16, so that a cache line holds the weights
of two inputs, a pair, for 16 outputs. A tile keeps ``rows`` times ``columns`` vectors of 16 float32 sums in registers
while it goes through all inputs in order. So an output's sum and its bits depend on its own row alone, and not on the
batch, the tile or the thread.

Where the target multiplies pairs (AVX512-BF16), one instruction adds the products of a pair to 16 sums. The input lies
in tiles of ``rows`` tokens then, ``[T / rows, I / 2, rows, 2]``, so that a tile reads it in one stream. Other targets
widen the weights, by shift and mask, and multiply one input after the other. Tiles of several tokens hold the input in
float32, ``[T / rows, I, rows]``, so that it is not widened again for every column.
"""

from collections.abc import Iterator

from kernels.cpu.machine.columns_ir import LANES, columns_function
from kernels.cpu.machine.numbers_ir import HALVES, WIDE, WORDS, narrow
from kernels.cpu.machine.target import Target
from kernels.cpu.products.tiling import Layout, tile_name

COLUMN_BYTES = 64
"""The bytes of one pair of inputs in a column of the weight: one cache line."""

# Where pairs are multiplied, the hardware's own prefetch suffices for few rows; with more rows the loop reads lines too
# rarely for it. Measured on Zen 4 with 1 to 24 rows and weights on huge pages. Where each line takes longer, it is so
# from the first row on: without prefetch, 4 rows read the weight at half the speed (on an Emerald Rapids, as avx2).
_PREFETCH_FROM_ROWS = 9

ARGUMENTS = (
    *("x", "weight", "bias", "output", "ticket", "wide_tile", "narrow_tile"),
    *("x_tile", "output_tile", "row_stride", "column_stride"),
    *("num_pairs", "num_columns", "num_tiles", "columns", "unit"),
)
"""The arguments of ``product``, 64 bits each: those of :func:`~kernels.cpu.machine.columns_ir.columns_function`, and
``num_pairs``, the number of pairs of inputs."""

FMA = f"call {WIDE} @llvm.fmuladd.v16f32"
DECLARE_FMA = f"declare {WIDE} @llvm.fmuladd.v16f32({WIDE}, {WIDE}, {WIDE})\n"
DOT = f"call {WIDE} @llvm.x86.avx512bf16.dpbf16ps.512"
DECLARE_DOT = f"declare {WIDE} @llvm.x86.avx512bf16.dpbf16ps.512({WIDE}, <32 x bfloat>, <32 x bfloat>)\n"
DECLARE_PREFETCH = "declare void @llvm.prefetch.p0(ptr, i32, i32, i32)\n"


def header(target: Target) -> str:
    """Returns the declarations that the tiles need."""
    return DECLARE_PREFETCH + (DECLARE_DOT if target.multiplies_pairs else DECLARE_FMA)


def tile(target: Target, rows: int, columns: int) -> str:
    """Returns the function that multiplies a tile of ``x`` by ``columns`` columns and adds the bias."""
    sums = [(row, column) for row in range(rows) for column in range(columns)]
    layout = Layout.PAIRS if target.multiplies_pairs else Layout.FLOATS
    multiplied = _multiplied_in_pairs(rows, columns) if target.multiplies_pairs else _multiplied_wide(rows, columns)
    lines = [
        f"define void @{tile_name(rows, columns)}(ptr noalias %x, ptr noalias %weight, i64 %column_stride,",
        "    ptr noalias %bias, ptr noalias %output, i64 %row_stride, i64 %num_pairs, ptr %ahead, i64 %ahead_step) {",
        "entry:",
        *(bias(column) for column in range(columns)),
        "  br label %loop",
        "loop:",
        "  %pair = phi i64 [0, %entry], [%next, %loop]",
        *(f"  %sum_{r}_{c} = phi {WIDE} [%bias_{c}, %entry], [%new_{r}_{c}, %loop]" for r, c in sums),
        f"  %at = mul i64 %pair, {COLUMN_BYTES}",
        *(_weight(column) for column in range(columns)),
        *(_prefetch(columns) if not target.multiplies_pairs or rows >= _PREFETCH_FROM_ROWS else ()),
        f"  %x_at = mul i64 %pair, {pair_bytes(layout, rows)}",
        "  %x_here = getelementptr i8, ptr %x, i64 %x_at",
        *multiplied,
        "  %next = add i64 %pair, 1",
        "  %more = icmp slt i64 %next, %num_pairs",
        "  br i1 %more, label %loop, label %done",
        "done:",
        *(row_output(target, row, columns) for row in range(rows)),
        "  ret void",
        "}",
    ]
    return "\n".join(lines)


def pair_bytes(layout: Layout, rows: int) -> int:
    """Returns the bytes of one pair of inputs of ``rows`` tokens."""
    return 8 * rows if layout is Layout.FLOATS and rows > 1 else 4 * rows


def bias(column: int) -> str:
    """Returns code that loads the bias of one of a tile's columns."""
    return f"""
  %bias_at_{column} = getelementptr i8, ptr %bias, i64 {4 * LANES * column}
  %bias_{column} = load {WIDE}, ptr %bias_at_{column}, align 4"""


def _weight(column: int) -> str:
    before = "%weight" if column == 0 else f"%start_{column - 1}"
    step = "0" if column == 0 else "%column_stride"
    return f"""
  %start_{column} = getelementptr i8, ptr {before}, i64 {step}
  %here_{column} = getelementptr i8, ptr %start_{column}, i64 %at
  %words_{column} = load {WORDS}, ptr %here_{column}, align 64"""


def _prefetch(columns: int) -> Iterator[str]:
    """Yields code that prefetches what ``%ahead`` says, and as much of the columns beside it."""
    yield "  %ahead_at = mul i64 %pair, %ahead_step\n  %ahead_0 = getelementptr i8, ptr %ahead, i64 %ahead_at"
    for c in range(columns):
        if c:
            yield f"  %ahead_{c} = getelementptr i8, ptr %ahead_{c - 1}, i64 %column_stride"
        yield f"  call void @llvm.prefetch.p0(ptr %ahead_{c}, i32 0, i32 3, i32 1)"


def _multiplied_in_pairs(rows: int, columns: int) -> Iterator[str]:
    """Yields code that adds the products of a pair of inputs to all sums, by one instruction for each."""
    for c in range(columns):
        yield f"  %w_{c} = bitcast {WORDS} %words_{c} to <32 x bfloat>"
    for row in range(rows):
        yield input_pair(f"x_{row}", f"{4 * row}")
        for c in range(columns):
            yield f"  %new_{row}_{c} = {DOT}({WIDE} %sum_{row}_{c}, <32 x bfloat> %w_{c}, <32 x bfloat> %x_{row})"


def input_pair(name: str, offset: str) -> str:
    """Returns code that spreads a token's pair of inputs to all lanes, for a broadcast operand of the dot product."""
    return f"""{spread_words(name, offset)}
  %{name} = bitcast {WORDS} %{name}_spread to <32 x bfloat>"""


def spread_words(name: str, offset: str) -> str:
    """Returns code that spreads the 32 bits at ``offset`` bytes after ``%x_here`` to all lanes of ``%NAME_spread``."""
    return f"""
  %{name}_place = getelementptr i8, ptr %x_here, i64 {offset}
  %{name}_word = load i32, ptr %{name}_place, align 4
  %{name}_single = insertelement {WORDS} poison, i32 %{name}_word, i32 0
  %{name}_spread = shufflevector {WORDS} %{name}_single, {WORDS} poison, <16 x i32> zeroinitializer"""


def _multiplied_wide(rows: int, columns: int) -> Iterator[str]:
    """Yields code that adds the products of the first input of a pair to all sums, and then those of the second."""
    for half in range(2):
        for c in range(columns):
            # Loaded anew for the second input, since LLVM would else spill sums to keep the words in a register.
            words = f"words_{c}" if half == 0 else f"again_{c}"
            if half:
                yield f"  %{words} = load volatile {WORDS}, ptr %here_{c}, align 64"
            yield widened_half(f"w_{half}_{c}", words, half)
        for row in range(rows):
            yield input_number(f"x_{half}_{row}", rows, row, half)
            for c in range(columns):
                before, after = ("sum", "mid") if half == 0 else ("mid", "new")
                factors = f"{WIDE} %w_{half}_{c}, {WIDE} %x_{half}_{row}"
                yield f"  %{after}_{row}_{c} = {FMA}({factors}, {WIDE} %{before}_{row}_{c})"


def widened_half(name: str, words: str, half: int) -> str:
    """Returns code for float32 ``%name`` of the lower (0) or upper (1) halves of words, each a bfloat16."""
    moved = f"shl {WORDS} %{words}, splat (i32 16)" if half == 0 else f"and {WORDS} %{words}, splat (i32 -65536)"
    return f"""
  %{name}_bits = {moved}
  %{name} = bitcast {WORDS} %{name}_bits to {WIDE}"""


def input_number(name: str, rows: int, row: int, half: int, before: int = 0) -> str:
    """Returns code that spreads one of a token's pair of inputs to all lanes of float32 ``%name``.

    ``before`` is the number of pairs between ``%x_here`` and this one.
    """
    if rows == 1:
        pair = f"{name}_pair"
        return spread_words(pair, f"{4 * before}") + widened_half(name, f"{pair}_spread", half)
    return f"""{spread_words(name, f"{8 * rows * before + 4 * (half * rows + row)}")}
  %{name} = bitcast {WORDS} %{name}_spread to {WIDE}"""


def row_output(target: Target, row: int, columns: int) -> str:
    """Returns code that rounds a row's sums, ``%new_ROW_COLUMN``, and stores them in ``%output``."""
    text = f"""
  %row_at_{row} = mul i64 %row_stride, {row}
  %row_{row} = getelementptr i8, ptr %output, i64 %row_at_{row}"""
    for c in range(columns):
        text += f"""{narrow(target, f"narrow_{row}_{c}", f"new_{row}_{c}")}
  %to_{row}_{c} = getelementptr i8, ptr %row_{row}, i64 {2 * LANES * c}
  store {HALVES} %narrow_{row}_{c}, ptr %to_{row}_{c}, align 2"""
    return text


PRODUCT = columns_function(
    ARGUMENTS,
    ("x",),
    "ptr %x_here, ptr %w, i64 %column_stride, ptr %b, ptr %o_here, i64 %row_stride, i64 %num_pairs, "
    "ptr %ahead, i64 %ahead_step",
)
