"""Decode attention as machine code for this CPU: explicit vectors in LLVM IR, put together by Numba.

Owns all code that is compiled, in one file, so that an edit always invalidates Numba's cache on disk.

Work is cut into tasks: one KV head's tile of at most TILE tokens of one sequence. A task's result, the
softmax's maximum, mass and weighted values, goes to memory; whoever ends the last task of a (sequence, KV head)
merges its tiles in token order (Dao et al. 2023, FlashDecoding). So bits depend on the sequence alone: not on
where its tokens lie, nor on the rest of the batch, nor on how many threads share the tasks.

A task takes W query heads at a time (1, 2 or 4) against LANES / W tokens: LANES dot products are summed in as
many registers, which a tree of shuffles then folds into one of scores, lane ``head * (LANES / W) + token``.
A key is widened once for W heads, and no dot product is reduced alone.

    B  sequences that decode    L  tokens of one          T  rows of the batch
    H  query heads              K  KV heads               G = H / K
    D  head dimension, a multiple of LANES                S  slots
"""

import struct
from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba import carray, cfunc, from_dtype, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

TILE = 256
LANES = 16 if binding.get_host_cpu_features().get("avx512f") else 8
_WIDTHS = (1, 2, 4)
_CHUNKS = (1, 2, 4) if LANES == 16 else (1, 2)  # of a value row at a time: W * chunks sums stay in registers

# One call's arguments. Addresses are of dense arrays: query and output [T, H, D], keys and values [K, S, D], all
# of one type; partials [tiles, K, padded G, D + 2] in float32; tickets [1 + B * K] in int64, zero at first; rows
# [B], first_token [B + 1] and first_tile [B + 1] in int64; slots [tokens] and tile_sequence [tiles] in int32.
_ARGUMENTS = (
    *("num_kv_heads", "group", "head_dim", "num_slots", "query", "keys", "values", "output", "partials", "tickets"),
    *("num_tiles", "rows", "first_token", "first_tile", "slots", "tile_sequence"),
)
_JOB_TYPE = np.dtype([(name, np.int64) for name in _ARGUMENTS] + [("scale", np.float64)])
JOB = struct.Struct(f"={len(_ARGUMENTS)}qd")

_LOG2_E = np.float32(1.4426950408889634)
_FLOAT = ir.FloatType()
_INT32 = ir.IntType(32)
_INT64 = ir.IntType(64)
_VECTOR = ir.VectorType(_FLOAT, LANES)
_KEPT: list[Any] = []  # code lives as long as its object
_jit = njit(error_model="numpy", nogil=True, fastmath={"contract"})


# ---- intrinsics: what Numba has no word for. ``zero`` gives the stored type: float32, or uint16 for bfloat16 ----


def _widen(builder: Any, raw: Any, wide: Any) -> Any:
    """bfloat16 bits as float32: they are its upper half."""
    ints = ir.VectorType(_INT32, LANES) if isinstance(wide, ir.VectorType) else _INT32
    shift = ir.Constant(ints, [16] * LANES if isinstance(wide, ir.VectorType) else 16)
    return builder.bitcast(builder.shl(builder.zext(raw, ints), shift), wide)


def _load_row(builder: Any, address: Any, zero: Any) -> Any:
    """LANES stored numbers as float32."""
    if zero == types.float32:
        return builder.load(builder.inttoptr(address, _VECTOR.as_pointer()), align=4)
    raw = ir.VectorType(ir.IntType(16), LANES)
    return _widen(builder, builder.load(builder.inttoptr(address, raw.as_pointer()), align=2), _VECTOR)


def _store_row(builder: Any, vector: Any, address: Any) -> None:
    builder.store(vector, builder.inttoptr(address, _VECTOR.as_pointer()), align=4)


def _load_float(builder: Any, address: Any, index: int) -> Any:
    return builder.load(builder.gep(builder.inttoptr(address, _FLOAT.as_pointer()), [_INT64(index)]), align=4)


def _row_addresses(builder: Any, base: Any, slots: Any, count: int, row_bytes: Any) -> list[Any]:
    pointer = builder.inttoptr(slots, _INT32.as_pointer())
    found = [builder.load(builder.gep(pointer, [_INT64(i)]), align=4) for i in range(count)]
    return [builder.add(base, builder.mul(builder.zext(slot, _INT64), row_bytes)) for slot in found]


def _zeros(builder: Any, count: int) -> list[Any]:
    """Stack slots that LLVM turns into registers."""
    return [cgutils.alloca_once_value(builder, ir.Constant(_VECTOR, [0.0] * LANES)) for _ in range(count)]


def _add_product(builder: Any, total: Any, a: Any, b: Any) -> None:
    signature = ir.FunctionType(_VECTOR, [_VECTOR] * 3)
    fused = cgutils.get_or_insert_function(builder.module, signature, f"llvm.fma.v{LANES}f32")
    builder.store(builder.call(fused, [a, b, builder.load(total)]), total)


def _fold(builder: Any, sums: list[Any]) -> Any:
    """One vector whose lane i is the sum of the lanes of ``sums[i]``, for LANES of them."""
    # A pair's halves of each segment are added side by side; segments shrink from LANES lanes to one.
    order = [int(f"{i:0{LANES.bit_length() - 1}b}"[::-1], 2) for i in range(LANES)]
    vectors, width = [sums[i] for i in order], LANES
    while width > 1:
        half = width // 2
        lane = [(i // width * width, i % width) for i in range(LANES)]
        low = [start + at if at < half else LANES + start + at - half for start, at in lane]
        masks = [ir.Constant(ir.VectorType(_INT32, LANES), [i + shift for i in low]) for shift in (0, half)]
        pairs = zip(vectors[::2], vectors[1::2], strict=True)
        vectors = [builder.fadd(*(builder.shuffle_vector(a, b, mask) for mask in masks)) for a, b in pairs]
        width = half
    return vectors[0]


def _spread(builder: Any, number: Any) -> Any:
    """The number in every lane."""
    undefined = ir.Constant(_VECTOR, ir.Undefined)
    single = builder.insert_element(undefined, number, _INT32(0))
    return builder.shuffle_vector(single, undefined, ir.Constant(ir.VectorType(_INT32, LANES), [0] * LANES))


@intrinsic
def _score_block(context, queries, keys, slots, head_dim, scores, width, zero):  # type: ignore[no-untyped-def]
    """Scores [W, LANES / W], to ``scores``, of float32 queries [W, D] with the keys at as many slots."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        for num_heads in _WIDTHS:
            with builder.if_then(builder.icmp_signed("==", args[5], _INT64(num_heads))):
                _emit_scores(builder, args[:5], num_heads, zero)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6, zero), generate


def _emit_scores(builder: Any, args: tuple[Any, ...], num_heads: int, zero: Any) -> None:
    queries, keys, slots, head_dim, scores = args
    num_tokens, item_bytes = LANES // num_heads, zero.bitwidth // 8
    rows = _row_addresses(builder, keys, slots, num_tokens, builder.mul(head_dim, _INT64(item_bytes)))
    sums = _zeros(builder, LANES)
    with cgutils.for_range_slice(builder, _INT64(0), head_dim, _INT64(LANES), _INT64) as (at, _):
        offset = builder.mul(at, _INT64(item_bytes))
        loaded = [_load_row(builder, builder.add(row, offset), zero) for row in rows]
        for head in range(num_heads):
            place = builder.mul(builder.add(at, builder.mul(head_dim, _INT64(head))), _INT64(4))
            query = _load_row(builder, builder.add(queries, place), types.float32)
            for token in range(num_tokens):
                _add_product(builder, sums[head * num_tokens + token], query, loaded[token])
    _store_row(builder, _fold(builder, [builder.load(total) for total in sums]), scores)


@intrinsic
def _weigh(context, weights, values, slots, num_blocks, head_dim, sums, width, chunks, zero):  # type: ignore[no-untyped-def]
    """Sums [W, chunks * LANES], rows D + 2 apart, of values weighted by ``weights`` [num_blocks, LANES]."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        for num_heads in _WIDTHS:
            for num_chunks in _CHUNKS:
                fits = (args[6], num_heads), (args[7], num_chunks)
                both = [builder.icmp_signed("==", have, _INT64(want)) for have, want in fits]
                with builder.if_then(builder.and_(*both)):
                    _emit_weigh(builder, args[:6], num_heads, num_chunks, zero)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 8, zero), generate


def _emit_weigh(builder: Any, args: tuple[Any, ...], num_heads: int, num_chunks: int, zero: Any) -> None:
    weights, values, slots, num_blocks, head_dim, sums = args
    num_tokens, item_bytes = LANES // num_heads, zero.bitwidth // 8
    row_bytes = builder.mul(head_dim, _INT64(item_bytes))
    totals = _zeros(builder, num_heads * num_chunks)
    with cgutils.for_range(builder, num_blocks, intp=_INT64) as block:
        here = builder.add(slots, builder.mul(block.index, _INT64(4 * num_tokens)))
        lanes = builder.add(weights, builder.mul(block.index, _INT64(4 * LANES)))
        for token, row in enumerate(_row_addresses(builder, values, here, num_tokens, row_bytes)):
            steps = [_INT64(chunk * LANES * item_bytes) for chunk in range(num_chunks)]
            loaded = [_load_row(builder, builder.add(row, step), zero) for step in steps]
            for head in range(num_heads):
                weight = _spread(builder, _load_float(builder, lanes, head * num_tokens + token))
                for chunk in range(num_chunks):
                    _add_product(builder, totals[head * num_chunks + chunk], weight, loaded[chunk])
    for index, total in enumerate(totals):
        head, chunk = divmod(index, num_chunks)
        place = builder.add(builder.mul(builder.add(head_dim, _INT64(2)), _INT64(head)), _INT64(chunk * LANES))
        _store_row(builder, builder.load(total), builder.add(sums, builder.mul(place, _INT64(4))))


@intrinsic
def _prefetch(context, address):  # type: ignore[no-untyped-def]
    """Asks for a cache line before it is read: tokens lie apart, where the hardware does not see them coming."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        pointer = builder.inttoptr(args[0], ir.IntType(8).as_pointer())
        arguments = [pointer, _INT32(0), _INT32(2), _INT32(1)]  # to read, into the second-level cache, data
        of = ir.FunctionType(ir.VoidType(), [argument.type for argument in arguments])
        builder.call(cgutils.get_or_insert_function(builder.module, of, "llvm.prefetch.p0"), arguments)
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic
def _item_bytes(context, zero):  # type: ignore[no-untyped-def]
    """Size of a stored number."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return _INT64(zero.bitwidth // 8)

    return types.int64(zero), generate


@intrinsic
def _pointer(context, address, zero):  # type: ignore[no-untyped-def]
    """The address as a pointer to numbers of the type of ``zero``."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(zero)(types.int64, zero), generate


@intrinsic
def _take_ticket(context, address):  # type: ignore[no-untyped-def]
    """Adds one to the integer there, as one step among all threads, and returns what it was."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        pointer = builder.inttoptr(args[0], _INT64.as_pointer())
        return builder.atomic_rmw("add", pointer, _INT64(1), "acq_rel")

    return types.int64(types.int64), generate


@intrinsic
def _wide(context, stored):  # type: ignore[no-untyped-def]
    """A stored number as float32."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return args[0] if stored == types.float32 else _widen(builder, args[0], _FLOAT)

    return types.float32(stored), generate


@intrinsic
def _narrow(context, number, zero):  # type: ignore[no-untyped-def]
    """A float32 as it is stored: bfloat16 is rounded to nearest, ties to even, and keeps a NaN."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        if zero == types.float32:
            return args[0]
        bits = builder.bitcast(args[0], _INT32)
        odd = builder.and_(builder.lshr(bits, _INT32(16)), _INT32(1))
        rounded = builder.lshr(builder.add(builder.add(bits, _INT32(0x7FFF)), odd), _INT32(16))
        is_nan = builder.fcmp_unordered("uno", args[0], args[0])
        return builder.trunc(builder.select(is_nan, _INT32(0x7FC0), rounded), ir.IntType(16))

    return zero(types.float32, zero), generate


@intrinsic
def _power_of_two(context, exponent):  # type: ignore[no-untyped-def]
    """2 to a whole float32 of [-127, 127], made of its bits; -127 gives 0."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        biased = builder.add(builder.fptosi(args[0], _INT32), _INT32(127))
        return builder.bitcast(builder.shl(biased, _INT32(23)), _FLOAT)

    return types.float32(types.float32), generate


# ---- one task, and the loop that takes them ----


@_jit
def exp2(x: Any) -> Any:
    """2 to a float32 of at most 127, within 2 units in the last place; 0 below -126.5.

    The polynomial of degree 6 on [-0.5, 0.5] is that of Cephes' exp2f (Moshier 1989). Unlike a call to the
    C library it becomes vector code.
    """
    x = max(x, np.float32(-127.0))
    whole = np.floor(x + np.float32(0.5))
    rest = x - whole
    power = np.float32(1.535336188319500e-4)
    power = power * rest + np.float32(1.339887440266574e-3)
    power = power * rest + np.float32(9.618437357674640e-3)
    power = power * rest + np.float32(5.550332471162809e-2)
    power = power * rest + np.float32(2.402264791363012e-1)
    power = power * rest + np.float32(6.931472028550421e-1)
    power = power * rest + np.float32(1.0)
    return power * _power_of_two(whole)


@_jit
def _softmax(scores, num_tokens, width, partial):  # type: ignore[no-untyped-def]
    """Exponentials of scores [blocks * LANES] in place; each head's maximum and mass to ``partial[head, -2:]``.

    Tokens after ``num_tokens`` weigh 0.
    """
    tokens = LANES // width
    if num_tokens % tokens:
        for lane in range(LANES):
            if lane % tokens >= num_tokens % tokens:
                scores[scores.size - LANES + lane] = -np.inf
    peak = np.full(LANES, -np.inf, np.float32)
    mass = np.zeros(LANES, np.float32)
    for start in range(0, scores.size, LANES):
        for lane in range(LANES):
            peak[lane] = max(peak[lane], scores[start + lane])
    for head in range(width):
        top = peak[head * tokens : (head + 1) * tokens].max()
        peak[head * tokens : (head + 1) * tokens] = top
        partial[head, -2] = top
    for start in range(0, scores.size, LANES):
        for lane in range(LANES):
            weight = exp2(scores[start + lane] - peak[lane])
            scores[start + lane] = weight
            mass[lane] += weight
    for head in range(width):
        partial[head, -1] = mass[head * tokens : (head + 1) * tokens].sum()


@_jit
def _load_queries(job, row, head, queries, zero):  # type: ignore[no-untyped-def]
    """A KV head's queries to ``queries`` [padded G, D], scaled so that weights are powers of 2."""
    count = job.group * job.head_dim
    before = (row * job.num_kv_heads + head) * count
    stored = carray(_pointer(job.query + before * _item_bytes(zero), zero), count)
    factor = np.float32(job.scale * _LOG2_E)
    flat = queries.reshape(-1)
    for i in range(count):
        flat[i] = _wide(stored[i]) * factor


@_jit
def _attend(job, tile, head, slots, queries, scores, zero):  # type: ignore[no-untyped-def]
    """One task: queries [padded G, D] over the KV at ``slots`` to ``partials[tile, head]``.

    ``slots`` has one entry a token and then room for LANES more. ``scores`` is room for [padded G / W, TILE * W].
    """
    head_dim, padded = job.head_dim, queries.shape[0]
    width = min(padded, 4)
    tokens, num_tokens = LANES // width, slots.size - LANES
    # Whole blocks are read: the last token again in place of tokens that are not there.
    slots[num_tokens:] = slots[num_tokens - 1]
    num_blocks = -(-num_tokens // tokens)
    where = np.int64(slots.ctypes.data)
    row_bytes = head_dim * _item_bytes(zero)
    to_head = head * job.num_slots * head_dim * _item_bytes(zero)
    to_partial = job.partials + 4 * (tile * job.num_kv_heads + head) * padded * (head_dim + 2)
    partial = carray(_pointer(to_partial, np.float32(0)), (padded, head_dim + 2))
    to_queries, to_scores = np.int64(queries.ctypes.data), np.int64(scores.ctypes.data)
    for block in range(num_blocks):
        here = where + 4 * block * tokens
        for token in range(block * tokens, (block + 1) * tokens):
            value_row = job.values + to_head + slots[token] * row_bytes
            key_row = job.keys + to_head + slots[min(token + 16, slots.size - 1)] * row_bytes
            for line in range(0, row_bytes, 64):
                _prefetch(value_row + line)
                _prefetch(key_row + line)
        for first in range(0, padded, width):
            query = to_queries + 4 * first * head_dim
            to = to_scores + 4 * (first // width * scores.shape[1] + block * LANES)
            _score_block(query, job.keys + to_head, here, head_dim, to, width, zero)
    for first in range(0, padded, width):
        weights = scores[first // width, : num_blocks * LANES]
        _softmax(weights, num_tokens, width, partial[first : first + width])
        start = 0
        while start < head_dim:
            missing = (head_dim - start) // LANES
            chunks = _CHUNKS[-1] if missing >= _CHUNKS[-1] else min(missing, 2)
            value = job.values + to_head + start * _item_bytes(zero)
            to = to_partial + 4 * (first * (head_dim + 2) + start)
            _weigh(np.int64(weights.ctypes.data), value, where, num_blocks, head_dim, to, width, chunks, zero)
            start += chunks * LANES


@_jit
def _merge(job, row, head, tiles, padded, sums, zero):  # type: ignore[no-untyped-def]
    """A (sequence, KV head)'s partial results, first to last tile, to its rows of the output."""
    head_dim, (first, stop) = job.head_dim, tiles
    shape = (stop, job.num_kv_heads, padded, head_dim + 2)
    partials = carray(_pointer(job.partials, np.float32(0)), shape)
    to_output = job.output + (row * job.num_kv_heads + head) * job.group * head_dim * _item_bytes(zero)
    output = carray(_pointer(to_output, zero), (job.group, head_dim))
    for query in range(job.group):
        peak, mass = partials[first, head, query, head_dim], partials[first, head, query, head_dim + 1]
        for d in range(head_dim):
            sums[d] = partials[first, head, query, d]
        for tile in range(first + 1, stop):
            top = max(peak, partials[tile, head, query, head_dim])
            old, new = exp2(peak - top), exp2(partials[tile, head, query, head_dim] - top)
            peak, mass = top, mass * old + partials[tile, head, query, head_dim + 1] * new
            for d in range(head_dim):
                sums[d] = sums[d] * old + partials[tile, head, query, d] * new
        for d in range(head_dim):
            output[query, d] = _narrow(sums[d] / mass, zero)


@_jit
def _work(job, zero):  # type: ignore[no-untyped-def]
    """Takes tasks until none is left. Any number of threads may do so at once."""
    num_heads, width = job.num_kv_heads, 4 if job.group > 2 else job.group
    padded = -(-job.group // width) * width
    queries = np.zeros((padded, job.head_dim), np.float32)
    scores = np.empty((padded // width, TILE * width), np.float32)
    sums = np.empty(job.head_dim, np.float32)
    local = np.empty(TILE + LANES, np.int32)
    sequences = carray(_pointer(job.tile_sequence, np.int32(0)), job.num_tiles)
    num_sequences = sequences[job.num_tiles - 1] + 1
    rows = carray(_pointer(job.rows, np.int64(0)), num_sequences)
    first_token = carray(_pointer(job.first_token, np.int64(0)), num_sequences + 1)
    first_tile = carray(_pointer(job.first_tile, np.int64(0)), num_sequences + 1)
    slots = carray(_pointer(job.slots, np.int32(0)), first_token[num_sequences])
    task = _take_ticket(job.tickets)
    while task < job.num_tiles * num_heads:
        tile, head = task // num_heads, task % num_heads
        sequence = sequences[tile]
        start = first_token[sequence] + (tile - first_tile[sequence]) * TILE
        num_tokens = min(TILE, first_token[sequence + 1] - start)
        local[:num_tokens] = slots[start : start + num_tokens]
        _load_queries(job, rows[sequence], head, queries, zero)
        _attend(job, tile, head, local[: num_tokens + LANES], queries, scores, zero)
        tiles = first_tile[sequence], first_tile[sequence + 1]
        if _take_ticket(job.tickets + 8 * (1 + sequence * num_heads + head)) == tiles[1] - tiles[0] - 1:
            _merge(job, rows[sequence], head, tiles, padded, sums, zero)
        task = _take_ticket(job.tickets)


def work_float32(job):  # type: ignore[no-untyped-def]
    """Does the job at the address, with the other threads that were given it."""
    _work(carray(job, 1)[0], np.float32(0))


def work_bfloat16(job):  # type: ignore[no-untyped-def]
    """Likewise, where what is stored is bfloat16."""
    _work(carray(job, 1)[0], np.uint16(0))


def compiled(work: Any) -> int:
    """Address of one of the two as a C function; from Numba's cache on disk where there is one to write to."""
    signature = types.void(types.CPointer(from_dtype(_JOB_TYPE)))
    try:
        callback = cfunc(signature, cache=True)(work)
    except RuntimeError:  # neither beside the source nor in the user's own cache directory
        callback = cfunc(signature)(work)
    _KEPT.append(callback)
    return int(callback.address)
