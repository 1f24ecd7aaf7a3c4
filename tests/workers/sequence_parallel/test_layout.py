"""Who computes and sees what, against counting token by token: every query meets every token it sees exactly once."""

import random
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.attention import PartSpan, slots_of
from placement.model.striping import WHOLE_TOKENS, Stripe
from workers.sequence_parallel.layout import (
    ChunkShare,
    chunk_shares,
    find_needed,
    last_slots,
    local_runs,
    num_held,
    own_spans,
    received_spans,
    sent_slots,
    sizes,
    visiting_spans,
)
from workers.step.scoring import ScoredPrompt
from workers.step.types import Batch, SequenceInput

BLOCK = 8
Pair = tuple[int, int, int]  # sequence, position of the query, position of the token


def make_batch(chunks: Sequence[tuple[int, int]], seed: int) -> Batch:
    """Sequences with these tokens before their chunks, and in them, in scattered blocks; some are scored."""
    rng = random.Random(seed)
    free = rng.sample(range(400), 400)
    sequences = []
    for start, count in chunks:
        blocks = [free.pop() for _ in range(-(-(start + count) // BLOCK))]
        edges = [
            (BLOCK * block, BLOCK * block + min(BLOCK, start + count - BLOCK * at)) for at, block in enumerate(blocks)
        ]
        scored = ScoredPrompt(first_index=start + 1, token_ids=[0] * rng.randint(1, count), num_top=0)
        sequences.append(
            SequenceInput(
                token_ids=[0] * count,
                start=start,
                runs=tuple(edges),
                samples=rng.random() < 0.5,
                scored=scored if rng.random() < 0.3 else None,
            )
        )
    return Batch(sequences=tuple(sequences))


def stripes_of(widths: Sequence[int]) -> tuple[Stripe, ...]:
    edges = np.cumsum([0, *widths]).tolist()
    return tuple(Stripe(start, stop, BLOCK) for start, stop in pairwise(edges))


def place_of(batch: Batch, stripe: Stripe) -> dict[int, tuple[int, int]]:
    """Sequence and position of what lies in each local slot of the rank with that stripe."""
    places = {}
    for index, sequence in enumerate(batch.sequences):
        slots = [slot for run in sequence.runs for slot in range(*run)]
        for position, slot in enumerate(slots):
            if stripe.start <= slot % BLOCK < stripe.stop:
                places[slot // BLOCK * stripe.width + slot % BLOCK - stripe.start] = (index, position)
    return places


def met(spans: Sequence[PartSpan], queries: Sequence[tuple[int, int]], at: dict[int, tuple[int, int]]) -> list[Pair]:
    """The pairs of spans, given the sequence and position of each row, and of each slot."""
    found = []
    for span in spans:
        tokens = [at[slot] for slot in slots_of(span.runs).tolist()]
        for row, (first, stop) in enumerate(span.seen.tolist(), start=span.query_start):
            sequence, position = queries[row]
            for owner, token in tokens[first:stop]:
                assert owner == sequence
                found.append((sequence, position, token))
    return found


def rows_of(shares: Sequence[ChunkShare], *, split: bool | None = None) -> list[tuple[int, int]]:
    return [
        (index, int(position))
        for index, share in enumerate(shares)
        for position in share.positions
        if split is None or share.is_whole is not split
    ]


CHUNKS = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 40)), min_size=1, max_size=5)
WIDTHS = st.sampled_from([(4, 4), (6, 2), (5, 2, 1), (0, 5, 3), (8, 0)])


@settings(deadline=None, max_examples=150)
@given(
    chunks=CHUNKS,
    widths=WIDTHS,
    window=st.one_of(st.none(), st.integers(1, 40)),
    seed=st.integers(0, 1000),
    moves_queries=st.booleans(),
)
def test_every_query_meets_every_token_it_sees_once(
    chunks: list[tuple[int, int]], widths: tuple[int, ...], window: int | None, seed: int, moves_queries: bool
) -> None:
    batch, stripes = make_batch(chunks, seed), stripes_of(widths)
    everyone = [chunk_shares(batch, stripe) for stripe in stripes]
    local = [local_runs(batch, stripe) for stripe in stripes]
    slots = [place_of(batch, stripe) for stripe in stripes]
    pairs: list[Pair] = []
    for rank, stripe in enumerate(stripes):
        own, _ = own_spans(everyone[rank], local[rank], stripe, window)
        pairs += met(own, rows_of(everyone[rank]), slots[rank])
        for other in range(len(stripes)):
            if other == rank:
                continue
            if moves_queries:  # the other's queries come here
                spans = visiting_spans(everyone[other], local[rank], stripe, window)
                pairs += met(spans, rows_of(everyone[other], split=True), slots[rank])
            else:  # the other's KV does
                given_slots = sent_slots(everyone[other], local[other], stripes[other], window)
                came = {at: slots[other][slot] for at, slot in enumerate(given_slots.tolist())}
                held = [num_held(share, stripes[other], window) for share in everyone[other] if not share.is_whole]
                assert len(came) == sum(held)
                spans = received_spans(everyone[rank], stripes[other], window)
                pairs += met(spans, rows_of(everyone[rank], split=True), came)
    expected = Counter(
        (index, position, token)
        for index, sequence in enumerate(batch.sequences)
        for position in range(sequence.start, sequence.start + sequence.num_tokens)
        for token in range(0 if window is None else max(0, position - window + 1), position + 1)
    )
    assert Counter(pairs) == expected


@given(chunks=CHUNKS, widths=WIDTHS, seed=st.integers(0, 1000))
def test_every_token_of_a_chunk_is_computed_once_or_by_all(
    chunks: list[tuple[int, int]], widths: tuple[int, ...], seed: int
) -> None:
    batch = make_batch(chunks, seed)
    everyone = [chunk_shares(batch, stripe) for stripe in stripes_of(widths)]
    for index, sequence in enumerate(batch.sequences):
        computed = Counter(int(p) for its in everyone for p in its[index].positions)
        times = len(everyone) if sequence.num_tokens <= WHOLE_TOKENS else 1
        wanted = range(sequence.start, sequence.start + sequence.num_tokens)
        assert computed == dict.fromkeys(wanted, times)
        for stripe in stripes_of(widths):
            held = stripe.positions(sequence.start, wanted.stop)
            at = [place_of(batch, stripe)[slot] for slot in last_slots(local_runs(batch, stripe)[index], len(held))]
            assert at == [(index, position) for position in held]


@given(chunks=CHUNKS, widths=WIDTHS, seed=st.integers(0, 1000))
def test_every_rank_gets_every_row_that_is_needed(
    chunks: list[tuple[int, int]], widths: tuple[int, ...], seed: int
) -> None:
    batch, stripes = make_batch(chunks, seed), stripes_of(widths)
    wanted = [(i, s.start + s.num_tokens - 1) for i, s in enumerate(batch.sequences) if s.samples]
    for i, s in enumerate(batch.sequences):
        wanted += [(i, s.scored.first_index - 1 + k) for k in range(len(s.scored.token_ids))] if s.scored else []
    needed = [find_needed(batch, stripes, rank) for rank in range(len(stripes))]
    rows = [rows_of(chunk_shares(batch, stripe)) for stripe in stripes]
    for rank, its in enumerate(needed):
        found = {place: rows[rank][row] for row, place in zip(its.own_rows, its.own_places, strict=True)}
        for other, places in its.received_places.items():
            sent_rows = [rows[other][row] for row in needed[other].sent_rows]
            assert len(sent_rows) == len(places)
            found |= dict(zip(places, sent_rows, strict=True))
        assert [found[place] for place in range(its.count)] == wanted


def test_what_is_exchanged_is_counted_for_split_chunks_alone() -> None:
    batch = make_batch([(50, 1), (20, 20), (0, 17), (8, 16)], seed=0)
    found = sizes(batch, stripes_of((6, 2)), (None,), query_bytes=8, kv_bytes=2)
    assert (found.num_queries, found.num_seen, found.shares) == (37, 57, (0.75, 0.25))
    assert found.num_pairs == 20 * 20 + 200 + 144
    windowed = sizes(batch, stripes_of((6, 2)), (4,), query_bytes=8, kv_bytes=2)
    assert windowed.num_seen == 23 + 17
