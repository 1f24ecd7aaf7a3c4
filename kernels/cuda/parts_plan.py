"""Queries against parts of what they attend to, as tables on the device: see :func:`kernels.reference.attend_parts`.

A span's queries are cut into tasks of neighbours, and its tokens, where few queries see many of them, into stretches,
so that enough programs have work. A query's results of its stretches are merged.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kernels.attention import PartPlan, PartSpan, slots_of
from kernels.cuda.plan import CHUNK, PART, Integers, send

_EMPTY = np.empty((0, 8), np.int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class DevicePartPlan(PartPlan):
    """Tables in int32.

    Attributes:
        slots: [tokens of all spans, one list after the other].
        queries: [., 8]: a query's row in the batch, first token that it sees and the end of them, its first partial
            result, how many it has, and zeros.
        work: [., 8]: tasks: number of its first query, how many, where its span's slots begin, first token and end
            of the stretch, its number in the span, and zeros.
        num_partials: partial results of all queries.
        max_queries: of a task.
    """

    slots: Tensor
    queries: Tensor
    work: Tensor
    num_partials: int
    max_queries: int


def plan_parts(spans: Sequence[PartSpan], device: torch.device) -> DevicePartPlan:
    """Lays the spans out on ``device``. Does not wait for it."""
    queries, tasks, slots = [_EMPTY], [_EMPTY], [np.empty(0, np.int64)]
    num_queries = num_slots = num_partials = 0
    for span in spans:
        count = num_stretches(span.num_queries, span.num_tokens)
        queries.append(_queries(span, num_partials, count))
        tasks.append(_tasks(span, num_queries, num_slots, count))
        slots.append(slots_of(span.runs)[: span.num_tokens])
        num_queries += span.num_queries
        num_slots += span.num_tokens
        num_partials += span.num_queries * count
    tables = send(np.concatenate(slots), np.concatenate(queries), np.concatenate(tasks), device=device)
    return DevicePartPlan(
        spans=tuple(spans),
        slots=tables[0],
        queries=tables[1],
        work=tables[2],
        num_partials=num_partials,
        max_queries=min(CHUNK, max((span.num_queries for span in spans), default=0)),
    )


def num_stretches(num_queries: int, num_tokens: int) -> int:
    """Into how many so many tokens are cut for so many queries: the fewer queries, the shorter each is."""
    return -(-num_tokens // (PART * min(num_queries, CHUNK)))


def _queries(span: PartSpan, first_partial: int, num_stretches: int) -> Integers:
    number = np.arange(span.num_queries)
    rows = np.zeros((span.num_queries, 8), np.int64)
    rows[:, 0] = span.query_start + number
    rows[:, 1:3] = span.seen
    rows[:, 3] = first_partial + number * num_stretches
    rows[:, 4] = num_stretches
    return rows


def _tasks(span: PartSpan, first_query: int, first_slot: int, num_stretches: int) -> Integers:
    first = np.arange(0, span.num_queries, CHUNK)
    start, stretch = (grid.ravel() for grid in np.meshgrid(first, np.arange(num_stretches), indexing="ij"))
    length = PART * min(span.num_queries, CHUNK)
    rows = np.zeros((len(start), 8), np.int64)
    rows[:, 0] = first_query + start
    rows[:, 1] = np.minimum(CHUNK, span.num_queries - start)
    rows[:, 2] = first_slot
    rows[:, 3] = stretch * length
    rows[:, 4] = np.minimum((stretch + 1) * length, span.num_tokens)
    rows[:, 5] = stretch
    return rows
