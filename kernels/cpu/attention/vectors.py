"""LLVM IR of the loops of :mod:`kernels.cpu.attention.simd` that Numba cannot express.

Each function appends to a block under construction. Addresses are 64-bit integers.

A word is 32 bits: a float32, or, where ``stored`` is PAIRED, two neighbouring bfloat16 that one instruction multiplies
and adds (AVX512-BF16). Products are of matrices of words. The first has plain rows, the second lies in panels
[words, PANEL], so that a word of a row is multiplied by PANEL columns in two vectors. Where values are PAIRED, the even
columns of a panel come before its odd ones, and so do the sums of weighted values.
"""

from typing import Any

from llvmlite import ir
from numba.core import cgutils

from kernels.cpu.attention.lanes import (
    FLOAT32,
    INT32,
    INT64,
    LANES,
    PAIRED,
    PAIRS,
    PANEL,
    VECTOR,
    VECTOR_BYTES,
    WIDENED,
    across,
    call,
    constant,
    exp2_vector,
    fma,
    interleave,
    ints,
    larger,
    load,
    load_float,
    load_panel,
    load_words,
    multiply_add,
    narrow,
    number_bytes,
    spread,
    store,
    store_float,
    transpose,
)


def emit_product(builder: Any, args: Any, num_rows: int, stored: Any) -> None:
    """Emits C [num_rows, PANEL] = A [num_rows, num_words] B [num_words, PANEL], summed word by word."""
    a, a_stride, b, c, c_stride, num_words = args
    rows = [builder.add(a, builder.mul(a_stride, INT64(i))) for i in range(num_rows)]
    sums = [cgutils.alloca_once_value(builder, constant(0.0)) for _ in range(2 * num_rows)]
    with cgutils.for_range(builder, num_words, intp=INT64) as word:
        here = builder.add(b, builder.mul(word.index, INT64(4 * PANEL)))
        columns = [load(builder, builder.add(here, INT64(offset))) for offset in (0, VECTOR_BYTES)]
        for i, row in enumerate(rows):
            number = spread(builder, load_float(builder, row, word.index))
            for total, column in zip(sums[2 * i : 2 * i + 2], columns, strict=True):
                builder.store(multiply_add(builder, number, column, builder.load(total), stored), total)
    for i, total in enumerate(sums):
        row = builder.add(c, builder.mul(c_stride, INT64(i // 2)))
        store(builder, builder.load(total), builder.add(row, INT64(i % 2 * VECTOR_BYTES)))


def emit_pack_keys(builder: Any, args: Any, stored: Any) -> None:
    """Emits the packing of the keys at LANES slots as one half of a panel: LANES columns of ``num_words`` words."""
    keys, slots, row_bytes, num_words, to = args
    pointer = builder.inttoptr(slots, INT32.as_pointer())
    loaded = [builder.load(builder.gep(pointer, [INT64(i)]), align=4) for i in range(LANES)]
    rows = [builder.add(keys, builder.mul(builder.zext(slot, INT64), row_bytes)) for slot in loaded]
    word_bytes = 2 if stored == WIDENED else 4
    with cgutils.for_range_slice(builder, INT64(0), num_words, INT64(LANES), INT64) as (word, _):
        offset = builder.mul(word, INT64(word_bytes))
        square = transpose(builder, [load_words(builder, builder.add(row, offset), stored) for row in rows])
        for i, column in enumerate(square):
            place = builder.mul(builder.add(word, INT64(i)), INT64(4 * PANEL))
            store(builder, column, builder.add(to, place))


def emit_pack_values(builder: Any, args: Any, stored: Any) -> None:
    """Emits packing a token's values, or a pair's, as a word of each panel; ``stride`` is from panel to panel."""
    first, second, head_dim, stride, to = args
    step = PANEL if stored == PAIRED else LANES
    with cgutils.for_range_slice(builder, INT64(0), head_dim, INT64(step), INT64) as (at, _):
        offset = builder.mul(at, INT64(number_bytes(stored)))
        place = builder.add(to, builder.mul(builder.sdiv(at, INT64(PANEL)), stride))
        rows = [builder.add(row, offset) for row in (first, second)]
        if stored == PAIRED:
            for i, words in enumerate(interleave(builder, *rows)):
                store(builder, words, builder.add(place, INT64(i * VECTOR_BYTES)))
        else:
            half = builder.mul(builder.and_(at, INT64(LANES)), INT64(4))
            store(builder, load_words(builder, rows[0], stored), builder.add(place, half))


def emit_output(builder: Any, args: Any, stored: Any) -> None:
    """Emits the division of a row's weighted values by their mass, rounded to the stored type to nearest even."""
    sums, mass, head_dim, to = args
    divisor = spread(builder, mass)
    step = PANEL if stored == PAIRED else LANES
    with cgutils.for_range_slice(builder, INT64(0), head_dim, INT64(step), INT64) as (at, _):
        place = builder.add(to, builder.mul(at, INT64(number_bytes(stored))))
        offsets = [builder.mul(builder.add(at, INT64(lane)), INT64(4)) for lane in range(0, step, LANES)]
        columns = [builder.fdiv(load(builder, builder.add(sums, offset)), divisor) for offset in offsets]
        if stored == FLOAT32:
            store(builder, columns[0], place)
        elif stored == WIDENED:
            halves = ir.VectorType(ir.IntType(16), LANES)
            store(builder, builder.trunc(narrow(builder, columns[0]), halves), place)
        else:
            even, odd = (narrow(builder, column) for column in columns)
            store(builder, builder.or_(even, builder.shl(odd, ints(16))), place)


def emit_prefetch(builder: Any, args: Any) -> None:
    """Emits the prefetch of the rows at the given slots."""
    rows, slots, num_tokens, row_bytes = args
    signature = ir.FunctionType(ir.VoidType(), [ir.IntType(8).as_pointer(), INT32, INT32, INT32])
    pointer = builder.inttoptr(slots, INT32.as_pointer())
    with cgutils.for_range(builder, num_tokens, intp=INT64) as token:
        slot = builder.load(builder.gep(pointer, [token.index]), align=4)
        row = builder.add(rows, builder.mul(builder.zext(slot, INT64), row_bytes))
        with cgutils.for_range_slice(builder, INT64(0), row_bytes, INT64(64), INT64) as (offset, _):
            line = builder.inttoptr(builder.add(row, offset), ir.IntType(8).as_pointer())
            # For reading, into the second-level cache, of data.
            call(builder, "llvm.prefetch.p0", signature, line, INT32(0), INT32(2), INT32(1))


def emit_softmax(builder: Any, args: Any, stored: Any) -> None:
    """Emits the softmax of ``num_panels`` panels of a row of scores, in place; their maximum and sum go to ``stats``.

    A weight is 2 ** (score * factor - maximum). Paired weights fill the row's first half. The maximum is kept finite,
    so that a row of minus infinities has no weight.
    """
    scores, num_panels, factor, stats = args
    tops, totals = (
        [cgutils.alloca_once_value(builder, constant(start)) for _ in range(2)] for start in (float("-inf"), 0.0)
    )
    with cgutils.for_range(builder, num_panels, intp=INT64) as panel:
        for vector, top in zip(load_panel(builder, scores, panel.index), tops, strict=True):
            builder.store(larger(builder, vector, builder.load(top)), top)
    factors = spread(builder, factor)
    peak = builder.fmul(across(builder, larger(builder, *map(builder.load, tops)), larger), factors)
    peak = larger(builder, peak, constant(-1e30))
    shift = builder.fneg(peak)
    with cgutils.for_range(builder, num_panels, intp=INT64) as panel:
        vectors = load_panel(builder, scores, panel.index)
        weights = [exp2_vector(builder, fma(builder, vector, factors, shift), stored) for vector in vectors]
        for weight, total in zip(weights, totals, strict=True):
            builder.store(builder.fadd(builder.load(total), weight), total)
        _store_weights(builder, weights, scores, panel.index, stored)
    mass = builder.fadd(*map(builder.load, totals))
    store_float(builder, peak, stats, 0)
    store_float(builder, across(builder, mass, lambda b, x, y: b.fadd(x, y)), stats, 1)


def _store_weights(builder: Any, weights: list[Any], scores: Any, panel: Any, stored: Any) -> None:
    """Stores a panel's weights over the row's scores, rounded where they are paired."""
    if stored == PAIRED:
        signature = ir.FunctionType(PAIRS, [VECTOR] * 2)
        rounded = call(builder, "llvm.x86.avx512bf16.cvtne2ps2bf16.512", signature, weights[1], weights[0])
        place = builder.add(scores, builder.mul(panel, INT64(VECTOR_BYTES)))
        store(builder, builder.bitcast(rounded, VECTOR), place)
        return
    place = builder.add(scores, builder.mul(panel, INT64(2 * VECTOR_BYTES)))
    for i, weight in enumerate(weights):
        store(builder, weight, builder.add(place, INT64(i * VECTOR_BYTES)))
