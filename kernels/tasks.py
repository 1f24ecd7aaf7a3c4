"""How a step's attention is cut into tasks for :mod:`kernels.simd`.

A decode's tokens are cut into parts by their number alone, so that what a sequence is given depends neither on its
batch nor on the number of threads. A chunk's queries are taken in blocks of neighbours, each one task, from the first
token that any of them sees. Decodes that share a run of tokens are taken in blocks of members, each one task for every
part of the run.

A draft is a table of tasks, one row each, in which a task's tokens begin at a place in the list of all tokens of all
runs; simd.TASK gives that place as a run and an offset.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, count, pairwise, product

import numpy as np
from numpy.typing import NDArray

from kernels import simd
from kernels.attention import SequenceSpan, SharedSpan, TaskPlan

MAX_QUERIES = 32  # of a task: so many meet keys and values that are laid out once
MAX_PARTS = 16  # of a run of a decode's own tokens
SHARED_PART = 1024  # tokens of a part of a shared run
_NO_WINDOW = 1 << 40

Integers = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Draft:
    """Tasks [n, 7]: first query, queries, first token, tokens, position, window, first partial result or -1.

    ``rows`` and ``decodes``: the queries that the draft adds, and their decodes or -1. ``parts``: [m, 2], decode and
    partial result, in the order in which they are merged.
    """

    tasks: Integers
    rows: Integers
    decodes: Integers
    parts: Integers


def plan_tasks(spans: Sequence[SequenceSpan], window: int | None, shared: Sequence[SharedSpan]) -> TaskPlan:
    """Tasks of a step. Members of ``shared`` are decodes that see all of the shared tokens."""
    shared = sorted(shared, key=lambda common: common.first_token)
    runs, first_token, ends = _lay_out_runs([*(span.runs for span in spans), *(span.runs for span in shared)])
    decodes = [index for index, span in enumerate(spans) if span.num_queries == 1]
    own = _draft_decodes(spans, decodes, window, shared, first_token)
    common = _draft_shared(shared, decodes, first_token[len(spans) : -1], own)
    chunks = _draft_chunks(spans, window, first_token, len(own.rows) + len(common.rows))
    parts = np.concatenate((common.parts, own.parts))
    num_parts = np.bincount(parts[:, 0], minlength=len(decodes))
    own.tasks[num_parts[own.tasks[:, 0]] == 1, -1] = -1
    tasks = np.concatenate((chunks.tasks, common.tasks, own.tasks))  # the longest first
    first_run = np.searchsorted(ends, tasks[:, 2], side="right")
    skip = tasks[:, 2] - (ends - (runs[:, 1] - runs[:, 0]))[first_run]
    return _task_plan(
        tasks=np.column_stack((tasks[:, :2], first_run, skip, tasks[:, 3:])),
        runs=runs,
        rows=np.concatenate((own.rows, common.rows, chunks.rows)),
        sequences=np.concatenate((own.decodes, common.decodes, chunks.decodes)),
        parts=parts[parts[:, 0].argsort(kind="stable"), 1],
        first_part=np.concatenate(([0], num_parts.cumsum())),
        num_partials=len(parts),
    )


def _task_plan(*, num_partials: int, **arrays: Integers) -> TaskPlan:
    dense = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    sizes = (len(dense[name]) for name in ("tasks", "runs", "rows", "parts", "first_part"))
    return TaskPlan(
        **dense,
        num_partials=num_partials,
        max_queries=int(dense["tasks"][:, 1].max()),
        addresses=(*sizes, *(dense[name].ctypes.data for name in simd.PLANNED)),
    )


def _lay_out_runs(lists: Sequence[tuple[tuple[int, int], ...]]) -> tuple[Integers, Integers, Integers]:
    """Runs [R, 2] of all lists of tokens, the first token of each list, and tokens up to the end of each run."""
    runs = np.fromiter(chain.from_iterable(chain.from_iterable(lists)), np.int64).reshape(-1, 2)
    ends = (runs[:, 1] - runs[:, 0]).cumsum()
    last_run = np.fromiter(map(len, lists), np.int64, len(lists)).cumsum() - 1
    return runs, np.concatenate(([0], ends[last_run])), ends


def _draft_decodes(
    spans: Sequence[SequenceSpan],
    decodes: Sequence[int],
    window: int | None,
    shared: Sequence[SharedSpan],
    first_token: Integers,
) -> _Draft:
    """Each decode's tokens that it sees and does not share, in parts."""
    covered: dict[int, list[SharedSpan]] = {}
    for common in shared:
        for member in common.members:
            covered.setdefault(member, []).append(common)
    ranges: list[tuple[int, int, int]] = []
    for decode, index in enumerate(decodes):
        base, stop = int(first_token[index]), int(first_token[index + 1])
        start = base if window is None else max(base, stop - window)
        for common in covered.get(index, ()):
            if start < base + common.first_token:
                ranges.append((decode, start, base + common.first_token))
            start = base + common.first_token + common.num_tokens
        if start < stop:
            ranges.append((decode, start, stop))
    owner, first, end = np.array(ranges, np.int64).reshape(-1, 3).T
    size = -(-(end - first) // (simd.TILE * MAX_PARTS)) * simd.TILE
    num_parts = -(-(end - first) // size)
    which = np.arange(len(ranges)).repeat(num_parts)
    begin = first[which] + (np.arange(len(which)) - (num_parts.cumsum() - num_parts)[which]) * size[which]
    tokens = np.minimum(size[which], end[which] - begin)
    numbers = np.arange(len(which))
    return _Draft(
        tasks=_table(owner[which], 1, begin, tokens, tokens - 1, _NO_WINDOW, numbers),
        rows=np.array([spans[index].query_start for index in decodes], np.int64),
        decodes=np.arange(len(decodes)),
        parts=_table(owner[which], numbers),
    )


def _draft_shared(shared: Sequence[SharedSpan], decodes: Sequence[int], first: Integers, own: _Draft) -> _Draft:
    """The shared runs, whose tokens begin at ``first``, with their members' queries."""
    number = {index: decode for decode, index in enumerate(decodes)}
    members = [number[index] for common in shared for index in common.members]
    tasks: list[tuple[int, ...]] = []
    parts: list[tuple[int, int]] = []
    query, partial = 0, len(own.tasks)
    for common, base in zip(shared, first.tolist(), strict=True):
        num_blocks = -(-len(common.members) // MAX_QUERIES)
        edges = [len(common.members) * block // num_blocks for block in range(num_blocks + 1)]
        for part, (start, stop) in product(range(0, common.num_tokens, SHARED_PART), pairwise(edges)):
            tokens = min(SHARED_PART, common.num_tokens - part)
            where = len(own.rows) + query + start
            tasks.append((where, stop - start, base + part, tokens, tokens - 1, _NO_WINDOW, partial))
            parts.extend(zip(members[query + start : query + stop], count(partial), strict=False))
            partial += stop - start
        query += len(common.members)
    return _Draft(
        tasks=np.array(tasks, np.int64).reshape(-1, 7),
        rows=own.rows[members],
        decodes=own.decodes[members],
        parts=np.array(parts, np.int64).reshape(-1, 2),
    )


def _draft_chunks(spans: Sequence[SequenceSpan], window: int | None, first_token: Integers, num_before: int) -> _Draft:
    """The chunks' queries in blocks, the last first: it sees most."""
    tasks, rows = [np.empty((0, 7), np.int64)], [np.empty(0, np.int64)]
    for index, span in enumerate(spans):
        if span.num_queries == 1:
            continue
        query = np.arange(0, span.num_queries, MAX_QUERIES)[::-1]
        num_queries = np.minimum(MAX_QUERIES, span.num_queries - query)
        base, end = first_token[index], first_token[index + 1]
        position = end - span.num_queries - base + query
        start = np.zeros_like(position) if window is None else (position - window + 1).clip(min=0)
        tokens = position + num_queries - start
        tasks.append(
            _table(num_before + query, num_queries, base + start, tokens, position - start, window or _NO_WINDOW, -1)
        )
        rows.append(np.arange(span.query_start, span.query_start + span.num_queries))
        num_before += span.num_queries
    together = np.concatenate(rows)
    nothing = np.empty((0, 2), np.int64)
    return _Draft(tasks=np.concatenate(tasks), rows=together, decodes=np.full_like(together, -1), parts=nothing)


def _table(*columns: Integers | int) -> Integers:
    return np.stack(np.broadcast_arrays(*columns), axis=1)
