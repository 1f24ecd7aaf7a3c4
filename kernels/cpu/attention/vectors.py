"""Vector code in LLVM IR: the loops of :mod:`kernels.cpu.attention.simd` that Numba has no words for.

Each function appends to a block under construction. Addresses are 64-bit integers.

A word is 32 bits: a float32, or where ``stored`` is PAIRED two neighbouring bfloat16 that one instruction
multiplies and adds (AVX512-BF16). Products are of matrices of words: rows of one as they lie, the other in panels
[words, PANEL], so that a word of a row meets PANEL columns in two vectors. Where values are PAIRED, a panel's even
columns come before its odd ones, and so do the sums of weighted values.
"""

from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils

_FEATURES = binding.get_host_cpu_features()
LANES = 16 if _FEATURES.get("avx512f") else 8
PANEL = 2 * LANES
ROW_COUNTS = (8, 4, 2, 1) if LANES == 16 else (4, 2, 1)  # rows at a time: their sums stay in registers
HAS_PAIRS = LANES == 16 and bool(_FEATURES.get("avx512bf16") and _FEATURES.get("avx512bw"))

# What the cache stores, and how it is multiplied, by the Numba type that stands for it.
FLOAT32 = types.float32
WIDENED = types.uint16  # bfloat16, made float32
PAIRED = types.int16  # bfloat16, multiplied in pairs

INT32 = ir.IntType(32)
INT64 = ir.IntType(64)
FLOAT = ir.FloatType()
_VECTOR = ir.VectorType(FLOAT, LANES)
_INTS = ir.VectorType(INT32, LANES)
_BYTES = 4 * LANES


class _BFloat(ir.Type):  # type: ignore[misc]
    """LLVM's bfloat, which llvmlite does not name."""

    intrinsic_name = "bf16"

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


_PAIRS = ir.VectorType(_BFloat(), 2 * LANES)


def number_bytes(stored: Any) -> int:
    """Size of a stored number."""
    return int(stored.bitwidth // 8)


def widen(builder: Any, raw: Any, wide: Any) -> Any:
    """bfloat16 bits as float32: they are its upper half."""
    ints, shift = (_INTS, _ints(16)) if isinstance(wide, ir.VectorType) else (INT32, INT32(16))
    return builder.bitcast(builder.shl(builder.zext(raw, ints), shift), wide)


def emit_product(builder: Any, args: Any, num_rows: int, stored: Any) -> None:
    """C [num_rows, PANEL] = A [num_rows, num_words] B [num_words, PANEL], summed word by word."""
    a, a_stride, b, c, c_stride, num_words = args
    rows = [builder.add(a, builder.mul(a_stride, INT64(i))) for i in range(num_rows)]
    sums = [cgutils.alloca_once_value(builder, _constant(0.0)) for _ in range(2 * num_rows)]
    with cgutils.for_range(builder, num_words, intp=INT64) as word:
        here = builder.add(b, builder.mul(word.index, INT64(4 * PANEL)))
        columns = [_load(builder, builder.add(here, INT64(offset))) for offset in (0, _BYTES)]
        for i, row in enumerate(rows):
            number = _spread(builder, _load_float(builder, row, word.index))
            for total, column in zip(sums[2 * i : 2 * i + 2], columns, strict=True):
                builder.store(_multiply_add(builder, number, column, builder.load(total), stored), total)
    for i, total in enumerate(sums):
        row = builder.add(c, builder.mul(c_stride, INT64(i // 2)))
        _store(builder, builder.load(total), builder.add(row, INT64(i % 2 * _BYTES)))


def emit_pack_keys(builder: Any, args: Any, stored: Any) -> None:
    """The keys at LANES slots as one half of a panel: LANES columns of ``num_words`` words."""
    keys, slots, row_bytes, num_words, to = args
    pointer = builder.inttoptr(slots, INT32.as_pointer())
    loaded = [builder.load(builder.gep(pointer, [INT64(i)]), align=4) for i in range(LANES)]
    rows = [builder.add(keys, builder.mul(builder.zext(slot, INT64), row_bytes)) for slot in loaded]
    word_bytes = 2 if stored == WIDENED else 4
    with cgutils.for_range_slice(builder, INT64(0), num_words, INT64(LANES), INT64) as (word, _):
        offset = builder.mul(word, INT64(word_bytes))
        square = _transpose(builder, [_load_words(builder, builder.add(row, offset), stored) for row in rows])
        for i, column in enumerate(square):
            place = builder.mul(builder.add(word, INT64(i)), INT64(4 * PANEL))
            _store(builder, column, builder.add(to, place))


def emit_pack_values(builder: Any, args: Any, stored: Any) -> None:
    """A token's values, or a pair's, as one word of every panel; panels are ``stride`` bytes apart."""
    first, second, head_dim, stride, to = args
    step = PANEL if stored == PAIRED else LANES
    with cgutils.for_range_slice(builder, INT64(0), head_dim, INT64(step), INT64) as (at, _):
        offset = builder.mul(at, INT64(number_bytes(stored)))
        place = builder.add(to, builder.mul(builder.sdiv(at, INT64(PANEL)), stride))
        rows = [builder.add(row, offset) for row in (first, second)]
        if stored == PAIRED:
            for i, words in enumerate(_interleave(builder, *rows)):
                _store(builder, words, builder.add(place, INT64(i * _BYTES)))
        else:
            half = builder.mul(builder.and_(at, INT64(LANES)), INT64(4))
            _store(builder, _load_words(builder, rows[0], stored), builder.add(place, half))


def emit_output(builder: Any, args: Any, stored: Any) -> None:
    """A row's weighted values over their mass, as they are stored; bfloat16 rounded to nearest, ties to even."""
    sums, mass, head_dim, to = args
    divisor = _spread(builder, mass)
    step = PANEL if stored == PAIRED else LANES
    with cgutils.for_range_slice(builder, INT64(0), head_dim, INT64(step), INT64) as (at, _):
        place = builder.add(to, builder.mul(at, INT64(number_bytes(stored))))
        offsets = [builder.mul(builder.add(at, INT64(lane)), INT64(4)) for lane in range(0, step, LANES)]
        columns = [builder.fdiv(_load(builder, builder.add(sums, offset)), divisor) for offset in offsets]
        if stored == FLOAT32:
            _store(builder, columns[0], place)
        elif stored == WIDENED:
            narrow = ir.VectorType(ir.IntType(16), LANES)
            _store(builder, builder.trunc(_narrow(builder, columns[0]), narrow), place)
        else:
            even, odd = (_narrow(builder, column) for column in columns)
            _store(builder, builder.or_(even, builder.shl(odd, _ints(16))), place)


def emit_prefetch(builder: Any, args: Any) -> None:
    """Asks for the rows of the tokens whose slots are there, before they are read."""
    rows, slots, num_tokens, row_bytes = args
    of = ir.FunctionType(ir.VoidType(), [ir.IntType(8).as_pointer(), INT32, INT32, INT32])
    pointer = builder.inttoptr(slots, INT32.as_pointer())
    with cgutils.for_range(builder, num_tokens, intp=INT64) as token:
        slot = builder.load(builder.gep(pointer, [token.index]), align=4)
        row = builder.add(rows, builder.mul(builder.zext(slot, INT64), row_bytes))
        with cgutils.for_range_slice(builder, INT64(0), row_bytes, INT64(64), INT64) as (offset, _):
            line = builder.inttoptr(builder.add(row, offset), ir.IntType(8).as_pointer())
            # To read, into the second-level cache, data.
            _call(builder, "llvm.prefetch.p0", of, line, INT32(0), INT32(2), INT32(1))


def emit_softmax(builder: Any, args: Any, stored: Any) -> None:
    """``num_panels`` panels of a row of scores to exponentials in place, their maximum and sum to ``stats``.

    A weight is 2 ** (score * factor - maximum). Paired weights fill the row's first half. The maximum is finite, so
    that a row of minus infinities weighs nothing.
    """
    scores, num_panels, factor, stats = args
    tops, totals = (
        [cgutils.alloca_once_value(builder, _constant(start)) for _ in range(2)] for start in (float("-inf"), 0.0)
    )
    with cgutils.for_range(builder, num_panels, intp=INT64) as panel:
        for vector, top in zip(_load_panel(builder, scores, panel.index), tops, strict=True):
            builder.store(_larger(builder, vector, builder.load(top)), top)
    factors = _spread(builder, factor)
    peak = builder.fmul(_across(builder, _larger(builder, *map(builder.load, tops)), _larger), factors)
    peak = _larger(builder, peak, _constant(-1e30))
    shift = builder.fneg(peak)
    with cgutils.for_range(builder, num_panels, intp=INT64) as panel:
        vectors = _load_panel(builder, scores, panel.index)
        weights = [_exp2(builder, _fma(builder, vector, factors, shift), stored) for vector in vectors]
        for weight, total in zip(weights, totals, strict=True):
            builder.store(builder.fadd(builder.load(total), weight), total)
        _store_weights(builder, weights, scores, panel.index, stored)
    mass = builder.fadd(*map(builder.load, totals))
    _store_float(builder, peak, stats, 0)
    _store_float(builder, _across(builder, mass, lambda b, x, y: b.fadd(x, y)), stats, 1)


def _store_weights(builder: Any, weights: list[Any], scores: Any, panel: Any, stored: Any) -> None:
    if stored == PAIRED:
        narrow = ir.FunctionType(_PAIRS, [_VECTOR] * 2)
        rounded = _call(builder, "llvm.x86.avx512bf16.cvtne2ps2bf16.512", narrow, weights[1], weights[0])
        place = builder.add(scores, builder.mul(panel, INT64(_BYTES)))
        _store(builder, builder.bitcast(rounded, _VECTOR), place)
        return
    place = builder.add(scores, builder.mul(panel, INT64(2 * _BYTES)))
    for i, weight in enumerate(weights):
        _store(builder, weight, builder.add(place, INT64(i * _BYTES)))


# ---- single vectors ----


def _constant(number: float) -> Any:
    return ir.Constant(_VECTOR, [number] * LANES)


def _call(builder: Any, name: str, signature: Any, *args: Any) -> Any:
    return builder.call(cgutils.get_or_insert_function(builder.module, signature, name), args)


def _load(builder: Any, address: Any) -> Any:
    return builder.load(builder.inttoptr(address, _VECTOR.as_pointer()), align=4)


def _load_panel(builder: Any, row: Any, panel: Any) -> list[Any]:
    here = builder.add(row, builder.mul(panel, INT64(2 * _BYTES)))
    return [_load(builder, builder.add(here, INT64(offset))) for offset in (0, _BYTES)]


def _load_words(builder: Any, address: Any, stored: Any) -> Any:
    """LANES words of what is stored."""
    if stored != WIDENED:
        return builder.load(builder.inttoptr(address, _VECTOR.as_pointer()), align=2)
    raw = ir.VectorType(ir.IntType(16), LANES)
    return widen(builder, builder.load(builder.inttoptr(address, raw.as_pointer()), align=2), _VECTOR)


def _load_float(builder: Any, address: Any, index: Any) -> Any:
    return builder.load(builder.gep(builder.inttoptr(address, FLOAT.as_pointer()), [index]), align=4)


def _store(builder: Any, vector: Any, address: Any) -> None:
    builder.store(vector, builder.inttoptr(address, vector.type.as_pointer()), align=4)


def _store_float(builder: Any, vector: Any, address: Any, index: int) -> None:
    """The first lane."""
    number = builder.extract_element(vector, INT32(0))
    builder.store(number, builder.gep(builder.inttoptr(address, FLOAT.as_pointer()), [INT64(index)]), align=4)


def _spread(builder: Any, number: Any) -> Any:
    """The number in every lane."""
    undefined = ir.Constant(_VECTOR, ir.Undefined)
    single = builder.insert_element(undefined, number, INT32(0))
    return _shuffle(builder, single, undefined, [0] * LANES)


def _shuffle(builder: Any, a: Any, b: Any, lanes: list[int]) -> Any:
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(INT32, len(lanes)), lanes))


def _larger(builder: Any, a: Any, b: Any) -> Any:
    """Lane by lane ``a`` where it is larger, else ``b``."""
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


def _across(builder: Any, vector: Any, combine: Any) -> Any:
    """All lanes combined, in every lane."""
    distance = LANES // 2
    while distance:
        turned = _shuffle(builder, vector, vector, [lane ^ distance for lane in range(LANES)])
        vector, distance = combine(builder, vector, turned), distance // 2
    return vector


def _fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return _call(builder, f"llvm.fma.v{LANES}f32", ir.FunctionType(_VECTOR, [_VECTOR] * 3), a, b, c)


def _multiply_add(builder: Any, a: Any, b: Any, total: Any, stored: Any) -> Any:
    if stored != PAIRED:
        return _fma(builder, a, b, total)
    signature = ir.FunctionType(_VECTOR, [_VECTOR, _PAIRS, _PAIRS])
    pairs = builder.bitcast(b, _PAIRS), builder.bitcast(a, _PAIRS)
    return _call(builder, "llvm.x86.avx512bf16.dpbf16ps.512", signature, total, *pairs)


def _ints(number: int) -> Any:
    return ir.Constant(_INTS, [number] * LANES)


def _narrow(builder: Any, vector: Any) -> Any:
    """float32 rounded to bfloat16, in the lower halves of integers; a NaN stays one."""
    bits = builder.bitcast(vector, _INTS)
    odd = builder.and_(builder.lshr(bits, _ints(16)), _ints(1))
    rounded = builder.lshr(builder.add(builder.add(bits, _ints(0x7FFF)), odd), _ints(16))
    return builder.select(builder.fcmp_unordered("uno", vector, vector), _ints(0x7FC0), rounded)


def _interleave(builder: Any, first: Any, second: Any) -> list[Any]:
    """Numbers of two rows side by side, PANEL of each: those of even columns, then those of odd ones."""
    a, b = (builder.load(builder.inttoptr(row, _INTS.as_pointer()), align=2) for row in (first, second))
    even = builder.or_(builder.and_(a, _ints(0xFFFF)), builder.shl(b, _ints(16)))
    odd = builder.or_(builder.lshr(a, _ints(16)), builder.and_(b, _ints(0xFFFF0000)))
    return [builder.bitcast(words, _VECTOR) for words in (even, odd)]


def _transpose(builder: Any, rows: list[Any]) -> list[Any]:
    """The columns of a square of LANES rows, by exchanging ever larger blocks across the diagonal."""
    rows, size = list(rows), 1
    while size < LANES:
        for i in range(LANES):
            if i & size:
                continue
            low, high = rows[i], rows[i + size]
            rows[i] = _shuffle(
                builder, low, high, [lane if not lane & size else LANES + lane - size for lane in range(LANES)]
            )
            rows[i + size] = _shuffle(
                builder, low, high, [lane + size if not lane & size else LANES + lane for lane in range(LANES)]
            )
        size *= 2
    return rows


# 2 ** x on [-0.5, 0.5], highest power first: that of Cephes' exp2f (Moshier 1989), and for weights that are rounded
# to bfloat16 the least-squares one at Chebyshev nodes, within 3.1e-6 of the value.
EXP2 = (
    *(1.535336188319500e-4, 1.339887440266574e-3, 9.618437357674640e-3, 5.550332471162809e-2),
    *(2.402264791363012e-1, 6.931472028550421e-1, 1.0),
)
_SHORT_EXP2 = (9.600395517e-3, 5.591689383e-2, 2.402371846e-1, 6.931219948e-1, 1.0)


def _exp2(builder: Any, x: Any, stored: Any) -> Any:
    """2 to a vector of at most 0.5; 0 below -126.5. A NaN stays one."""
    low = _constant(-127.0)
    x = builder.select(builder.fcmp_ordered("<", x, low), low, x)
    # Adding 1.5 * 2**23 leaves the whole part, and here the exponent's bias, in the low bits.
    magic = _constant(12582912.0 + 127.0)
    shifted = builder.fadd(x, magic)
    rest = builder.fsub(x, builder.fsub(shifted, magic))
    first, *others = _SHORT_EXP2 if stored == PAIRED else EXP2
    power = _constant(first)
    for coefficient in others:
        power = _fma(builder, power, rest, _constant(coefficient))
    exponent = builder.shl(builder.bitcast(shifted, _INTS), _ints(23))
    return builder.fmul(power, builder.bitcast(exponent, _VECTOR))
