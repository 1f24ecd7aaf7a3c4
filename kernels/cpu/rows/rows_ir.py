"""LLVM IR of norms and gated activations, which are computed on rows of bfloat16 between the matrix products.

Each function makes one pass over a row in vectors of 16 numbers, in float32, and rounds where :mod:`kernels.reference`
rounds. It handles one row. A function of the same name with ``_rows`` appended calls it for row after row until none is
left, on any number of threads.
"""

import math
import struct
from collections.abc import Sequence

from kernels.cpu.machine.numbers_ir import WIDE as _WIDE
from kernels.cpu.machine.numbers_ir import WORDS, load, narrow, round_and_widen, store
from kernels.cpu.machine.target import Target
from kernels.cpu.machine.work_ir import load_arguments, take_tickets

LANES = 16

HEADER = """
declare float @llvm.vector.reduce.fadd.v16f32(float, <16 x float>)
declare float @llvm.sqrt.f32(float)
declare <16 x float> @llvm.fmuladd.v16f32(<16 x float>, <16 x float>, <16 x float>)
"""


def _splat(value: str) -> str:
    return f"splat (float {value})"


def norm(target: Target, name: str, *, adds: bool, wide: bool) -> str:
    """Returns the function for the root-mean-square norm of a row of ``width`` numbers.

    With ``adds`` it is the norm of the sum of two rows, and the sum is kept. Weights are bfloat16, or float32 where
    ``wide``. ``normed`` may be the row itself.
    """
    sums = ""
    if adds:
        sums = f"""{load("a", "update", "%i")}{load("b", "residual", "%i")}
  %ab = fadd {_WIDE} %a, %b{round_and_widen(target, "x", "ab")}{store("x_half", "total", "%i")}"""
    source = "total" if adds else "residual"
    return f"""
define void @{name}(ptr %update, ptr %residual, ptr %weight, ptr %normed, ptr %total, i64 %width, float %eps) {{
entry:
  br label %sum
sum:
  %i = phi i64 [0, %entry], [%i_next, %sum]
  %squares = phi {_WIDE} [zeroinitializer, %entry], [%squares_next, %sum]{sums or load("x", "residual", "%i")}
  %squares_next = call {_WIDE} @llvm.fmuladd.v16f32({_WIDE} %x, {_WIDE} %x, {_WIDE} %squares)
  %i_next = add i64 %i, {LANES}
  %more = icmp slt i64 %i_next, %width
  br i1 %more, label %sum, label %middle
middle:
  %whole = call reassoc float @llvm.vector.reduce.fadd.v16f32(float 0.0, {_WIDE} %squares_next)
  %count = sitofp i64 %width to float
  %mean = fdiv float %whole, %count
  %shifted = fadd float %mean, %eps
  %root = call float @llvm.sqrt.f32(float %shifted)
  %factor = fdiv float 1.0, %root
  %factor_0 = insertelement {_WIDE} poison, float %factor, i32 0
  %factors = shufflevector {_WIDE} %factor_0, {_WIDE} poison, <16 x i32> zeroinitializer
  br label %scale{_scale(target, source, wide=wide)}
done:
  ret void
}}
"""


def _scale(target: Target, source: str, *, wide: bool) -> str:
    """Returns the loop that multiplies a row by the norm's factor and the weight."""
    weight = _WIDE_WEIGHT if wide else load("w", "weight", "%j") + round_and_widen(target, "again", "scaled")
    normed = narrow(target, "normed_out", "product") + store("normed_out", "normed", "%j")
    return f"""
scale:
  %j = phi i64 [0, %middle], [%j_next, %scale]{load("y", source, "%j")}
  %scaled = fmul {_WIDE} %y, %factors{weight}
  %product = fmul {_WIDE} %{"scaled" if wide else "again"}, %w{normed}
  %j_next = add i64 %j, {LANES}
  %more_j = icmp slt i64 %j_next, %width
  br i1 %more_j, label %scale, label %done"""


_WIDE_WEIGHT = f"""
  %w_at = getelementptr float, ptr %weight, i64 %j
  %w = load {_WIDE}, ptr %w_at, align 4"""


_LOG2_E = "0x3FF7154760000000"
# exp2 on [-0.5, 0.5]: the polynomial of degree 6 of Cephes' exp2f (Moshier 1989), highest power first.
_EXP2 = (
    *(1.535336188319500e-4, 1.339887440266574e-3, 9.618437357674640e-3, 5.550332471162809e-2),
    *(2.402264791363012e-1, 6.931472028550421e-1, 1.0),
)


def _float(value: float) -> str:
    """Returns a float32 as LLVM writes it, as the hexadecimal digits of the double of the same value."""
    (narrow,) = struct.unpack("<f", struct.pack("<f", value))
    return f"0x{struct.unpack('<Q', struct.pack('<d', narrow))[0]:016X}"


def exp(result: str, argument: str) -> str:
    """Returns code for ``%result`` = e to ``%argument``, within 2 units in the last place, from 0 to infinity.

    Adding 1.5 * 2^23 leaves the whole part of a number, and here the exponent's bias, in the low bits of its float32.
    """
    magic = _splat(_float(12582912.0 + 127.0))
    lines = [
        f"%{result}_s = fmul {_WIDE} %{argument}, {_splat(_LOG2_E)}",
        *_clamp(f"{result}_l", f"{result}_s", "olt", "-127.0"),
        *_clamp(f"{result}_c", f"{result}_l", "ogt", "128.0"),
        f"%{result}_n = fadd {_WIDE} %{result}_c, {magic}",
        f"%{result}_w = fsub {_WIDE} %{result}_n, {magic}",
        f"%{result}_r = fsub {_WIDE} %{result}_c, %{result}_w",
    ]
    before = _splat(_float(_EXP2[0]))
    for i, factor in enumerate(_EXP2[1:]):
        arguments = f"{_WIDE} {before}, {_WIDE} %{result}_r, {_WIDE} {_splat(_float(factor))}"
        lines.append(f"%{result}_p{i} = call {_WIDE} @llvm.fmuladd.v16f32({arguments})")
        before = f"%{result}_p{i}"
    lines += [
        f"%{result}_i = bitcast {_WIDE} %{result}_n to {WORDS}",
        f"%{result}_e = shl {WORDS} %{result}_i, splat (i32 23)",
        f"%{result}_f = bitcast {WORDS} %{result}_e to {_WIDE}",
        f"%{result} = fmul {_WIDE} {before}, %{result}_f",
    ]
    return "\n  " + "\n  ".join(lines)


def _clamp(result: str, value: str, order: str, limit: str) -> tuple[str, str]:
    """Returns code that replaces a number by the limit where it compares so with it; a NaN stays."""
    return (
        f"%{result}_is = fcmp {order} {_WIDE} %{value}, {_splat(limit)}",
        f"%{result} = select <16 x i1> %{result}_is, {_WIDE} {_splat(limit)}, {_WIDE} %{value}",
    )


_MINUS_SILU = f"""
  %minus = fneg {_WIDE} %g"""
# gelu(x), by tanh, is x * sigmoid(2 u) with u = sqrt(2 / pi) (x + 0.044715 x^3) (Hendrycks and Gimpel 2016).
_MINUS_GELU = f"""
  %square = fmul {_WIDE} %g, %g
  %cubic = fmul {_WIDE} %square, {_splat(_float(0.044715))}
  %bent = fadd {_WIDE} %cubic, {_splat("1.0")}
  %turned = fmul {_WIDE} %g, %bent
  %minus = fmul {_WIDE} %turned, {_splat(_float(-2 * math.sqrt(2 / math.pi)))}"""


def gated_row(target: Target, name: str, activation: str) -> str:
    """Returns the function for ``activation(gate) * up`` of a row ``[2 * width]``.

    ``silu`` and ``gelu_tanh`` are both ``gate / (1 + e to a power)``.
    """
    minus = {"silu": _MINUS_SILU, "gelu_tanh": _MINUS_GELU}[activation]
    return f"""
define void @{name}(ptr %gate_up, ptr %output, i64 %width) {{
entry:
  %up = getelementptr i16, ptr %gate_up, i64 %width
  br label %loop
loop:
  %i = phi i64 [0, %entry], [%i_next, %loop]{load("g", "gate_up", "%i")}{load("u", "up", "%i")}{minus}
{exp("power", "minus")}
  %one_more = fadd {_WIDE} %power, {_splat("1.0")}
  %gated = fdiv {_WIDE} %g, %one_more{round_and_widen(target, "again", "gated")}
  %product = fmul {_WIDE} %again, %u{narrow(target, "out", "product")}{store("out", "output", "%i")}
  %i_next = add i64 %i, {LANES}
  %more = icmp slt i64 %i_next, %width
  br i1 %more, label %loop, label %done
done:
  ret void
}}
"""


def each_row_function(name: str, pointers: Sequence[tuple[str, str]], scalars: Sequence[tuple[str, str]]) -> str:
    """Returns the function ``@{name}_rows(args)``, which calls ``@name`` for every row, a ticket's rows at a time.

    Its arguments are 64-bit fields: ticket, rows, rows of a ticket, then the pointers, their strides and the scalars.

    Args:
        pointers: for each pointer its name, and the name of the field with the bytes from row to row.
        scalars: for each further argument its type and name.
    """
    names = ["ticket", "rows", "unit", *(p for p, _ in pointers), *(s for _, s in pointers), *(n for _, n in scalars)]
    casts = "".join(
        f"\n  %{n}_bits = trunc i64 %{n} to i32\n  %{n}_value = bitcast i32 %{n}_bits to float"
        for t, n in scalars
        if t == "float"
    )
    moves = "".join(
        f"\n  %{p}_by = mul i64 %row, %{s}\n  %{p}_sum = add i64 %{p}, %{p}_by"
        f"\n  %{p}_here = inttoptr i64 %{p}_sum to ptr"
        for p, s in pointers
    )
    passed = [f"ptr %{p}_here" for p, _ in pointers]
    passed += [f"float %{n}_value" if t == "float" else f"i64 %{n}" for t, n in scalars]
    return f"""
define void @{name}_rows(ptr %args) {{
entry:{load_arguments(names)}{casts}{take_tickets("rows", "each")}
each:
  %row = phi i64 [%first, %begin], [%row_next, %each]{moves}
  call void @{name}({", ".join(passed)})
  %row_next = add i64 %row, 1
  %more_rows = icmp slt i64 %row_next, %stop
  br i1 %more_rows, label %each, label %take
end:
  ret void
}}
"""
