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

import struct
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numba import carray, from_dtype, njit, types

from kernels.cpu.attention import intrinsics, vectors
from kernels.cpu.attention.intrinsics import (
    item_bytes,
    load_word,
    pack_keys,
    pack_values,
    pointer,
    power_of_two,
    prefetch,
    product,
    softmax,
    take_ticket,
    words_in,
    write_output,
)
from kernels.cpu.attention.vectors import LANES, PANEL
from kernels.cpu.machine.numba_code import c_function

TILE = 256
BLOCK_ROWS = 64  # of scores at a time: with a tile's keys and values they stay in the second-level cache

# One call's arguments. Addresses are of dense arrays: query and output [T, H, D], keys and values [K, S, D], all of
# one type; stats 0 or [T, H, 2] in float32, for the maximum and mass of what each output is the average of; partials
# [num_partials, K, G, D + 2] in float32; tickets [2 + B * K], zero at first; room [threads, room_bytes], followed by
# where in it each buffer begins; then sizes and addresses of a plan's arrays.
BUFFERS = ("slots", "queries", "packed_keys", "packed_values", "scores", "tile_sums", "tile_stats", "sums", "stats")
PLANNED = ("tasks", "runs", "rows", "ranges", "sequences", "parts", "first_part")  # arrays of attention.TaskPlan
_ARGUMENTS = (
    *("num_kv_heads", "group", "head_dim", "num_slots", "query", "keys", "values", "output", "stats"),
    *("partials", "tickets"),
    *("room", "room_bytes", *(f"to_{name}" for name in BUFFERS)),
    *("num_tasks", "num_runs", "num_queries", "num_ranges", "num_parts", "num_ends", *PLANNED),
)
_JOB_TYPE = np.dtype([(name, np.int64) for name in _ARGUMENTS] + [("scale", np.float64)])
JOB = struct.Struct(f"={len(_ARGUMENTS)}qd")
_LOG2_E = 1.4426950408889634
_OPTIONS = {"error_model": "numpy", "nogil": True, "fastmath": {"contract"}}
_jit = njit(no_cpython_wrapper=True, no_cfunc_wrapper=True, **_OPTIONS)


class Task(NamedTuple):
    """Queries against a list of tokens, which begins ``skip`` tokens into run ``first_run``.

    Query i sees the tokens within ``ranges[first_range + i]``, or all where that is -1. ``partial`` is where the first
    query's result goes, and those of the others after it; -1 if results are whole.
    """

    first_query: Any
    num_queries: Any
    first_run: Any
    skip: Any
    num_tokens: Any
    first_range: Any
    partial: Any


@njit(**_OPTIONS)
def exp2(x: Any) -> Any:
    """2 to a float32 of at most 127, within 2 units in the last place; 0 below -126.5."""
    x = max(x, np.float32(-127.0))
    whole = np.floor(x + np.float32(0.5))
    rest = x - whole
    power = np.float32(vectors.EXP2[0])
    for coefficient in vectors.EXP2[1:]:
        power = power * rest + np.float32(coefficient)
    return power * power_of_two(whole)


# ---- one tile of a task's tokens ----


class _Tile(NamedTuple):
    """``num_tokens`` after the task's first ``start``, and the next ``num_next``. Where the slots of each are."""

    start: Any
    num_tokens: Any
    slots: Any
    next_slots: Any
    num_next: Any


class _Block(NamedTuple):
    """Queries of a task from ``first``, in ``num_rows`` rows of scores; what is visible to any is so of the tile."""

    first: Any
    num_queries: Any
    num_rows: Any
    num_visible: Any


@_jit
def _floats(address, shape):  # type: ignore[no-untyped-def]
    return carray(pointer(address, np.float32(0)), shape)


@_jit
def _integers(address, shape):  # type: ignore[no-untyped-def]
    return carray(pointer(address, np.int64(0)), shape)


@_jit
def _slots(address):  # type: ignore[no-untyped-def]
    return carray(pointer(address, np.int32(0)), TILE)


@_jit
def _whole_panels(columns):  # type: ignore[no-untyped-def]
    return -(-columns // PANEL) * PANEL


@_jit
def _multiply(a, a_stride, b, c, c_stride, num_words, num_rows, zero):  # type: ignore[no-untyped-def]
    """C [num_rows, PANEL] = A [num_rows, num_words] B [num_words, PANEL]."""
    row = 0
    while row < num_rows:
        missing = num_rows - row
        count = 8 if missing >= 8 and LANES == 16 else 4 if missing >= 4 else 2 if missing >= 2 else 1
        product(a + row * a_stride, a_stride, b, c + row * c_stride, c_stride, num_words, count, zero)
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
    for i in range(filled, _whole_panels(filled)):
        slots[i] = slots[filled - 1]
    return run, offset


@_jit
def _lay_out_keys(job, head, tile, panel, room, zero):  # type: ignore[no-untyped-def]
    """The keys of one panel of tokens; asks for its values and, if nobody did before, for the next panel's keys."""
    row_bytes, num_words = job.head_dim * item_bytes(zero), words_in(job.head_dim, zero)
    keys = job.keys + head * job.num_slots * row_bytes
    values = job.values + head * job.num_slots * row_bytes
    slots = tile.slots + 4 * panel * PANEL
    prefetch(values, slots, PANEL, row_bytes)
    if tile.start == 0 and (panel + 1) * PANEL < tile.num_tokens:
        prefetch(keys, slots + 4 * PANEL, PANEL, row_bytes)
    to = room + job.to_packed_keys + 4 * panel * num_words * PANEL
    for half in range(2):
        pack_keys(keys, slots + 4 * half * LANES, row_bytes, num_words, to + 4 * half * LANES, zero)


@_jit
def _lay_out_values(job, head, tile, room, zero):  # type: ignore[no-untyped-def]
    """A tile's values; asks for the next tile's keys."""
    row_bytes, num_words = job.head_dim * item_bytes(zero), words_in(TILE, zero)
    keys = job.keys + head * job.num_slots * row_bytes
    values = job.values + head * job.num_slots * row_bytes
    slots, step = _slots(tile.slots), TILE // num_words
    for word in range(words_in(tile.num_tokens, zero)):
        token = word * step
        if token < tile.num_next:
            prefetch(keys, tile.next_slots + 4 * token, step, row_bytes)
        first = values + slots[token] * row_bytes
        second = values + slots[min(token + step, tile.num_tokens) - 1] * row_bytes
        to = room + job.to_packed_values + 4 * word * PANEL
        pack_values(first, second, job.head_dim, 4 * num_words * PANEL, to, zero)


@_jit
def _score(job, head, tile, block, num_packed, room, zero):  # type: ignore[no-untyped-def]
    """Scores of a block with the tokens it sees. ``num_packed`` panels of keys are there already."""
    num_words = words_in(job.head_dim, zero)
    queries = room + job.to_queries + 4 * num_words * block.first * job.group
    for panel in range(_whole_panels(block.num_visible) // PANEL):
        if panel >= num_packed:
            _lay_out_keys(job, head, tile, panel, room, zero)
        keys = room + job.to_packed_keys + 4 * panel * num_words * PANEL
        to = room + job.to_scores + 4 * panel * PANEL
        _multiply(queries, 4 * num_words, keys, to, 4 * TILE, num_words, block.num_rows, zero)


@_jit
def _range(job, task, query):  # type: ignore[no-untyped-def]
    """Of the task's tokens, the first that one of its queries sees, and the end."""
    if task.first_range < 0:
        return np.int64(0), task.num_tokens
    ranges = _integers(job.ranges, (job.num_ranges, 2))
    return ranges[task.first_range + query, 0], ranges[task.first_range + query, 1]


@_jit
def _hide(job, task, tile, block, room):  # type: ignore[no-untyped-def]
    """Scores with tokens that a query does not see become minus infinity."""
    width = _whole_panels(block.num_visible)
    scores = _floats(room + job.to_scores, (block.num_rows, TILE))
    for row in range(block.num_rows):
        first, stop = _range(job, task, block.first + row // job.group)
        for token in range(min(width, first - tile.start)):
            scores[row, token] = -np.inf
        for token in range(max(0, min(tile.num_tokens, stop - tile.start)), width):
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
def _weigh(job, tile, block, room, zero):  # type: ignore[no-untyped-def]
    """A block's weights with the tile's values, folded into what it has of the tiles before."""
    width, num_rows = _whole_panels(job.head_dim), block.num_rows
    num_words = words_in(block.num_visible, zero)
    for column in range(0, width, PANEL):
        values = room + job.to_packed_values + 4 * column * words_in(TILE, zero)
        to = room + job.to_tile_sums + 4 * column
        _multiply(room + job.to_scores, 4 * TILE, values, to, 4 * width, num_words, num_rows, zero)
    tile_sums = _floats(room + job.to_tile_sums, (num_rows, width))
    tile_stats = _floats(room + job.to_tile_stats, (num_rows, 2))
    sums = _floats(room + job.to_sums + 4 * block.first * job.group * width, (num_rows, width))
    stats = _floats(room + job.to_stats + 8 * block.first * job.group, (num_rows, 2))
    for row in range(num_rows):
        _fold(sums[row], stats[row], tile_sums[row], tile_stats[row], job.head_dim)


@_jit
def _attend_tile(job, task, head, tile, room, zero):  # type: ignore[no-untyped-def]
    """All queries of a task against one tile, in blocks."""
    factor = np.float32(job.scale * _LOG2_E)
    queries_at_once = max(1, BLOCK_ROWS // job.group)
    packed_keys, packed_values = np.int64(0), False
    for first in range(0, task.num_queries, queries_at_once):
        num_queries = min(queries_at_once, task.num_queries - first)
        # Ranges go up from query to query: the first's begins first, the last's ends last.
        num_visible = min(tile.num_tokens, _range(job, task, first + num_queries - 1)[1] - tile.start)
        if num_visible <= 0 or _range(job, task, first)[0] - tile.start >= tile.num_tokens:
            continue
        block = _Block(first, num_queries, num_queries * job.group, num_visible)
        _score(job, head, tile, block, packed_keys, room, zero)
        _hide(job, task, tile, block, room)
        num_panels = _whole_panels(num_visible) // PANEL
        for row in range(block.num_rows):
            softmax(room + job.to_scores + 4 * TILE * row, num_panels, factor, room + job.to_tile_stats + 8 * row, zero)
        if not packed_values:
            _lay_out_values(job, head, tile, room, zero)
        _weigh(job, tile, block, room, zero)
        packed_keys, packed_values = max(packed_keys, num_panels), True


# ---- one task, and the loop that takes them ----


@_jit
def _load_queries(job, task, head, rows, room, zero):  # type: ignore[no-untyped-def]
    """A task's queries of one KV head, as words, and their sums and maxima as those of no token."""
    num_rows, count = task.num_queries * job.group, job.group * job.head_dim
    words = words_in(count, zero)
    queries = _floats(room + job.to_queries, (task.num_queries, words))
    for i in range(task.num_queries):
        row = rows[task.first_query + i]
        stored = job.query + (row * job.num_kv_heads + head) * count * item_bytes(zero)
        for word in range(words):
            queries[i, word] = load_word(stored, word, zero)
    _floats(room + job.to_sums, num_rows * _whole_panels(job.head_dim))[:] = 0.0
    stats = _floats(room + job.to_stats, (num_rows, 2))
    stats[:, 0], stats[:, 1] = -np.inf, 0.0


@_jit
def _partial(job, number, head):  # type: ignore[no-untyped-def]
    """A query's part of its sequence: weighted values, maximum and mass [G, D + 2]."""
    shape = (job.group, job.head_dim + 2)
    return _floats(job.partials + 4 * (number * job.num_kv_heads + head) * shape[0] * shape[1], shape)


@_jit
def _output(job, row, head, g, zero):  # type: ignore[no-untyped-def]
    """Where a row's output of one query head is."""
    query_head = (row * job.num_kv_heads + head) * job.group + g
    return job.output + query_head * job.head_dim * item_bytes(zero)


@_jit
def _write(job, row, head, g, sums, top, mass, zero):  # type: ignore[no-untyped-def]
    """A query's result, from its weighted values at ``sums``: 0 where it sees no token."""
    to = _output(job, row, head, g, zero)
    write_output(sums, max(mass, np.float32(1e-30)), job.head_dim, to, zero)
    if job.stats != 0:
        query_head = (row * job.num_kv_heads + head) * job.group + g
        stats = _floats(job.stats + 8 * query_head, 2)
        stats[0], stats[1] = top, mass


@_jit
def _attend(job, task, head, rows, runs, room, zero):  # type: ignore[no-untyped-def]
    """One task of one KV head, but for its result."""
    _load_queries(job, task, head, rows, room, zero)
    here, there = room + job.to_slots, room + job.to_slots + 4 * TILE
    start, num_tokens = np.int64(0), min(TILE, task.num_tokens)
    run, offset = _expand(runs, task.first_run, task.skip, num_tokens, _slots(here))
    while num_tokens > 0:
        num_next = min(TILE, task.num_tokens - start - num_tokens)
        run, offset = _expand(runs, run, offset, num_next, _slots(there))
        _attend_tile(job, task, head, _Tile(start, num_tokens, here, there, num_next), room, zero)
        start, num_tokens = start + num_tokens, num_next
        here, there = there, here


@_jit
def _finish(job, task, head, rows, room, zero):  # type: ignore[no-untyped-def]
    """A task's result, to its rows of the output or to the partial results."""
    head_dim, width = job.head_dim, _whole_panels(job.head_dim)
    num_rows = task.num_queries * job.group
    sums = _floats(room + job.to_sums, (num_rows, width))
    stats = _floats(room + job.to_stats, (num_rows, 2))
    for row in range(num_rows):
        i, g = row // job.group, row % job.group
        if task.partial < 0:
            here = room + job.to_sums + 4 * width * row
            _write(job, rows[task.first_query + i], head, g, here, stats[row, 0], stats[row, 1], zero)
        else:
            partial = _partial(job, task.partial + i, head)
            for d in range(head_dim):
                partial[g, d] = sums[row, d]
            partial[g, head_dim], partial[g, head_dim + 1] = stats[row, 0], stats[row, 1]


@_jit
def _merge(job, row, head, parts, room, zero):  # type: ignore[no-untyped-def]
    """A sequence's partial results, in the order of ``parts``, to its row of the output."""
    head_dim = job.head_dim
    sums, stats = _floats(room + job.to_sums, head_dim), _floats(room + job.to_stats, 2)
    for g in range(job.group):
        sums[:] = 0.0
        stats[0], stats[1] = -np.inf, 0.0
        for part in parts:
            partial = _partial(job, part, head)[g]
            _fold(sums, stats, partial, partial[head_dim:], head_dim)
        _write(job, row, head, g, room + job.to_sums, stats[0], stats[1], zero)


@_jit
def _work(job, zero):  # type: ignore[no-untyped-def]
    """Takes tasks until none is left. Any number of threads may do so at once."""
    room = job.room + take_ticket(job.tickets) * job.room_bytes
    tasks = _integers(job.tasks, (job.num_tasks, 7))
    runs = _integers(job.runs, (job.num_runs, 2))
    rows, sequences = _integers(job.rows, job.num_queries), _integers(job.sequences, job.num_queries)
    parts, first_part = _integers(job.parts, job.num_parts), _integers(job.first_part, job.num_ends)
    ticket = take_ticket(job.tickets + 8)
    while ticket < job.num_tasks * job.num_kv_heads:
        head, t = ticket // job.num_tasks, tasks[ticket % job.num_tasks]
        task = Task(t[0], t[1], t[2], t[3], t[4], t[5], t[6])
        _attend(job, task, head, rows, runs, room, zero)
        _finish(job, task, head, rows, room, zero)
        if task.partial >= 0:
            for query in range(task.first_query, task.first_query + task.num_queries):
                sequence = sequences[query]
                ends = first_part[sequence], first_part[sequence + 1]
                place = 2 + sequence * job.num_kv_heads + head
                if take_ticket(job.tickets + 8 * place) == ends[1] - ends[0] - 1:
                    _merge(job, rows[query], head, parts[ends[0] : ends[1]], room, zero)
        ticket = take_ticket(job.tickets + 8)


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
    signature = types.void(types.CPointer(from_dtype(_JOB_TYPE)))
    return c_function(signature, partial(_entry, zero), (__file__, intrinsics.__file__, vectors.__file__))
