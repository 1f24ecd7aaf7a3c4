"""LLVM IR of the matrix product with rounded weights of :mod:`kernels.cpu.products.quantized`.

The weight stays packed in memory and is widened in registers, just before it is multiplied. So few tokens, which are
bound by memory, wait for half or a quarter of the bytes. As in :mod:`kernels.cpu.products.matmul_ir` a column holds 16
outputs, and a tile has ``rows`` times ``columns`` vectors of float32 sums. Here a sum goes over one group of inputs and
starts from zero, and is multiplied by the group's scale and added to its output's total. That order is the same in
every tile, so an output's bits depend on its own row alone, and not on batch, tile or thread.

A column is one stream of 64-byte lines. A group of inputs begins with its 16 scales in float32. Where the weight has
offsets, the 16 offsets follow. Then come the codes. Where the target multiplies pairs of bfloat16 and has the shuffles
for it, they are looked up in tables of bfloat16:

    4 bits  A line is 4 pairs of inputs. Word [output, 2] holds the codes of the 4 pairs, the first in its lowest bits.
            The word is shifted right, and its low 5 bits are looked up in a table of 32 values. The table holds 16
            values twice, so the fifth bit needs no mask.
    8 bits  A line is 2 pairs, bytes [output / 4, pair, output % 4, 2] of sign and magnitude. High and low byte of the
            bfloat16 are looked up by the magnitude, the high one gets the sign, and both are interleaved.

Everywhere else a line is 4 or 8 inputs. Codes are two's complement, which is converted to float32:

    4 bits  Word [output] holds the codes of 8 inputs, the first in its lowest bits. A code is shifted to the word's
            upper end, and the bits below are cut off. That it is then too great by a power of two is made good in the
            scale, so inputs beyond 2^90 would overflow.
    8 bits  Bytes [input, output].

The input lies in tiles of ``rows`` tokens as there, ``[T / rows, I / 2, rows, 2]`` in bfloat16 for tables, and else in
float32 ``[T / rows, I, rows]``.
"""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kernels.cpu.machine.columns_ir import LANES, columns_function
from kernels.cpu.machine.numbers_ir import WIDE, WORDS
from kernels.cpu.machine.target import Target
from kernels.cpu.machine.work_ir import load_arguments
from kernels.cpu.products.matmul_ir import (
    DECLARE_DOT,
    DECLARE_FMA,
    DECLARE_PREFETCH,
    DOT,
    FMA,
    bias,
    input_number,
    input_pair,
    pair_bytes,
    row_output,
)
from kernels.cpu.products.tiling import Layout, tile_name

LINE_BYTES = 64
PAIRS_PER_LINE = {4: 4, 8: 2}

# How far ahead lines are prefetched. With more rows a line lasts longer, and the hardware's own prefetch helps less.
# Measured on Zen 4.
_PREFETCH_BYTES, _PREFETCH_BYTES_OF_MANY, _MANY_ROWS = 512, 1024, 7

_NIBBLE_FACTOR = 1 << 28

ARGUMENTS = (
    *("x", "sums", "weight", "bias", "output", "ticket", "wide_tile", "narrow_tile"),
    *("x_tile", "sums_tile", "output_tile", "row_stride", "column_stride", "num_groups", "num_lines"),
    *("num_columns", "num_tiles", "columns", "unit"),
)
"""The arguments of ``product``, 64 bits each. ``sums`` is the address of the sums of each token's inputs in each group,
``[T / rows, groups, rows]`` in float32, where the weight has offsets. ``num_lines`` is the number of lines of codes in
a group. The others are those of :func:`kernels.cpu.machine.columns_ir.columns_function`."""

_DECLARE_TABLES = """declare <32 x i16> @llvm.x86.avx512.permvar.hi.512(<32 x i16>, <32 x i16>)
declare <64 x i8> @llvm.x86.avx512.vpermi2var.qi.512(<64 x i8>, <64 x i8>, <64 x i8>)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """How a weight is packed.

    Attributes:
        bits: the bits of a code.
        offsets: whether each group has an offset. With tables a code of 8 bits then stands for its value plus a half,
            so that there are 256 values.
        tables: whether codes are looked up in tables, and multiplied in pairs of bfloat16.
    """

    bits: int
    offsets: bool
    tables: bool

    @property
    def layout(self) -> Layout:
        """Returns how the input lies that it is multiplied with."""
        return Layout.PAIRS if self.tables else Layout.FLOATS

    @property
    def num_pairs(self) -> int:
        """Returns the pairs of inputs in a line."""
        return PAIRS_PER_LINE[self.bits]


def header(form: Format) -> str:
    """Returns the declarations that the tiles need."""
    return DECLARE_PREFETCH + DECLARE_FMA + (DECLARE_DOT + _DECLARE_TABLES if form.tables else "")


def tile(target: Target, form: Format, rows: int, columns: int) -> str:
    """Returns the function that multiplies a tile of ``x`` by ``columns`` columns and adds the bias."""
    sums = [(row, column) for row in range(rows) for column in range(columns)]
    lines = [
        f"define void @{tile_name(rows, columns)}(ptr noalias %x, ptr noalias %sums, ptr noalias %weight,",
        "    ptr noalias %bias, ptr noalias %output, ptr noalias %args) {",
        f"entry:{load_arguments(ARGUMENTS, ('row_stride', 'column_stride', 'num_groups', 'num_lines'))}",
        *(bias(column) for column in range(columns)),
        "  br label %group",
        "group:",
        "  %g = phi i64 [0, %entry], [%g_next, %group_end]",
        "  %x_group = phi ptr [%x, %entry], [%x_next, %group_end]",
        "  %head_0 = phi ptr [%weight, %entry], [%line_next, %group_end]",
        *(f"  %total_{r}_{c} = phi <16 x float> [%bias_{c}, %entry], [%new_{r}_{c}, %group_end]" for r, c in sums),
        f"  %codes = getelementptr i8, ptr %head_0, i64 {LINE_BYTES * (1 + form.offsets)}",
        "  br label %loop",
        *_loop(form, rows, columns),
        "group_end:",
        *(_scale(form, column) for column in range(columns)),
        *(_scaled(form, row, column) for row, column in sums),
        *(_offset(rows, columns) if form.offsets else ()),
        "  %g_next = add i64 %g, 1",
        "  %more_groups = icmp slt i64 %g_next, %num_groups",
        "  br i1 %more_groups, label %group, label %done",
        "done:",
        *(row_output(target, row, columns) for row in range(rows)),
        "  ret void",
        "}",
    ]
    return "\n".join(lines)


def _loop(form: Format, rows: int, columns: int) -> Iterator[str]:
    """Yields the loop over the lines of a group, one of every column at a time."""
    yield """
loop:
  %line = phi i64 [0, %group], [%next, %loop]
  %x_here = phi ptr [%x_group, %group], [%x_next, %loop]
  %line_0 = phi ptr [%codes, %group], [%line_next, %loop]"""
    for r in range(rows):
        for c in range(columns):
            last = f"%sum_{r}_{c}_{form.num_pairs}"
            yield f"  %sum_{r}_{c}_0 = phi <16 x float> [zeroinitializer, %group], [{last}, %loop]"
    for column in range(columns):
        yield _line(column, _PREFETCH_BYTES if rows < _MANY_ROWS else _PREFETCH_BYTES_OF_MANY)
    for pair in range(form.num_pairs):
        yield from (_pair if form.tables else _wide_pair)(form, pair, rows, columns)
    yield f"""
  %x_next = getelementptr i8, ptr %x_here, i64 {pair_bytes(form.layout, rows) * form.num_pairs}
  %line_next = getelementptr i8, ptr %line_0, i64 {LINE_BYTES}
  %next = add i64 %line, 1
  %more = icmp slt i64 %next, %num_lines
  br i1 %more, label %loop, label %group_end"""


def _beside(name: str, column: int) -> str:
    """Returns code for the pointer ``name`` of a column, from that of the column before it."""
    return f"\n  %{name}_{column} = getelementptr i8, ptr %{name}_{column - 1}, i64 %column_stride" if column else ""


def _line(column: int, prefetch_bytes: int) -> str:
    return f"""{_beside("line", column)}
  %ahead_{column} = getelementptr i8, ptr %line_{column}, i64 {prefetch_bytes}
  call void @llvm.prefetch.p0(ptr %ahead_{column}, i32 0, i32 3, i32 1)"""


def _pair(form: Format, pair: int, rows: int, columns: int) -> Iterator[str]:
    """Yields code for one pair of inputs of every column, looked up in tables, and its products with every row."""
    for column in range(columns):
        if pair == 0:
            yield f"  %words_{column} = load <32 x i16>, ptr %line_{column}, align {LINE_BYTES}"
        yield _widen_nibbles(pair, column) if form.bits == 4 else _widen_bytes(pair, column, form.offsets)
    for row in range(rows):
        yield input_pair(f"x_{row}_{pair}", f"{4 * (pair * rows + row)}")
        for c in range(columns):
            yield (
                f"  %sum_{row}_{c}_{pair + 1} = {DOT}({WIDE} %sum_{row}_{c}_{pair}, "
                f"<32 x bfloat> %w_{c}_{pair}, <32 x bfloat> %x_{row}_{pair})"
            )


def _wide_pair(form: Format, pair: int, rows: int, columns: int) -> Iterator[str]:
    """Yields code for one pair of inputs of every column, widened to float32, and its products with every row."""
    for half in range(2):
        if rows > 1:  # LLVM keeps this order, in which one input after the other takes a register
            yield from (_widen_code(form, 2 * pair + half, c) for c in range(columns))
        for row in range(rows):
            yield input_number(f"x_{row}_{pair}_{half}", rows, row, half, before=pair)
            for c in range(columns):
                if rows == 1:
                    yield _widen_code(form, 2 * pair + half, c)
                before = f"%sum_{row}_{c}_{pair}" if half == 0 else f"%mid_{row}_{c}_{pair}"
                after = f"%mid_{row}_{c}_{pair}" if half == 0 else f"%sum_{row}_{c}_{pair + 1}"
                factors = f"{WIDE} %w_{c}_{2 * pair + half}, {WIDE} %x_{row}_{pair}_{half}"
                yield f"  {after} = {FMA}({factors}, {WIDE} {before})"


def _widen_code(form: Format, number: int, column: int) -> str:
    """Returns code for the codes of a line's input ``number`` as float32; of 4 bits, times :data:`_NIBBLE_FACTOR`.

    A line of words is loaded anew for each, since LLVM would else spill sums to keep it in registers.
    """
    name = f"{column}_{number}"
    if form.bits == 8:
        return f"""
  %bytes_at_{name} = getelementptr i8, ptr %line_{column}, i64 {LANES * number}
  %bytes_{name} = load <16 x i8>, ptr %bytes_at_{name}, align {LANES}
  %code_{name} = sext <16 x i8> %bytes_{name} to {WORDS}
  %w_{name} = sitofp {WORDS} %code_{name} to {WIDE}"""
    return f"""
  %line_{name} = load volatile {WORDS}, ptr %line_{column}, align {LINE_BYTES}
  %up_{name} = shl {WORDS} %line_{name}, splat (i32 {28 - 4 * number})
  %code_{name} = and {WORDS} %up_{name}, splat (i32 {-_NIBBLE_FACTOR})
  %w_{name} = sitofp {WORDS} %code_{name} to {WIDE}"""


def _vector(kind: str, values: Sequence[int]) -> str:
    return "<" + ", ".join(f"{kind} {value}" for value in values) + ">"


def _bfloat16_bits(value: float) -> int:
    """Returns the bits of a value that bfloat16 represents exactly."""
    (bits,) = struct.unpack("<I", struct.pack("<f", value))
    assert not bits & 0xFFFF, value
    return int(bits >> 16)


_NIBBLES = _vector("i16", 2 * [_bfloat16_bits(code - 8) for code in range(16)])


def _widen_nibbles(pair: int, column: int) -> str:
    name = f"{column}_{pair}"
    return f"""
  %code_{name} = lshr <32 x i16> %words_{column}, splat (i16 {4 * pair})
  %value_{name} = call <32 x i16> @llvm.x86.avx512.permvar.hi.512(<32 x i16> {_NIBBLES}, <32 x i16> %code_{name})
  %w_{name} = bitcast <32 x i16> %value_{name} to <32 x bfloat>"""


_MAGNITUDES = {half: [_bfloat16_bits(magnitude + half / 2) for magnitude in range(128)] for half in (False, True)}
_SIGNS = _vector("i8", [0x80] * 64)
# The bytes of one pair among those of two vectors: 8 of each quarter, alternately of the first and the second vector.
_INTERLEAVED = [
    _vector("i32", [64 * (i % 2) + 16 * quarter + 8 * pair + i // 2 for quarter in range(4) for i in range(16)])
    for pair in range(2)
]


def _widen_bytes(pair: int, column: int, offsets: bool) -> str:
    name = f"{column}_{pair}"
    before = _look_up(column, offsets) if pair == 0 else ""
    return f"""{before}
  %value_{name} = shufflevector <64 x i8> %low_{column}, <64 x i8> %high_{column}, <64 x i32> {_INTERLEAVED[pair]}
  %w_{name} = bitcast <64 x i8> %value_{name} to <32 x bfloat>"""


def _look_up(column: int, offsets: bool) -> str:
    """Returns code that looks up the low and high bytes of all values of a line."""
    look_up, bits = "call <64 x i8> @llvm.x86.avx512.vpermi2var.qi.512", _MAGNITUDES[offsets]
    low, high = ([_vector("i8", [f(x) for x in bits[half : half + 64]]) for half in (0, 64)] for f in (_low, _high))
    return f"""
  %code_{column} = bitcast <32 x i16> %words_{column} to <64 x i8>
  %low_{column} = {look_up}(<64 x i8> {low[0]}, <64 x i8> %code_{column}, <64 x i8> {low[1]})
  %positive_{column} = {look_up}(<64 x i8> {high[0]}, <64 x i8> %code_{column}, <64 x i8> {high[1]})
  %sign_{column} = and <64 x i8> %code_{column}, {_SIGNS}
  %high_{column} = or <64 x i8> %positive_{column}, %sign_{column}"""


def _low(bits: int) -> int:
    return bits & 0xFF


def _high(bits: int) -> int:
    return bits >> 8


def _scale(form: Format, column: int) -> str:
    """Returns code for a group's scales, without the power of two that codes of 4 bits have outside of tables."""
    factor = 1.0 if form.tables or form.bits == 8 else 1 / _NIBBLE_FACTOR
    return f"""{_beside("head", column)}
  %stored_{column} = load {WIDE}, ptr %head_{column}, align {LINE_BYTES}
  %scale_{column} = fmul {WIDE} %stored_{column}, splat (float {factor!r})"""


def _scaled(form: Format, row: int, column: int) -> str:
    name = f"{row}_{column}"
    result = f"%scaled_{name}" if form.offsets else f"%new_{name}"
    factors = f"{WIDE} %sum_{name}_{form.num_pairs}, {WIDE} %scale_{column}"
    return f"  {result} = {FMA}({factors}, {WIDE} %total_{name})"


def _offset(rows: int, columns: int) -> Iterator[str]:
    """Yields code that adds the offset times the sum of the token's inputs in the group, which the codes leave out."""
    yield f"\n  %sums_first = mul i64 %g, {4 * rows}\n  %sums_here = getelementptr i8, ptr %sums, i64 %sums_first"
    for column in range(columns):
        yield f"""
  %offset_at_{column} = getelementptr i8, ptr %head_{column}, i64 {LINE_BYTES}
  %offset_{column} = load <16 x float>, ptr %offset_at_{column}, align {LINE_BYTES}"""
    for row in range(rows):
        yield f"""
  %inputs_at_{row} = getelementptr i8, ptr %sums_here, i64 {4 * row}
  %inputs_{row} = load float, ptr %inputs_at_{row}, align 4
  %first_{row} = insertelement <16 x float> poison, float %inputs_{row}, i32 0
  %inputs_x_{row} = shufflevector <16 x float> %first_{row}, <16 x float> poison, <16 x i32> zeroinitializer"""
        for c in range(columns):
            operands = f"<16 x float> %inputs_x_{row}, <16 x float> %offset_{c}, <16 x float> %scaled_{row}_{c}"
            yield f"  %new_{row}_{c} = {FMA}({operands})"


PRODUCT = columns_function(
    ARGUMENTS, ("x", "sums"), "ptr %x_here, ptr %sums_here, ptr %w, ptr %b, ptr %o_here, ptr %args"
)
