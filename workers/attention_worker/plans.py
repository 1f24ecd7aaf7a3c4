"""Lays out what an order's queries see at this worker, once for all layers of a window."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kernels.attention import PartPlan, PartSpan
from kernels.protocol import Kernels
from placement.serving.offload.orders import Geometry, QuerySpan, Seen, StepOrder
from workers.transport.errors import BadFrame

Blocks = Mapping[int, tuple[int, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowPlan:
    """What the queries of an order see in layers of one window.

    Attributes:
        before: what was there before the order, or all where queries do not go ahead; None: nothing of it is seen.
        new: what the order stores; None: nothing of it is seen, or it is in ``before``.
    """

    before: PartPlan | None
    new: PartPlan | None


def plan_order(order: StepOrder, tables: Blocks, geometry: Geometry, kernels: Kernels) -> tuple[WindowPlan, ...]:
    """Lays out an order for each window of the geometry. Raises BadFrame where it cannot be carried out."""
    num_queries = order.num_queries
    if not 0 <= order.num_whole <= num_queries:
        raise BadFrame(f"an order has {num_queries} queries, of which {order.num_whole} are answered finally")
    for span in order.spans:
        _check(span, tables, geometry)
    if order.slots and not 0 <= min(order.slots) <= max(order.slots) < geometry.num_blocks * geometry.width:
        raise BadFrame("an order stores tokens in slots that there are not")
    return tuple(_plan(order, window, tables, geometry, kernels) for window in range(len(geometry.windows)))


def _check(span: QuerySpan, tables: Blocks, geometry: Geometry) -> None:
    """Raises BadFrame where a span does not fit its table, or what its queries see is not as it should be."""
    if span.sequence not in tables:
        raise BadFrame(f"sequence {span.sequence} has no table")
    fits = len(span.seen) == len(geometry.windows) and span.num_queries >= 1
    num_tokens = _num_tokens(span)
    if not fits or not 0 <= span.num_new <= num_tokens <= len(tables[span.sequence]) * geometry.width:
        raise BadFrame(f"the queries of sequence {span.sequence} do not fit its table")
    for seen in span.seen:
        ranges = np.array(seen, dtype=np.int64).reshape(-1, 2)
        ordered = (ranges >= 0).all() and (np.diff(ranges, axis=0) >= 0).all() and (np.diff(ranges) >= 0).all()
        if len(seen) != span.num_queries or not ordered:
            raise BadFrame(f"the queries of sequence {span.sequence} see impossible ranges")


def _num_tokens(span: QuerySpan) -> int:
    """Counts the tokens at the worker up to the last one that is seen in some layer."""
    return max((end for seen in span.seen for _, end in seen), default=0)


def _plan(order: StepOrder, window: int, tables: Blocks, geometry: Geometry, kernels: Kernels) -> WindowPlan:
    before: list[PartSpan] = []
    new: list[PartSpan] = []
    row = 0
    for span in order.spans:
        num_tokens = _num_tokens(span)
        first_new = num_tokens - span.num_new if geometry.q_first else num_tokens
        table = np.array(tables[span.sequence], dtype=np.int64)
        seen = _array(span.seen[window])
        before.append(_part(row, table, geometry.width, 0, first_new, seen))
        if first_new < num_tokens:
            new.append(_part(row, table, geometry.width, first_new, num_tokens, seen))
        row += span.num_queries
    return WindowPlan(before=_planned(before, kernels), new=_planned(new, kernels))


def _array(seen: Seen) -> NDArray[np.int64]:
    return np.array(seen, dtype=np.int64).reshape(-1, 2)


def _part(row: int, table: NDArray[np.int64], width: int, first: int, stop: int, seen: NDArray[np.int64]) -> PartSpan:
    """Returns what is seen of the tokens from ``first`` to before ``stop``."""
    runs = _runs(table, width, first, stop)
    return PartSpan(query_start=row, runs=runs, seen=seen.clip(first, stop) - first)


def _runs(table: NDArray[np.int64], width: int, first: int, stop: int) -> NDArray[np.int64]:
    """Returns the slots of tokens of a sequence, as runs [R, 2]."""
    if first >= stop:
        return np.empty((0, 2), dtype=np.int64)
    starts = table[first // width : -(-stop // width)] * width
    runs = np.stack([starts, starts + width], axis=1)
    runs[-1, 1] = runs[-1, 0] + (stop - 1) % width + 1
    runs[0, 0] += first % width
    return runs


def _planned(spans: Sequence[PartSpan], kernels: Kernels) -> PartPlan | None:
    seeing = [span for span in spans if (span.seen[:, 0] < span.seen[:, 1]).any()]
    return kernels.plan_parts(seeing) if seeing else None
