"""Attention over a paged KV cache as machine code for this CPU, put together by Numba.

Work is cut into tasks: a few queries of one KV head against a list of tokens, of which each query sees a range. A
decode has one query, a prefill's chunk has neighbours, a shared prefix has those of all its members. A task goes
through its tokens in tiles of TILE. A tile's keys are laid out for vectors in a buffer that stays in cache, met with
the rows of all queries (G query heads each), and its values likewise; the softmax's maximum, mass and weighted values
of a tile are folded into those of the tiles before (Dao et al. 2023, FlashDecoding). A task that is part of a
sequence leaves them in memory; whoever ends the sequence's last part folds them in the order of the plan.

So bits depend on the task alone: not on where its tokens lie, nor on who is in the batch or in the same task, nor on
how many threads share the tasks.

    B  sequences that decode    E  queries of all tasks   T  rows of the batch
    H  query heads              K  KV heads               G = H / K
    D  head dimension, a multiple of LANES                S  slots
"""

import hashlib
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, cfunc, from_dtype, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from kernels import vectors
from kernels.vectors import FLOAT, INT32, INT64, LANES, PANEL

TILE = 256
BLOCK_ROWS = 64  # of scores at a time: with a tile's keys and values they stay in the second-level cache

# One call's arguments. Addresses are of dense arrays: query and output [T, H, D], keys and values [K, S, D], all of
# one type; partials [num_partials, K, G, D + 2] in float32; tickets [2 + B * K], zero at first; room [threads,
# room_bytes], followed by where in it each buffer begins; then sizes and addresses of a plan's arrays.
BUFFERS = ("slots", "queries", "packed_keys", "packed_values", "scores", "tile_sums", "tile_stats", "sums", "stats")
PLANNED = ("tasks", "runs", "rows", "sequences", "parts", "first_part")  # arrays of attention.TaskPlan
_ARGUMENTS = (
    *("num_kv_heads", "group", "head_dim", "num_slots", "query", "keys", "values", "output", "partials", "tickets"),
    *("room", "room_bytes", *(f"to_{name}" for name in BUFFERS)),
    *("num_tasks", "num_runs", "num_queries", "num_parts", "num_ends", *PLANNED),
)
_JOB_TYPE = np.dtype([(name, np.int64) for name in _ARGUMENTS] + [("scale", np.float64)])
JOB = struct.Struct(f"={len(_ARGUMENTS)}qd")
# One task. It begins ``skip`` tokens into run ``first_run``. Query i sees the last ``window`` of the tokens up to
# number ``position + i`` of the task. ``partial``: where its first query's result goes; -1 if that is the whole.
TASK = ("first_query", "num_queries", "first_run", "skip", "num_tokens", "position", "window", "partial")
_TASK = from_dtype(np.dtype([(name, np.int64) for name in TASK]))

_LOG2_E = 1.4426950408889634
_KEPT: list[Any] = []  # code lives as long as its object
_OPTIONS = {"error_model": "numpy", "nogil": True, "fastmath": {"contract"}}
_jit = njit(no_cpython_wrapper=True, no_cfunc_wrapper=True, **_OPTIONS)


# ---- intrinsics: what Numba has no word for. The type of ``zero`` says what is stored: see kernels.vectors ----


@intrinsic
def _product(context, a, a_stride, b, c, c_stride, num_words, num_rows, zero):  # type: ignore[no-untyped-def]
    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        for count in vectors.ROW_COUNTS:
            with builder.if_then(builder.icmp_signed("==", args[6], INT64(count))):
                vectors.emit_product(builder, args[:6], count, zero)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 7, zero), generate


@intrinsic
def _pack_keys(context, keys, slots, row_bytes, num_words, to, zero):  # type: ignore[no-untyped-def]
    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        vectors.emit_pack_keys(builder, args[:5], zero)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5, zero), generate


@intrinsic
def _pack_values(context, first, second, head_dim, stride, to, zero):  # type: ignore[no-untyped-def]
    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        vectors.emit_pack_values(builder, args[:5], zero)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5, zero), generate


@intrinsic
def _softmax(context, scores, num_panels, factor, stats, zero):  # type: ignore[no-untyped-def]
    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        vectors.emit_softmax(builder, args[:4], zero)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32, types.int64, zero), generate


@intrinsic
def _prefetch(context, address):  # type: ignore[no-untyped-def]
    """Asks for a cache line before it is read: tokens lie apart, where the hardware does not see them coming."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        pointer = builder.inttoptr(args[0], ir.IntType(8).as_pointer())
        arguments = [pointer, INT32(0), INT32(2), INT32(1)]  # to read, into the second-level cache, data
        of = ir.FunctionType(ir.VoidType(), [argument.type for argument in arguments])
        builder.call(cgutils.get_or_insert_function(builder.module, of, "llvm.prefetch.p0"), arguments)
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic
def _number_bytes(context, zero):  # type: ignore[no-untyped-def]
    """Size of a stored number."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return INT64(vectors.number_bytes(zero))

    return types.int64(zero), generate


@intrinsic
def _num_words(context, numbers, zero):  # type: ignore[no-untyped-def]
    """Words that as many numbers fill."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.ashr(builder.add(args[0], INT64(1)), INT64(1)) if zero == vectors.PAIRED else args[0]

    return types.int64(types.int64, zero), generate


@intrinsic
def _pointer(context, address, zero):  # type: ignore[no-untyped-def]
    """The address as a pointer to numbers of the type of ``zero``."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(zero)(types.int64, zero), generate


@intrinsic
def _task_pointer(context, address):  # type: ignore[no-untyped-def]
    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(_TASK)(types.int64), generate


@intrinsic
def _take_ticket(context, address):  # type: ignore[no-untyped-def]
    """Adds one to the integer there, as one step among all threads, and returns what it was."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        pointer = builder.inttoptr(args[0], INT64.as_pointer())
        return builder.atomic_rmw("add", pointer, INT64(1), "acq_rel")

    return types.int64(types.int64), generate


@intrinsic
def _load_word(context, address, index, zero):  # type: ignore[no-untyped-def]
    """The word made of the stored numbers there, as a float32."""
    item = types.uint16 if zero == vectors.WIDENED else types.float32

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        pointer = builder.inttoptr(args[0], context.get_value_type(types.CPointer(item)))
        loaded = builder.load(builder.gep(pointer, [args[1]]), align=2)
        return vectors.widen(builder, loaded, FLOAT) if zero == vectors.WIDENED else loaded

    return types.float32(types.int64, types.int64, zero), generate


@intrinsic
def _narrow(context, number, zero):  # type: ignore[no-untyped-def]
    """A float32 as it is stored: bfloat16 is rounded to nearest, ties to even, and keeps a NaN."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        if zero == vectors.FLOAT32:
            return args[0]
        bits = builder.bitcast(args[0], INT32)
        odd = builder.and_(builder.lshr(bits, INT32(16)), INT32(1))
        rounded = builder.lshr(builder.add(builder.add(bits, INT32(0x7FFF)), odd), INT32(16))
        is_nan = builder.fcmp_unordered("uno", args[0], args[0])
        return builder.trunc(builder.select(is_nan, INT32(0x7FC0), rounded), ir.IntType(16))

    return zero(types.float32, zero), generate


@intrinsic
def _power_of_two(context, exponent):  # type: ignore[no-untyped-def]
    """2 to a whole float32 of [-127, 127], made of its bits; -127 gives 0."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        biased = builder.add(builder.fptosi(args[0], INT32), INT32(127))
        return builder.bitcast(builder.shl(biased, INT32(23)), FLOAT)

    return types.float32(types.float32), generate


@njit(**_OPTIONS)
def exp2(x: Any) -> Any:
    """2 to a float32 of at most 127, within 2 units in the last place; 0 below -126.5."""
    x = max(x, np.float32(-127.0))
    whole = np.floor(x + np.float32(0.5))
    rest = x - whole
    power = np.float32(vectors.EXP2[0])
    for coefficient in vectors.EXP2[1:]:
        power = power * rest + np.float32(coefficient)
    return power * _power_of_two(whole)


# ---- one tile ----


@_jit
def _floats(address, shape):  # type: ignore[no-untyped-def]
    return carray(_pointer(address, np.float32(0)), shape)


@_jit
def _integers(address, shape):  # type: ignore[no-untyped-def]
    return carray(_pointer(address, np.int64(0)), shape)


@_jit
def _multiply(a, a_stride, b, c, c_stride, num_words, num_rows, zero):  # type: ignore[no-untyped-def]
    """C [num_rows, PANEL] = A [num_rows, num_words] B [num_words, PANEL]."""
    row = 0
    while row < num_rows:
        missing = num_rows - row
        count = 8 if missing >= 8 and LANES == 16 else 4 if missing >= 4 else 2 if missing >= 2 else 1
        _product(a + row * a_stride, a_stride, b, c + row * c_stride, c_stride, num_words, count, zero)
        row += count


@_jit
def _expand(runs, run, offset, num_tokens, slots):  # type: ignore[no-untyped-def]
    """The slots of the next tokens, the last again up to a whole panel, and where they end: run and offset."""
    filled = 0
    while filled < num_tokens:
        start = runs[run, 0] + offset
        count = min(runs[run, 1] - start, num_tokens - filled)
        for i in range(count):
            slots[filled + i] = start + i
        filled, offset = filled + count, offset + count
        if start + count == runs[run, 1]:
            run, offset = run + 1, 0
    for i in range(filled, -(-filled // PANEL) * PANEL):
        slots[i] = slots[filled - 1]
    return run, offset


@_jit
def _lay_out_keys(job, head, slots, panel, num_panels, room, zero):  # type: ignore[no-untyped-def]
    """The keys of one panel of tokens; asks for its values and the next panel's keys."""
    row_bytes = job.head_dim * _number_bytes(zero)
    to_head = head * job.num_slots * row_bytes
    ahead = PANEL if panel + 1 < num_panels else 0
    for token in range(panel * PANEL, (panel + 1) * PANEL):
        value_row = job.values + to_head + slots[token] * row_bytes
        key_row = job.keys + to_head + slots[token + ahead] * row_bytes
        for line in range(0, row_bytes, 64):
            _prefetch(value_row + line)
            _prefetch(key_row + line)
    num_words = _num_words(job.head_dim, zero)
    for half in range(2):
        where = room + job.to_slots + 4 * (2 * panel + half) * LANES
        to = room + job.to_packed_keys + 4 * (panel * num_words * PANEL + half * LANES)
        _pack_keys(job.keys + to_head, where, row_bytes, num_words, to, zero)


@_jit
def _lay_out_values(job, head, slots, num_tokens, room, zero):  # type: ignore[no-untyped-def]
    row_bytes = job.head_dim * _number_bytes(zero)
    values = job.values + head * job.num_slots * row_bytes
    stride, num_words = 4 * PANEL * _num_words(TILE, zero), _num_words(num_tokens, zero)
    step = TILE // _num_words(TILE, zero)
    for word in range(num_words):
        first = values + slots[word * step] * row_bytes
        second = values + slots[min(word * step + step, num_tokens) - 1] * row_bytes
        _pack_values(first, second, job.head_dim, stride, room + job.to_packed_values + 4 * PANEL * word, zero)


@_jit
def _hide(scores, first_row, group, lo, hi):  # type: ignore[no-untyped-def]
    """Scores outside [lo, hi) of one query's rows weigh nothing."""
    for row in range(first_row, first_row + group):
        for token in range(lo):
            scores[row, token] = -np.inf
        for token in range(hi, scores.shape[1]):
            scores[row, token] = -np.inf


@_jit
def _fold(sums, stats, more_sums, more_stats, head_dim):  # type: ignore[no-untyped-def]
    """Adds weighted values, relative to their maximum, to those before them."""
    top = max(stats[0], more_stats[0])
    old, new = exp2(stats[0] - top), exp2(more_stats[0] - top)
    stats[0], stats[1] = top, stats[1] * old + more_stats[1] * new
    for d in range(head_dim):
        sums[d] = sums[d] * old + more_sums[d] * new


@_jit
def _attend_block(job, task, head, done, count, block, laid_out, room, zero):  # type: ignore[no-untyped-def]
    """Some of a task's queries against its tokens from ``done``, ``count`` of them, whose slots are there.

    ``block``: first query and their number. ``laid_out``: panels of keys and values of tokens that earlier blocks
    left in place. Returns what is there afterwards.
    """
    first, num_queries = block
    last = task.position - done + first + num_queries - 1  # position of the last query, counted from the tile
    visible = min(count, last + 1)
    if visible <= 0 or last - num_queries + 2 - task.window >= count:
        return laid_out
    group, head_dim = job.group, job.head_dim
    num_words, width = _num_words(head_dim, zero), -(-head_dim // PANEL) * PANEL
    num_panels, num_rows = -(-visible // PANEL), num_queries * group
    slots = carray(_pointer(room + job.to_slots, np.int32(0)), TILE)
    queries = room + job.to_queries + 4 * num_words * first * group
    num_keys, num_values = laid_out
    for panel in range(num_panels):
        if panel >= num_keys:
            _lay_out_keys(job, head, slots, panel, -(-count // PANEL), room, zero)
        keys = room + job.to_packed_keys + 4 * panel * num_words * PANEL
        _multiply(
            queries, 4 * num_words, keys, room + job.to_scores + 4 * panel * PANEL, 4 * TILE, num_words, num_rows, zero
        )
    scores = _floats(room + job.to_scores, (num_rows, TILE))
    for i in range(num_queries):
        position = last - num_queries + 1 + i
        lo, hi = max(0, position + 1 - task.window), min(count, position + 1)
        if lo > 0 or hi < num_panels * PANEL:
            _hide(scores[:, : num_panels * PANEL], i * group, group, min(lo, num_panels * PANEL), max(hi, 0))
    factor = np.float32(job.scale * _LOG2_E)
    for row in range(num_rows):
        _softmax(room + job.to_scores + 4 * TILE * row, num_panels, factor, room + job.to_tile_stats + 8 * row, zero)
    if num_values == 0:
        _lay_out_values(job, head, slots, count, room, zero)
    for panel in range(width // PANEL):
        values = room + job.to_packed_values + 4 * panel * PANEL * _num_words(TILE, zero)
        to = room + job.to_tile_sums + 4 * panel * PANEL
        _multiply(room + job.to_scores, 4 * TILE, values, to, 4 * width, _num_words(visible, zero), num_rows, zero)
    tile_sums, tile_stats = (
        _floats(room + job.to_tile_sums, (num_rows, width)),
        _floats(room + job.to_tile_stats, (num_rows, 2)),
    )
    sums = _floats(room + job.to_sums + 4 * first * group * width, (num_rows, width))
    stats = _floats(room + job.to_stats + 8 * first * group, (num_rows, 2))
    for row in range(num_rows):
        _fold(sums[row], stats[row], tile_sums[row], tile_stats[row], head_dim)
    return max(num_keys, num_panels), np.int64(count)


# ---- one task, and the loop that takes them ----


@_jit
def _load_queries(job, task, head, rows, room, zero):  # type: ignore[no-untyped-def]
    """A task's queries of one KV head, as words, and their sums and maxima as those of no token."""
    count, num_words = job.group * job.head_dim, _num_words(job.head_dim, zero)
    width = -(-job.head_dim // PANEL) * PANEL
    num_rows, words = task.num_queries * job.group, job.group * num_words
    queries = _floats(room + job.to_queries, (task.num_queries, words))
    for i in range(task.num_queries):
        row = rows[task.first_query + i]
        stored = job.query + (row * job.num_kv_heads + head) * count * _number_bytes(zero)
        for word in range(words):
            queries[i, word] = _load_word(stored, word, zero)
    _floats(room + job.to_sums, num_rows * width)[:] = 0.0
    stats = _floats(room + job.to_stats, (num_rows, 2))
    stats[:, 0], stats[:, 1] = -np.inf, 0.0


@_jit
def _partial(job, number, head):  # type: ignore[no-untyped-def]
    """A query's part of its sequence: weighted values, maximum and mass [G, D + 2]."""
    shape = (job.group, job.head_dim + 2)
    return _floats(job.partials + 4 * (number * job.num_kv_heads + head) * shape[0] * shape[1], shape)


@_jit
def _output(job, row, head, zero):  # type: ignore[no-untyped-def]
    """A row's output of one KV head [G, D]."""
    size = job.group * job.head_dim * _number_bytes(zero)
    return carray(_pointer(job.output + (row * job.num_kv_heads + head) * size, zero), (job.group, job.head_dim))


@_jit
def _attend(job, task, head, rows, runs, room, zero):  # type: ignore[no-untyped-def]
    """One task of one KV head, to its rows of the output or to the partial results."""
    _load_queries(job, task, head, rows, room, zero)
    slots = carray(_pointer(room + job.to_slots, np.int32(0)), TILE)
    run, offset, done = task.first_run, task.skip, np.int64(0)
    queries_at_once = max(1, BLOCK_ROWS // job.group)
    while done < task.num_tokens:
        count = min(TILE, task.num_tokens - done)
        run, offset = _expand(runs, run, offset, count, slots)
        laid_out = np.int64(0), np.int64(0)
        for first in range(0, task.num_queries, queries_at_once):
            block = first, min(queries_at_once, task.num_queries - first)
            laid_out = _attend_block(job, task, head, done, count, block, laid_out, room, zero)
        done += count
    group, width = job.group, -(-job.head_dim // PANEL) * PANEL
    sums = _floats(room + job.to_sums, (task.num_queries * group, width))
    stats = _floats(room + job.to_stats, (task.num_queries * group, 2))
    for i in range(task.num_queries):
        if task.partial < 0:
            output = _output(job, rows[task.first_query + i], head, zero)
            for g in range(group):
                for d in range(job.head_dim):
                    output[g, d] = _narrow(sums[i * group + g, d] / stats[i * group + g, 1], zero)
        else:
            partial = _partial(job, task.partial + i, head)
            for g in range(group):
                for d in range(job.head_dim):
                    partial[g, d] = sums[i * group + g, d]
                partial[g, job.head_dim] = stats[i * group + g, 0]
                partial[g, job.head_dim + 1] = stats[i * group + g, 1]


@_jit
def _merge(job, row, head, parts, room, zero):  # type: ignore[no-untyped-def]
    """A sequence's partial results, in the order of ``parts``, to its row of the output."""
    head_dim, output = job.head_dim, _output(job, row, head, zero)
    sums, stats = _floats(room + job.to_sums, head_dim), _floats(room + job.to_stats, 2)
    for g in range(job.group):
        sums[:] = 0.0
        stats[0], stats[1] = -np.inf, 0.0
        for part in parts:
            partial = _partial(job, part, head)[g]
            _fold(sums, stats, partial, partial[head_dim:], head_dim)
        for d in range(head_dim):
            output[g, d] = _narrow(sums[d] / stats[1], zero)


@_jit
def _work(job, zero):  # type: ignore[no-untyped-def]
    """Takes tasks until none is left. Any number of threads may do so at once."""
    room = job.room + _take_ticket(job.tickets) * job.room_bytes
    tasks = carray(_task_pointer(job.tasks), job.num_tasks)
    runs = _integers(job.runs, (job.num_runs, 2))
    rows, sequences = _integers(job.rows, job.num_queries), _integers(job.sequences, job.num_queries)
    parts, first_part = _integers(job.parts, job.num_parts), _integers(job.first_part, job.num_ends)
    ticket = _take_ticket(job.tickets + 8)
    while ticket < job.num_tasks * job.num_kv_heads:
        head, task = ticket // job.num_tasks, tasks[ticket % job.num_tasks]
        _attend(job, task, head, rows, runs, room, zero)
        if task.partial >= 0:
            for query in range(task.first_query, task.first_query + task.num_queries):
                sequence = sequences[query]
                ends = first_part[sequence], first_part[sequence + 1]
                place = 2 + sequence * job.num_kv_heads + head
                if _take_ticket(job.tickets + 8 * place) == ends[1] - ends[0] - 1:
                    _merge(job, rows[query], head, parts[ends[0] : ends[1]], room, zero)
        ticket = _take_ticket(job.tickets + 8)


def _entry(zero: Any, version: int) -> Callable[[Any], None]:
    """The function that does the job at an address, with the other threads that were given it.

    Numba's cache knows the code by ``version`` too.
    """

    def work(job):  # type: ignore[no-untyped-def]
        if version >= 0:
            _work(carray(job, 1)[0], zero)

    return work


def compiled(stored: Any) -> int:
    """Address of the code for what is stored, as a C function; from Numba's cache on disk where it can be written."""
    zero = {vectors.FLOAT32: np.float32, vectors.WIDENED: np.uint16, vectors.PAIRED: np.int16}[stored](0)
    sources = b"".join(Path(file).read_bytes() for file in (__file__, vectors.__file__))
    work = _entry(zero, int.from_bytes(hashlib.sha256(sources).digest()[:4]))
    signature = types.void(types.CPointer(from_dtype(_JOB_TYPE)))
    try:
        callback = cfunc(signature, cache=True)(work)
    except RuntimeError:  # neither beside the source nor in the user's own cache directory
        callback = cfunc(signature)(work)
    _KEPT.append(callback)
    return int(callback.address)
