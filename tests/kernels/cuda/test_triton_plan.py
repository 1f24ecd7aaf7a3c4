"""The device's tables: every visible token of a decode in one part, every query of a chunk in one task."""

import random
from collections import defaultdict
from itertools import chain

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.attention import Run, SequenceSpan
from kernels.cuda.plan import CHUNK, PART, DevicePlan, plan_step

CPU = torch.device("cpu")


def spans_of(lengths: list[tuple[int, int]], seed: int) -> list[SequenceSpan]:
    """Sequences of (context, queries), their slots in runs out of order."""
    rng, spans, free, row = random.Random(seed), [], 0, 0
    for context, num_queries in lengths:
        runs: list[Run] = []
        missing = context + num_queries
        while missing:
            taken = rng.randint(1, missing)
            runs.append((free, free + taken))
            free, missing = free + taken + rng.randint(0, 2), missing - taken
        rng.shuffle(runs)
        spans.append(SequenceSpan(query_start=row, num_queries=num_queries, runs=tuple(runs)))
        row += num_queries
    return spans


def slots_of(span: SequenceSpan) -> list[int]:
    return [slot for run in span.runs for slot in range(*run)]


LENGTHS = st.lists(
    st.tuples(st.integers(0, 3 * PART) | st.just(40_000), st.just(1) | st.integers(1, 3 * CHUNK)),
    min_size=1,
    max_size=6,
)


@settings(deadline=None, max_examples=80)
@given(lengths=LENGTHS, window=st.none() | st.integers(1, 3 * PART), seed=st.integers(0, 99))
def test_every_token_that_a_decode_sees_is_in_one_part(
    lengths: list[tuple[int, int]], window: int | None, seed: int
) -> None:
    spans = spans_of(lengths, seed)
    plan = plan_step(spans, window, CPU)
    seen: dict[int, list[int]] = defaultdict(list)
    partials: dict[int, list[int]] = defaultdict(list)
    for row, first_slot, begin, end, partial, *rest in plan.decodes.tolist():
        assert begin < end and rest == [0, 0, 0]
        seen[row] += plan.slots[first_slot + begin : first_slot + end].tolist()
        partials[row].append(partial)
    decodes = {span.query_start: span for span in spans if span.num_queries == 1}
    assert seen == {row: slots_of(span)[-(window or 1 << 30) :] for row, span in decodes.items()}
    assert plan.counts.tolist() == [len(plan.decodes), len(plan.merges), 0, 0]
    assert all(begin // PART == (end - 1) // PART for begin, end in plan.decodes[:, 2:4].tolist())
    merged = {row: list(range(first, first + count)) for row, first, count, _ in plan.merges.tolist()}
    assert {row: parts for row, parts in partials.items() if parts != [-1]} == merged
    assert all(len(parts) >= 2 for parts in merged.values())
    assert sorted(chain.from_iterable(merged.values())) == list(range(plan.num_partials))


@settings(deadline=None, max_examples=80)
@given(lengths=LENGTHS, seed=st.integers(0, 99))
def test_every_query_of_a_chunk_is_in_one_task(lengths: list[tuple[int, int]], seed: int) -> None:
    spans = spans_of(lengths, seed)
    plan = plan_step(spans, None, CPU)
    found: dict[int, tuple[int, int]] = {}
    for first_row, num_queries, first_slot, position, *rest in plan.chunks.tolist():
        assert 1 <= num_queries <= CHUNK and rest == [0] * 4
        for i in range(num_queries):
            assert first_row + i not in found
            found[first_row + i] = (first_slot, position + i)
    expected, at = {}, 0
    for span in spans:
        slots = slots_of(span)
        assert plan.slots[at : at + len(slots)].tolist() == slots
        if span.num_queries > 1:
            rows = range(span.query_start, span.query_start + span.num_queries)
            expected |= {row: (at, len(slots) - span.num_queries + i) for i, row in enumerate(rows)}
        at += len(slots)
    assert found == expected and len(plan.slots) == at
    assert (np.diff(plan.chunks[:, 3].numpy()) <= 0).all()  # what takes longest comes first


def test_a_decode_is_cut_by_its_own_positions_alone() -> None:
    alone = plan_step(spans_of([(5000, 1)], 0), None, CPU)
    among = plan_step(spans_of([(5000, 1), (3, 1), (100_000, 1), (70, 40)], 1), None, CPU)
    row = among.decodes[:, 0] == 0
    assert torch.equal(alone.decodes[:, 2:4], among.decodes[row, 2:4])


def test_tables_are_aligned_for_vector_loads() -> None:
    plan: DevicePlan = plan_step(spans_of([(900, 1), (0, 1), (30, 7)], 0), None, CPU)
    for table in (plan.counts, plan.merges, plan.decodes, plan.chunks):
        assert table.data_ptr() % 16 == 0 and table.is_contiguous() and table.dtype == torch.int32
