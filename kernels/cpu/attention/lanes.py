"""LLVM IR of single vectors: types, loads, stores, shuffles and exponentials.

Each function appends to a block under construction. Addresses are 64-bit integers.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from kernels.cpu.machine import numba_code  # noqa: F401  (it tells Numba the target before anything is compiled)
from kernels.cpu.machine.target import chosen

LANES = chosen().lanes
PANEL = 2 * LANES
# How many rows' sums, two vectors each, stay in half of the registers at a time.
ROW_COUNTS = (8, 4, 2, 1) if chosen().registers == 32 else (4, 2, 1)
HAS_PAIRS = chosen().multiplies_pairs

# What the cache stores and how it is multiplied, each named by the Numba type that stands for it.
FLOAT32 = types.float32
WIDENED = types.uint16  # bfloat16, widened to float32
PAIRED = types.int16  # bfloat16, multiplied in pairs

INT32 = ir.IntType(32)
INT64 = ir.IntType(64)
FLOAT = ir.FloatType()
VECTOR = ir.VectorType(FLOAT, LANES)
INTS = ir.VectorType(INT32, LANES)
VECTOR_BYTES = 4 * LANES


class _BFloat(ir.Type):  # type: ignore[misc]
    """LLVM's type bfloat, which llvmlite has no class for."""

    intrinsic_name = "bf16"

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


PAIRS = ir.VectorType(_BFloat(), 2 * LANES)


def number_bytes(stored: Any) -> int:
    """Returns the bytes of a stored number."""
    return int(stored.bitwidth // 8)


def widen(builder: Any, raw: Any, wide: Any) -> Any:
    """Widens the bits of bfloat16, which are the upper half of a float32."""
    integer, shift = (INTS, ints(16)) if isinstance(wide, ir.VectorType) else (INT32, INT32(16))
    return builder.bitcast(builder.shl(builder.zext(raw, integer), shift), wide)


def constant(number: float) -> Any:
    """Returns a vector with the number in every lane."""
    return ir.Constant(VECTOR, [number] * LANES)


def call(builder: Any, name: str, signature: Any, *args: Any) -> Any:
    """Calls a function of LLVM by its name."""
    return builder.call(cgutils.get_or_insert_function(builder.module, signature, name), args)


def load(builder: Any, address: Any) -> Any:
    """Loads a vector of float32."""
    return builder.load(builder.inttoptr(address, VECTOR.as_pointer()), align=4)


def load_panel(builder: Any, row: Any, panel: Any) -> list[Any]:
    """Loads the two vectors of a panel of a row."""
    here = builder.add(row, builder.mul(panel, INT64(2 * VECTOR_BYTES)))
    return [load(builder, builder.add(here, INT64(offset))) for offset in (0, VECTOR_BYTES)]


def load_words(builder: Any, address: Any, stored: Any) -> Any:
    """Loads LANES words of stored numbers."""
    if stored != WIDENED:
        return builder.load(builder.inttoptr(address, VECTOR.as_pointer()), align=2)
    raw = ir.VectorType(ir.IntType(16), LANES)
    return widen(builder, builder.load(builder.inttoptr(address, raw.as_pointer()), align=2), VECTOR)


def load_float(builder: Any, address: Any, index: Any) -> Any:
    """Loads the float32 at an index."""
    return builder.load(builder.gep(builder.inttoptr(address, FLOAT.as_pointer()), [index]), align=4)


def store(builder: Any, vector: Any, address: Any) -> None:
    """Stores a vector."""
    builder.store(vector, builder.inttoptr(address, vector.type.as_pointer()), align=4)


def store_float(builder: Any, vector: Any, address: Any, index: int) -> None:
    """Stores the first lane of a vector as the float32 at an index."""
    number = builder.extract_element(vector, INT32(0))
    builder.store(number, builder.gep(builder.inttoptr(address, FLOAT.as_pointer()), [INT64(index)]), align=4)


def spread(builder: Any, number: Any) -> Any:
    """Returns a vector with the number in every lane."""
    undefined = ir.Constant(VECTOR, ir.Undefined)
    single = builder.insert_element(undefined, number, INT32(0))
    return shuffle(builder, single, undefined, [0] * LANES)


def shuffle(builder: Any, a: Any, b: Any, lanes: list[int]) -> Any:
    """Returns the given lanes of two vectors, those of the second counted after those of the first."""
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(INT32, len(lanes)), lanes))


def larger(builder: Any, a: Any, b: Any) -> Any:
    """Returns, lane by lane, ``a`` where it is larger, and else ``b``."""
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


def across(builder: Any, vector: Any, combine: Any) -> Any:
    """Combines all lanes, and returns the result in every lane."""
    distance = LANES // 2
    while distance:
        swapped = shuffle(builder, vector, vector, [lane ^ distance for lane in range(LANES)])
        vector, distance = combine(builder, vector, swapped), distance // 2
    return vector


def fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """Returns ``a * b + c`` of vectors, rounded once where the target can."""
    return call(builder, f"llvm.fmuladd.v{LANES}f32", ir.FunctionType(VECTOR, [VECTOR] * 3), a, b, c)


def multiply_add(builder: Any, a: Any, b: Any, total: Any, stored: Any) -> Any:
    """Adds the products of two vectors of words to ``total``."""
    if stored != PAIRED:
        return fma(builder, a, b, total)
    signature = ir.FunctionType(VECTOR, [VECTOR, PAIRS, PAIRS])
    pairs = builder.bitcast(b, PAIRS), builder.bitcast(a, PAIRS)
    return call(builder, "llvm.x86.avx512bf16.dpbf16ps.512", signature, total, *pairs)


def ints(number: int) -> Any:
    """Returns a vector of integers with the number in every lane."""
    return ir.Constant(INTS, [number] * LANES)


def narrow(builder: Any, vector: Any) -> Any:
    """Rounds float32 to bfloat16, in the lower halves of integers; a NaN stays one."""
    bits = builder.bitcast(vector, INTS)
    odd = builder.and_(builder.lshr(bits, ints(16)), ints(1))
    rounded = builder.lshr(builder.add(builder.add(bits, ints(0x7FFF)), odd), ints(16))
    return builder.select(builder.fcmp_unordered("uno", vector, vector), ints(0x7FC0), rounded)


def interleave(builder: Any, first: Any, second: Any) -> list[Any]:
    """Pairs the numbers of two rows, PANEL of each: first those of even columns, then those of odd ones."""
    a, b = (builder.load(builder.inttoptr(row, INTS.as_pointer()), align=2) for row in (first, second))
    even = builder.or_(builder.and_(a, ints(0xFFFF)), builder.shl(b, ints(16)))
    odd = builder.or_(builder.lshr(a, ints(16)), builder.and_(b, ints(0xFFFF0000)))
    return [builder.bitcast(words, VECTOR) for words in (even, odd)]


def transpose(builder: Any, rows: list[Any]) -> list[Any]:
    """Transposes a square of LANES rows by swapping larger and larger blocks across the diagonal."""
    rows, size = list(rows), 1
    while size < LANES:
        for i in range(LANES):
            if i & size:
                continue
            low, high = rows[i], rows[i + size]
            rows[i] = shuffle(
                builder, low, high, [lane if not lane & size else LANES + lane - size for lane in range(LANES)]
            )
            rows[i + size] = shuffle(
                builder, low, high, [lane + size if not lane & size else LANES + lane for lane in range(LANES)]
            )
        size *= 2
    return rows


# Polynomials for 2 ** x on [-0.5, 0.5], highest power first: that of Cephes' exp2f (Moshier 1989), and, for weights
# that are rounded to bfloat16, the least-squares fit at Chebyshev nodes, within 3.1e-6 of the value.
EXP2 = (
    *(1.535336188319500e-4, 1.339887440266574e-3, 9.618437357674640e-3, 5.550332471162809e-2),
    *(2.402264791363012e-1, 6.931472028550421e-1, 1.0),
)
_SHORT_EXP2 = (9.600395517e-3, 5.591689383e-2, 2.402371846e-1, 6.931219948e-1, 1.0)


def exp2_vector(builder: Any, x: Any, stored: Any) -> Any:
    """Returns 2 to a vector of numbers up to 0.5; 0 below -126.5. A NaN stays one."""
    low = constant(-127.0)
    x = builder.select(builder.fcmp_ordered("<", x, low), low, x)
    # Adding 1.5 * 2**23 leaves the whole part, and here the exponent's bias, in the low bits.
    magic = constant(12582912.0 + 127.0)
    shifted = builder.fadd(x, magic)
    rest = builder.fsub(x, builder.fsub(shifted, magic))
    first, *others = _SHORT_EXP2 if stored == PAIRED else EXP2
    power = constant(first)
    for coefficient in others:
        power = fma(builder, power, rest, constant(coefficient))
    exponent = builder.shl(builder.bitcast(shifted, INTS), ints(23))
    return builder.fmul(power, builder.bitcast(exponent, VECTOR))
