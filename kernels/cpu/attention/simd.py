"""Attention over a paged KV cache as machine code for this CPU, compiled by Numba.

Attention is cut into tasks. A task has a few queries of one KV head and a list of tokens, of which each query sees a
range. A decode has one query, a prefill's chunk has neighbouring queries, and a shared prefix has those of all its
members. A task goes through its tokens in tiles of TILE. A tile's keys are packed for vectors into a buffer that stays
in cache, and are multiplied by the rows of all queries (G query heads each); so are its values. The maximum, mass and
weighted values of a tile's softmax are folded into those of the tiles before (Dao et al. 2023, FlashDecoding). A task
that is one part of a sequence stores them in memory, and the thread that ends the sequence's last part merges the
parts in the order of the plan.

So bits depend on the task alone, and not on where its tokens lie, on the rest of the batch, on the other queries of the
task, or on how many threads share the tasks.

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

from kernels.cpu.attention import intrinsics, lanes, simd_tile, vectors
from kernels.cpu.attention.intrinsics import item_bytes, load_word, take_ticket, words_in, write_output
from kernels.cpu.attention.lanes import FLOAT32, PAIRED, WIDENED
from kernels.cpu.attention.simd_tile import (
    OPTIONS,
    TILE,
    Tile,
    attend_tile,
    expand_runs,
    floats,
    fold,
    integers,
    slots_at,
    whole_panels,
)
from kernels.cpu.machine.numba_code import c_function

# The arguments of one call:
#   query, output  addresses of [T, H, D]
#   keys, values   addresses of [K, S, D], of the same type
#   stats          0, or the address of [T, H, 2] in float32, for the maximum and mass of each output's softmax
#   partials       address of [num_partials, K, G, D + 2] in float32
#   tickets        address of [2 + B * K] integers, 0 at first
#   scratch        address of [threads, scratch_bytes], in which each of BUFFERS begins at ``to_`` its name
# and the sizes and addresses of a plan's arrays. All arrays are dense.
BUFFERS = ("slots", "queries", "packed_keys", "packed_values", "scores", "tile_sums", "tile_stats", "sums", "stats")
PLANNED = ("tasks", "runs", "rows", "ranges", "sequences", "parts", "first_part")  # the arrays of attention.TaskPlan
_ARGUMENTS = (
    *("num_kv_heads", "group", "head_dim", "num_slots", "query", "keys", "values", "output", "stats"),
    *("partials", "tickets"),
    *("scratch", "scratch_bytes", *(f"to_{name}" for name in BUFFERS)),
    *("num_tasks", "num_runs", "num_queries", "num_ranges", "num_parts", "num_ends", *PLANNED),
)
_ARGUMENTS_TYPE = np.dtype([(name, np.int64) for name in _ARGUMENTS] + [("scale", np.float64)])
ARGUMENTS = struct.Struct(f"={len(_ARGUMENTS)}qd")
_jit = njit(no_cpython_wrapper=True, no_cfunc_wrapper=True, **OPTIONS)


class Task(NamedTuple):
    """Queries, and a list of tokens that they attend to, which begins ``skip`` tokens into run ``first_run``.

    Query i sees the tokens within ``ranges[first_range + i]``; all, where ``first_range`` is -1. ``partial`` is the
    number of the first query's partial result, which those of the others follow; -1 where results are whole.
    """

    first_query: Any
    num_queries: Any
    first_run: Any
    skip: Any
    num_tokens: Any
    first_range: Any
    partial: Any


@_jit
def _load_queries(args, task, head, rows, scratch, zero):  # type: ignore[no-untyped-def]
    """Loads a task's queries of one KV head as words, and resets their sums, maxima and masses."""
    num_rows, count = task.num_queries * args.group, args.group * args.head_dim
    words = words_in(count, zero)
    queries = floats(scratch + args.to_queries, (task.num_queries, words))
    for i in range(task.num_queries):
        row = rows[task.first_query + i]
        stored = args.query + (row * args.num_kv_heads + head) * count * item_bytes(zero)
        for word in range(words):
            queries[i, word] = load_word(stored, word, zero)
    floats(scratch + args.to_sums, num_rows * whole_panels(args.head_dim))[:] = 0.0
    stats = floats(scratch + args.to_stats, (num_rows, 2))
    stats[:, 0], stats[:, 1] = -np.inf, 0.0


@_jit
def _partial(args, number, head):  # type: ignore[no-untyped-def]
    """Returns a query's partial result for one KV head: weighted values, maximum and mass [G, D + 2]."""
    shape = (args.group, args.head_dim + 2)
    return floats(args.partials + 4 * (number * args.num_kv_heads + head) * shape[0] * shape[1], shape)


@_jit
def _output(args, row, head, g, zero):  # type: ignore[no-untyped-def]
    """Returns the address of a row's output of one query head."""
    query_head = (row * args.num_kv_heads + head) * args.group + g
    return args.output + query_head * args.head_dim * item_bytes(zero)


@_jit
def _write(args, row, head, g, sums, top, mass, zero):  # type: ignore[no-untyped-def]
    """Writes a query's result, given the address of its weighted values; 0 where it sees no token."""
    to = _output(args, row, head, g, zero)
    write_output(sums, max(mass, np.float32(1e-30)), args.head_dim, to, zero)
    if args.stats != 0:
        query_head = (row * args.num_kv_heads + head) * args.group + g
        stats = floats(args.stats + 8 * query_head, 2)
        stats[0], stats[1] = top, mass


@_jit
def _attend(args, task, head, rows, runs, scratch, zero):  # type: ignore[no-untyped-def]
    """Computes a task for one KV head, and leaves its result in the scratch memory."""
    _load_queries(args, task, head, rows, scratch, zero)
    here, there = scratch + args.to_slots, scratch + args.to_slots + 4 * TILE
    start, num_tokens = np.int64(0), min(TILE, task.num_tokens)
    run, offset = expand_runs(runs, task.first_run, task.skip, num_tokens, slots_at(here))
    while num_tokens > 0:
        num_next = min(TILE, task.num_tokens - start - num_tokens)
        run, offset = expand_runs(runs, run, offset, num_next, slots_at(there))
        attend_tile(args, task, head, Tile(start, num_tokens, here, there, num_next), scratch, zero)
        start, num_tokens = start + num_tokens, num_next
        here, there = there, here


@_jit
def _finish(args, task, head, rows, scratch, zero):  # type: ignore[no-untyped-def]
    """Writes a task's result to its rows of the output, or to the partial results."""
    head_dim, width = args.head_dim, whole_panels(args.head_dim)
    num_rows = task.num_queries * args.group
    sums = floats(scratch + args.to_sums, (num_rows, width))
    stats = floats(scratch + args.to_stats, (num_rows, 2))
    for row in range(num_rows):
        i, g = row // args.group, row % args.group
        if task.partial < 0:
            here = scratch + args.to_sums + 4 * width * row
            _write(args, rows[task.first_query + i], head, g, here, stats[row, 0], stats[row, 1], zero)
        else:
            partial = _partial(args, task.partial + i, head)
            for d in range(head_dim):
                partial[g, d] = sums[row, d]
            partial[g, head_dim], partial[g, head_dim + 1] = stats[row, 0], stats[row, 1]


@_jit
def _merge(args, row, head, parts, scratch, zero):  # type: ignore[no-untyped-def]
    """Merges a sequence's partial results in the order of ``parts``, and writes its row of the output."""
    head_dim = args.head_dim
    sums, stats = floats(scratch + args.to_sums, head_dim), floats(scratch + args.to_stats, 2)
    for g in range(args.group):
        sums[:] = 0.0
        stats[0], stats[1] = -np.inf, 0.0
        for part in parts:
            partial = _partial(args, part, head)[g]
            fold(sums, stats, partial, partial[head_dim:], head_dim)
        _write(args, row, head, g, scratch + args.to_sums, stats[0], stats[1], zero)


@_jit
def _run_tasks(args, zero):  # type: ignore[no-untyped-def]
    """Takes and computes tasks until none is left. Any number of threads may do so at once."""
    scratch = args.scratch + take_ticket(args.tickets) * args.scratch_bytes
    tasks = integers(args.tasks, (args.num_tasks, 7))
    runs = integers(args.runs, (args.num_runs, 2))
    rows, sequences = integers(args.rows, args.num_queries), integers(args.sequences, args.num_queries)
    parts, first_part = integers(args.parts, args.num_parts), integers(args.first_part, args.num_ends)
    ticket = take_ticket(args.tickets + 8)
    while ticket < args.num_tasks * args.num_kv_heads:
        head, t = ticket // args.num_tasks, tasks[ticket % args.num_tasks]
        task = Task(t[0], t[1], t[2], t[3], t[4], t[5], t[6])
        _attend(args, task, head, rows, runs, scratch, zero)
        _finish(args, task, head, rows, scratch, zero)
        if task.partial >= 0:
            for query in range(task.first_query, task.first_query + task.num_queries):
                sequence = sequences[query]
                ends = first_part[sequence], first_part[sequence + 1]
                place = 2 + sequence * args.num_kv_heads + head
                if take_ticket(args.tickets + 8 * place) == ends[1] - ends[0] - 1:
                    _merge(args, rows[query], head, parts[ends[0] : ends[1]], scratch, zero)
        ticket = take_ticket(args.tickets + 8)


def _entry(zero: Any, version: int) -> Callable[[Any], None]:
    """Makes the function that is compiled, which is given the address of the arguments.

    ``version`` is part of its closure, by which Numba's cache knows the code.
    """

    def attend(args):  # type: ignore[no-untyped-def]
        if version >= 0:
            _run_tasks(carray(args, 1)[0], zero)

    return attend


def compiled(stored: Any) -> int:
    """Compiles the C function for a stored type, or loads it from Numba's cache on disk; returns its address."""
    zero = {FLOAT32: np.float32, WIDENED: np.uint16, PAIRED: np.int16}[stored](0)
    signature = types.void(types.CPointer(from_dtype(_ARGUMENTS_TYPE)))
    sources = (__file__, simd_tile.__file__, intrinsics.__file__, vectors.__file__, lanes.__file__)
    return c_function(signature, partial(_entry, zero), sources)
