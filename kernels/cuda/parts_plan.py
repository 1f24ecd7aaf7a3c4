"""Plans of attention to parts, as tables on the device: see :func:`kernels.reference.attend_parts`.

A span's queries are cut into tasks of neighbours. The tokens of few queries are cut into segments, so that enough
programs run in parallel. With one segment a query has its result at once; with several it has partial results, which
are merged. Spans of single queries have tasks of their own, so that their results do not depend on the chunks beside
them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kernels.attention import PartPlan, PartSpan
from kernels.cuda.plan import CHUNK, PART, Integers, send

_FEW = CHUNK // 2
_EMPTY = np.empty((0, 8), np.int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class DevicePartPlan(PartPlan):
    """Tables in int32.

    Attributes:
        slots: the slots of all spans' tokens, span after span.
        queries: for each query [., 8]: its row in the batch, the first token that it sees and the end, its first
            partial result (-1 where there is only one segment), how many it has, and zeros.
        singles: for each task of a span of one query [., 8]: the first query's number, the number of queries, where the
            span's slots begin, first token and end of the segment, its number in the span, and zeros.
        chunks: the same for each task of the other spans.
        joins: the numbers of the queries that have several partial results.
        num_partials: the number of partial results of all of these.
    """

    slots: Tensor
    queries: Tensor
    singles: Tensor
    chunks: Tensor
    joins: Tensor
    num_partials: int


def plan_parts(spans: Sequence[PartSpan], device: torch.device) -> DevicePartPlan:
    """Lays the spans out on ``device``, without waiting for it."""
    queries, singles, chunks = [_EMPTY], [_EMPTY], [_EMPTY]
    num_queries = num_slots = num_partials = 0
    for span in spans:
        count = num_segments(span.num_queries, span.num_tokens)
        queries.append(_queries(span, num_partials, count))
        (singles if span.num_queries == 1 else chunks).append(_tasks(span, num_queries, num_slots, count))
        num_queries += span.num_queries
        num_slots += int((span.runs[:, 1] - span.runs[:, 0]).sum())
        num_partials += span.num_queries * count if count > 1 else 0
    rows = np.concatenate(queries)
    runs = np.concatenate([np.empty((0, 2), np.int64), *(span.runs for span in spans)])
    lengths = runs[:, 1] - runs[:, 0]
    shifts = runs[:, 0] - (lengths.cumsum() - lengths)  # from a token's place in the list to its slot
    joins = np.flatnonzero(rows[:, 4] > 1)
    tables = send(
        rows, np.concatenate(singles), np.concatenate(chunks), joins, np.stack((shifts, lengths)), device=device
    )
    shift = tables[4][0].repeat_interleave(tables[4][1], output_size=num_slots)
    return DevicePartPlan(
        spans=tuple(spans),
        slots=shift + torch.arange(num_slots, dtype=torch.int32, device=device),
        queries=tables[0],
        singles=tables[1],
        chunks=tables[2],
        joins=tables[3],
        num_partials=num_partials,
    )


def num_segments(num_queries: int, num_tokens: int) -> int:
    """Returns the number of segments of so many tokens; with fewer queries segments are shorter."""
    return min(1, num_tokens) if num_queries >= _FEW else -(-num_tokens // _length(num_queries))


def _length(num_queries: int) -> int:
    """Returns the tokens of a segment."""
    return PART * num_queries


def _queries(span: PartSpan, first_partial: int, num_segments: int) -> Integers:
    """Returns the rows of ``queries`` of a span."""
    number = np.arange(span.num_queries)
    rows = np.zeros((span.num_queries, 8), np.int64)
    rows[:, 0] = span.query_start + number
    rows[:, 1:3] = span.seen
    rows[:, 3] = first_partial + number * num_segments if num_segments > 1 else -1
    rows[:, 4] = num_segments
    return rows


def _tasks(span: PartSpan, first_query: int, first_slot: int, num_segments: int) -> Integers:
    """Returns the rows of ``singles`` or ``chunks`` of a span."""
    first = np.arange(0, span.num_queries, CHUNK)
    start, segment = (grid.ravel() for grid in np.meshgrid(first, np.arange(num_segments), indexing="ij"))
    length = _length(span.num_queries) if num_segments > 1 else span.num_tokens
    rows = np.zeros((len(start), 8), np.int64)
    rows[:, 0] = first_query + start
    rows[:, 1] = np.minimum(CHUNK, span.num_queries - start)
    rows[:, 2] = first_slot
    rows[:, 3] = segment * length
    rows[:, 4] = np.minimum((segment + 1) * length, span.num_tokens)
    rows[:, 5] = segment
    return rows
