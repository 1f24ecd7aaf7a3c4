"""Cuts a step's attention into tasks for :mod:`kernels.cpu.attention.simd`.

A decode's tokens are cut into parts by their positions alone, so that a sequence's results depend neither on its batch
nor on the number of threads. A chunk's queries are cut into blocks of neighbours; each block is one task, from the
first token that any of its queries sees. Decodes that share whole parts are cut into blocks of members; each block is
one task for every part. The results have the same bits as if each member had read the part by itself.

A draft is a table of tasks, one in each row. Its tasks' tokens begin at a place in the list of all tokens of all runs;
simd.Task gives that place as a run and an offset.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain, count, pairwise, product, repeat

import numpy as np
from numpy.typing import NDArray

from kernels.attention import PartSpan, Run, SequenceSpan, SharedSpan, TaskPlan, last_runs, split_runs
from kernels.cpu.attention import simd

MAX_QUERIES = 32  # the most queries of a task, which keys and values are packed once for
# The tokens of a part. Each part begins at a multiple of it, so that parts are the same whoever shares them. Shorter
# parts cost more to merge, and of longer ones fewer can be shared.
PART = 512

Integers = NDArray[np.int64]
_NO_RANGES = np.empty((0, 2), np.int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Draft:
    """Some tasks of a plan, and the queries and partial results that they add to it.

    Attributes:
        tasks: [n, 6]: first query, number of queries, first token, number of tokens, first range or -1, first partial
            result or -1.
        rows: the rows of the queries in the batch.
        decodes: the number of each query's decode, or -1.
        parts: [m, 3]: decode, first position and partial result.
        ranges: as in TaskPlan.
    """

    tasks: Integers
    rows: Integers
    decodes: Integers
    parts: Integers
    ranges: Integers


def plan_tasks(spans: Sequence[SequenceSpan], window: int | None, shared: Sequence[SharedSpan]) -> TaskPlan:
    """Makes the tasks of a step.

    Members of ``shared`` are decodes that see all of the shared tokens, of which only whole parts count.
    """
    shared = sorted(filter(None, map(whole_parts, shared)), key=lambda common: common.first_token)
    decodes = [index for index, span in enumerate(spans) if span.num_queries == 1]
    ranges = _own_ranges([spans[index] for index in decodes], decodes, window, shared)
    unread = _unread(spans, decodes, ranges, window)
    read = [
        span.runs if num_unread == 0 else last_runs(span.runs, span.num_tokens - num_unread)
        for span, num_unread in zip(spans, unread, strict=True)
    ]
    runs, first_token, ends = _lay_out_runs([*read, *(common.runs for common in shared)])
    first_token[: len(spans)] -= unread
    own = _draft_decodes(ranges, first_token[decodes], np.array([spans[i].query_start for i in decodes], np.int64))
    common = _draft_shared(shared, decodes, first_token[len(spans) :], own)
    chunks = [
        _Chunk(span.query_start, start, _causal(span, window))
        for span, start in zip(spans, first_token[: len(spans)].tolist(), strict=True)
        if span.num_queries > 1
    ]
    return _task_plan((own, common, _draft_chunks(chunks, len(own.rows) + len(common.rows))), runs, ends)


def plan_parts(spans: Sequence[PartSpan], shared: Sequence[SharedSpan]) -> TaskPlan | None:
    """Makes the tasks of queries and parts of what they attend to; returns None where no query sees a token.

    The positions in ``shared`` are places among the tokens of its members, which are single queries that see all of
    them; only whole parts count.
    """
    if not any((span.seen[:, 0] < span.seen[:, 1]).any() for span in spans):
        return None
    shared = sorted(filter(None, map(whole_parts, shared)), key=lambda common: common.first_token)
    single = [index for index, span in enumerate(spans) if span.num_queries == 1]
    ranges = _unshared([(int(a), int(b)) for index in single for a, b in spans[index].seen], single, shared)
    common_runs = [np.array(common.runs, np.int64) for common in shared]
    runs, first_token, ends = _lay_out_arrays([*(span.runs for span in spans), *common_runs])
    rows = np.array([spans[index].query_start for index in single], np.int64)
    own = _draft_decodes(ranges, first_token[single], rows)
    common = _draft_shared(shared, single, first_token[len(spans) :], own)
    chunks = [
        _Chunk(span.query_start, start, span.seen)
        for span, start in zip(spans, first_token[: len(spans)].tolist(), strict=True)
        if span.num_queries > 1
    ]
    return _task_plan((own, common, _draft_chunks(chunks, len(own.rows) + len(common.rows))), runs, ends)


def whole_parts(common: SharedSpan, start: int = 0) -> SharedSpan | None:
    """Returns the whole parts of a shared span from position ``start`` on; None where there are none."""
    first = -(-max(start, common.first_token) // PART) * PART
    stop = (common.first_token + common.num_tokens) // PART * PART
    if first >= stop:
        return None
    runs = split_runs(split_runs(common.runs, first - common.first_token)[1], stop - first)[0]
    return replace(common, first_token=first, num_tokens=stop - first, runs=runs)


def _task_plan(drafts: tuple[_Draft, _Draft, _Draft], runs: Integers, ends: Integers) -> TaskPlan:
    """Combines the drafts of decodes, shared parts and chunks; a decode of one part has no partial result."""
    own, common, _ = drafts
    parts = np.concatenate((common.parts, own.parts))
    num_parts = np.bincount(parts[:, 0], minlength=len(own.rows))
    own.tasks[num_parts[own.tasks[:, 0]] == 1, -1] = -1
    tasks = np.concatenate([draft.tasks for draft in reversed(drafts)])  # the longest first
    first_run = np.searchsorted(ends, tasks[:, 2], side="right")
    skip = tasks[:, 2] - (ends - (runs[:, 1] - runs[:, 0]))[first_run]
    arrays = {
        "tasks": np.column_stack((tasks[:, :2], first_run, skip, tasks[:, 3:])),
        "runs": runs,
        "rows": np.concatenate([draft.rows for draft in drafts]),
        "ranges": drafts[-1].ranges,
        "sequences": np.concatenate([draft.decodes for draft in drafts]),
        "parts": parts[np.lexsort((parts[:, 1], parts[:, 0])), 2],
        "first_part": np.concatenate(([0], num_parts.cumsum())),
    }
    dense = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    sizes = (len(dense[name]) for name in ("tasks", "runs", "rows", "ranges", "parts", "first_part"))
    return TaskPlan(
        **dense,
        num_partials=len(parts),
        max_queries=int(tasks[:, 1].max()),
        addresses=(*sizes, *(dense[name].ctypes.data for name in simd.PLANNED)),
    )


def _own_ranges(
    spans: Sequence[SequenceSpan], names: Sequence[int], window: int | None, shared: Sequence[SharedSpan]
) -> list[tuple[int, int, int]]:
    """Returns the ranges of tokens that decodes see and do not share, each as the decode's number, first and end."""
    seen = [(0 if window is None else max(0, span.num_tokens - window), span.num_tokens) for span in spans]
    return _unshared(seen, names, shared)


def _unshared(
    seen: Sequence[tuple[int, int]], names: Sequence[int], shared: Sequence[SharedSpan]
) -> list[tuple[int, int, int]]:
    """Returns the ranges of ``seen`` that are not in ``shared``, each as the decode's number, first and end."""
    covered: dict[int, list[SharedSpan]] = {}
    for common in shared:
        for member in common.members:
            covered.setdefault(member, []).append(common)
    ranges: list[tuple[int, int, int]] = []
    for decode, ((start, stop), name) in enumerate(zip(seen, names, strict=True)):
        for common in covered.get(name, ()):
            if start < common.first_token:
                ranges.append((decode, start, common.first_token))
            start = common.first_token + common.num_tokens
        if start < stop:
            ranges.append((decode, start, stop))
    return ranges


def _unread(
    spans: Sequence[SequenceSpan], decodes: Sequence[int], ranges: Sequence[tuple[int, int, int]], window: int | None
) -> list[int]:
    """Returns how many of each span's first tokens no task reads from the span's own runs."""
    first = [span.num_tokens for span in spans]
    for decode, start, _ in reversed(ranges):
        first[decodes[decode]] = start
    for index, span in enumerate(spans):
        if span.num_queries > 1:
            first[index] = 0 if window is None else max(0, span.num_tokens - span.num_queries - window + 1)
    return first


def _lay_out_runs(lists: Sequence[tuple[Run, ...]]) -> tuple[Integers, Integers, Integers]:
    """Returns the runs [R, 2] of all lists of tokens, each list's first token, and the tokens up to each run's end."""
    runs = np.fromiter(chain.from_iterable(chain.from_iterable(lists)), np.int64).reshape(-1, 2)
    return _lay_out(runs, np.fromiter(map(len, lists), np.int64, len(lists)))


def _lay_out_arrays(lists: Sequence[Integers]) -> tuple[Integers, Integers, Integers]:
    """Does the same as :func:`_lay_out_runs` for runs that are arrays."""
    return _lay_out(np.concatenate(lists), np.fromiter(map(len, lists), np.int64, len(lists)))


def _lay_out(runs: Integers, num_runs: Integers) -> tuple[Integers, Integers, Integers]:
    lengths = runs[:, 1] - runs[:, 0]
    assert (lengths > 0).all(), runs[lengths <= 0]
    ends = lengths.cumsum()
    return runs, np.concatenate(([0], ends))[num_runs.cumsum() - num_runs], ends


def _draft_decodes(ranges: Sequence[tuple[int, int, int]], first_token: Integers, rows: Integers) -> _Draft:
    """Drafts the tasks of the decodes' unshared tokens, in parts.

    ``first_token`` has the place of each decode's tokens, and ``rows`` the row of its query.
    """
    owner, first, end = np.array(ranges, np.int64).reshape(-1, 3).T
    num_parts = -(-end // PART) - first // PART
    index = np.arange(len(ranges)).repeat(num_parts)  # of the range that each part belongs to
    number = np.arange(len(index)) - (num_parts.cumsum() - num_parts)[index]
    edge = (first[index] // PART + number) * PART
    begin, stop = np.maximum(first[index], edge), np.minimum(end[index], edge + PART)
    tokens, partials = stop - begin, np.arange(len(index))
    place = begin + first_token[owner[index]]
    return _Draft(
        tasks=_table(owner[index], 1, place, tokens, -1, partials),
        rows=rows,
        decodes=np.arange(len(rows)),
        parts=_table(owner[index], begin, partials),
        ranges=_NO_RANGES,
    )


def _draft_shared(shared: Sequence[SharedSpan], decodes: Sequence[int], first: Integers, own: _Draft) -> _Draft:
    """Drafts the tasks of the shared runs, whose tokens begin at the places ``first``."""
    number = {index: decode for decode, index in enumerate(decodes)}
    members = [number[index] for common in shared for index in common.members]
    tasks: list[tuple[int, ...]] = []
    parts: list[tuple[int, int, int]] = []
    query, partial = 0, len(own.tasks)
    for common, base in zip(shared, first.tolist(), strict=True):
        num_blocks = -(-len(common.members) // MAX_QUERIES)
        edges = [len(common.members) * block // num_blocks for block in range(num_blocks + 1)]
        for part, (start, stop) in product(range(0, common.num_tokens, PART), pairwise(edges)):
            first_query, position = len(own.rows) + query + start, common.first_token + part
            tasks.append((first_query, stop - start, base + part, PART, -1, partial))
            block = members[query + start : query + stop]
            parts.extend(zip(block, repeat(position), count(partial), strict=False))
            partial += stop - start
        query += len(common.members)
    return _Draft(
        tasks=np.array(tasks, np.int64).reshape(-1, 6),
        rows=own.rows[members],
        decodes=own.decodes[members],
        parts=np.array(parts, np.int64).reshape(-1, 3),
        ranges=_NO_RANGES,
    )


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Neighbouring queries. ``ranges`` [n, 2] has the tokens that each query sees, counted from ``first_token``."""

    query_start: int
    first_token: int
    ranges: Integers


def _causal(span: SequenceSpan, window: int | None) -> Integers:
    """Returns the range of its sequence's tokens that each query of a chunk sees."""
    stop = np.arange(span.num_tokens - span.num_queries, span.num_tokens) + 1
    first = np.zeros_like(stop) if window is None else (stop - window).clip(min=0)
    return np.column_stack((first, stop))


def _draft_chunks(chunks: Sequence[_Chunk], num_before: int) -> _Draft:
    """Drafts the tasks of chunks in blocks of queries, the last block first, since it sees the most tokens.

    ``num_before`` is the number of queries before those of the chunks.
    """
    tasks, rows, ranges = [np.empty((0, 6), np.int64)], [np.empty(0, np.int64)], [_NO_RANGES]
    num_ranges = 0
    for chunk in chunks:
        num_queries = len(chunk.ranges)
        query = np.arange(0, num_queries, MAX_QUERIES)[::-1]
        stop = np.minimum(query + MAX_QUERIES, num_queries)
        start = chunk.ranges[query, 0]
        tokens = chunk.ranges[stop - 1, 1] - start
        place = num_ranges + query
        block = _table(num_before + place, stop - query, chunk.first_token + start, tokens, place, -1)
        tasks.append(block[tokens > 0])
        rows.append(np.arange(chunk.query_start, chunk.query_start + num_queries))
        ranges.append(chunk.ranges - start[::-1].repeat((stop - query)[::-1])[:, None])
        num_ranges += num_queries
    together = np.concatenate(rows)
    return _Draft(
        tasks=np.concatenate(tasks),
        rows=together,
        decodes=np.full_like(together, -1),
        parts=np.empty((0, 3), np.int64),
        ranges=np.concatenate(ranges),
    )


def _table(*columns: Integers | int) -> Integers:
    """Stacks columns, each an array or a number for all rows."""
    return np.stack(np.broadcast_arrays(*columns), axis=1)
