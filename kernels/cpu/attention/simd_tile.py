"""One tile of a task's tokens, against all queries of the task: part of :mod:`kernels.cpu.attention.simd`.

The shapes and the record ``args`` of a call's arguments are described there. ``scratch`` is the address of the calling
thread's memory.
"""

from typing import Any, NamedTuple

import numpy as np
from numba import carray, njit

from kernels.cpu.attention import lanes
from kernels.cpu.attention.intrinsics import (
    item_bytes,
    pack_keys,
    pack_values,
    pointer,
    power_of_two,
    prefetch,
    product,
    softmax,
    words_in,
)
from kernels.cpu.attention.lanes import LANES, PANEL, ROW_COUNTS

TILE = 256
BLOCK_ROWS = 64  # rows of scores at a time: with a tile's keys and values they stay in the second-level cache

OPTIONS = {"error_model": "numpy", "nogil": True, "fastmath": {"contract"}}
_MOST_ROWS = ROW_COUNTS[0]
_LOG2_E = 1.4426950408889634
_jit = njit(no_cpython_wrapper=True, no_cfunc_wrapper=True, **OPTIONS)


@njit(**OPTIONS)
def exp2(x: Any) -> Any:
    """Returns 2 to a float32 of at most 127, within 2 units in the last place; 0 below -126.5."""
    x = max(x, np.float32(-127.0))
    whole = np.floor(x + np.float32(0.5))
    rest = x - whole
    power = np.float32(lanes.EXP2[0])
    for coefficient in lanes.EXP2[1:]:
        power = power * rest + np.float32(coefficient)
    return power * power_of_two(whole)


class Tile(NamedTuple):
    """``num_tokens`` tokens after the task's first ``start``, and the ``num_next`` of the next tile.

    ``slots`` and ``next_slots`` are the addresses of their slots.
    """

    start: Any
    num_tokens: Any
    slots: Any
    next_slots: Any
    num_next: Any


class _Block(NamedTuple):
    """Queries of a task from ``first`` on, in ``num_rows`` rows of scores.

    They see only tokens among the tile's first ``num_visible``.
    """

    first: Any
    num_queries: Any
    num_rows: Any
    num_visible: Any


@_jit
def floats(address, shape):  # type: ignore[no-untyped-def]
    """Views the memory at an address as float32."""
    return carray(pointer(address, np.float32(0)), shape)


@_jit
def integers(address, shape):  # type: ignore[no-untyped-def]
    """Views the memory at an address as 64-bit integers."""
    return carray(pointer(address, np.int64(0)), shape)


@_jit
def slots_at(address):  # type: ignore[no-untyped-def]
    """Views the memory at an address as the slots of a tile."""
    return carray(pointer(address, np.int32(0)), TILE)


@_jit
def whole_panels(columns):  # type: ignore[no-untyped-def]
    """Rounds a number of columns up to whole panels."""
    return -(-columns // PANEL) * PANEL


@_jit
def _multiply(a, a_stride, b, c, c_stride, num_words, num_rows, zero):  # type: ignore[no-untyped-def]
    """Computes C [num_rows, PANEL] = A [num_rows, num_words] B [num_words, PANEL]."""
    row = 0
    while row < num_rows:
        missing = num_rows - row
        count = 8 if missing >= 8 and _MOST_ROWS >= 8 else 4 if missing >= 4 else 2 if missing >= 2 else 1
        product(a + row * a_stride, a_stride, b, c + row * c_stride, c_stride, num_words, count, zero)
        row += count


@_jit
def expand_runs(runs, run, offset, num_tokens, slots):  # type: ignore[no-untyped-def]
    """Writes the slots of the next tokens, the last one again up to a whole panel; returns the next run and offset."""
    filled = 0
    while filled < num_tokens:
        start = runs[run, 0] + offset
        count = min(runs[run, 1] - start, num_tokens - filled)
        for i in range(count):
            slots[filled + i] = start + i
        filled, offset = filled + count, offset + count
        if start + count == runs[run, 1]:
            run, offset = run + 1, 0
    for i in range(filled, whole_panels(filled)):
        slots[i] = slots[filled - 1]
    return run, offset


@_jit
def _pack_panel_keys(args, head, tile, panel, scratch, zero):  # type: ignore[no-untyped-def]
    """Packs the keys of one panel of tokens; prefetches its values and, in the first tile, the next panel's keys."""
    row_bytes, num_words = args.head_dim * item_bytes(zero), words_in(args.head_dim, zero)
    keys = args.keys + head * args.num_slots * row_bytes
    values = args.values + head * args.num_slots * row_bytes
    slots = tile.slots + 4 * panel * PANEL
    prefetch(values, slots, PANEL, row_bytes)
    if tile.start == 0 and (panel + 1) * PANEL < tile.num_tokens:
        prefetch(keys, slots + 4 * PANEL, PANEL, row_bytes)
    to = scratch + args.to_packed_keys + 4 * panel * num_words * PANEL
    for half in range(2):
        pack_keys(keys, slots + 4 * half * LANES, row_bytes, num_words, to + 4 * half * LANES, zero)


@_jit
def _pack_tile_values(args, head, tile, scratch, zero):  # type: ignore[no-untyped-def]
    """Packs a tile's values, and prefetches the next tile's keys."""
    row_bytes, num_words = args.head_dim * item_bytes(zero), words_in(TILE, zero)
    keys = args.keys + head * args.num_slots * row_bytes
    values = args.values + head * args.num_slots * row_bytes
    slots, step = slots_at(tile.slots), TILE // num_words
    for word in range(words_in(tile.num_tokens, zero)):
        token = word * step
        if token < tile.num_next:
            prefetch(keys, tile.next_slots + 4 * token, step, row_bytes)
        first = values + slots[token] * row_bytes
        second = values + slots[min(token + step, tile.num_tokens) - 1] * row_bytes
        to = scratch + args.to_packed_values + 4 * word * PANEL
        pack_values(first, second, args.head_dim, 4 * num_words * PANEL, to, zero)


@_jit
def _score(args, head, tile, block, num_packed, scratch, zero):  # type: ignore[no-untyped-def]
    """Computes a block's scores of the tokens that it sees. ``num_packed`` panels of keys are packed already."""
    num_words = words_in(args.head_dim, zero)
    queries = scratch + args.to_queries + 4 * num_words * block.first * args.group
    for panel in range(whole_panels(block.num_visible) // PANEL):
        if panel >= num_packed:
            _pack_panel_keys(args, head, tile, panel, scratch, zero)
        keys = scratch + args.to_packed_keys + 4 * panel * num_words * PANEL
        to = scratch + args.to_scores + 4 * panel * PANEL
        _multiply(queries, 4 * num_words, keys, to, 4 * TILE, num_words, block.num_rows, zero)


@_jit
def _seen_range(args, task, query):  # type: ignore[no-untyped-def]
    """Returns the first of the task's tokens that a query sees, and the end of them."""
    if task.first_range < 0:
        return np.int64(0), task.num_tokens
    ranges = integers(args.ranges, (args.num_ranges, 2))
    return ranges[task.first_range + query, 0], ranges[task.first_range + query, 1]


@_jit
def _hide(args, task, tile, block, scratch):  # type: ignore[no-untyped-def]
    """Sets the scores of tokens that a query does not see to minus infinity."""
    width = whole_panels(block.num_visible)
    scores = floats(scratch + args.to_scores, (block.num_rows, TILE))
    for row in range(block.num_rows):
        first, stop = _seen_range(args, task, block.first + row // args.group)
        for token in range(min(width, first - tile.start)):
            scores[row, token] = -np.inf
        for token in range(max(0, min(tile.num_tokens, stop - tile.start)), width):
            scores[row, token] = -np.inf


@_jit
def fold(sums, stats, more_sums, more_stats, head_dim):  # type: ignore[no-untyped-def]
    """Adds weighted values, relative to their maximum, to those of the tokens before."""
    top = max(stats[0], more_stats[0])
    old, new = exp2(stats[0] - top), exp2(more_stats[0] - top)
    stats[0], stats[1] = top, stats[1] * old + more_stats[1] * new
    for d in range(head_dim):
        sums[d] = sums[d] * old + more_sums[d] * new


@_jit
def _add_values(args, tile, block, scratch, zero):  # type: ignore[no-untyped-def]
    """Multiplies a block's weights by the tile's values, and folds them into those of the tiles before."""
    width, num_rows = whole_panels(args.head_dim), block.num_rows
    num_words = words_in(block.num_visible, zero)
    for column in range(0, width, PANEL):
        values = scratch + args.to_packed_values + 4 * column * words_in(TILE, zero)
        to = scratch + args.to_tile_sums + 4 * column
        _multiply(scratch + args.to_scores, 4 * TILE, values, to, 4 * width, num_words, num_rows, zero)
    tile_sums = floats(scratch + args.to_tile_sums, (num_rows, width))
    tile_stats = floats(scratch + args.to_tile_stats, (num_rows, 2))
    sums = floats(scratch + args.to_sums + 4 * block.first * args.group * width, (num_rows, width))
    stats = floats(scratch + args.to_stats + 8 * block.first * args.group, (num_rows, 2))
    for row in range(num_rows):
        fold(sums[row], stats[row], tile_sums[row], tile_stats[row], args.head_dim)


@_jit
def attend_tile(args, task, head, tile, scratch, zero):  # type: ignore[no-untyped-def]
    """Computes the attention of all queries of a task to one tile, in blocks of queries."""
    factor = np.float32(args.scale * _LOG2_E)
    queries_at_once = max(1, BLOCK_ROWS // args.group)
    packed_keys, packed_values = np.int64(0), False
    for first in range(0, task.num_queries, queries_at_once):
        num_queries = min(queries_at_once, task.num_queries - first)
        # Ranges go up from query to query: the first's begins first, the last's ends last.
        num_visible = min(tile.num_tokens, _seen_range(args, task, first + num_queries - 1)[1] - tile.start)
        if num_visible <= 0 or _seen_range(args, task, first)[0] - tile.start >= tile.num_tokens:
            continue
        block = _Block(first, num_queries, num_queries * args.group, num_visible)
        _score(args, head, tile, block, packed_keys, scratch, zero)
        _hide(args, task, tile, block, scratch)
        num_panels = whole_panels(num_visible) // PANEL
        for row in range(block.num_rows):
            softmax(
                scratch + args.to_scores + 4 * TILE * row,
                num_panels,
                factor,
                scratch + args.to_tile_stats + 8 * row,
                zero,
            )
        if not packed_values:
            _pack_tile_values(args, head, tile, scratch, zero)
        _add_values(args, tile, block, scratch, zero)
        packed_keys, packed_values = max(packed_keys, num_panels), True
