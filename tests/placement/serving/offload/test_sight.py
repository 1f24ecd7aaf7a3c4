"""Who sees what of sequences that attention workers hold: every query meets every token that it sees exactly once."""

import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.attention import slots_of
from placement.model.part import Span
from placement.planning.residency import Partition, Residency, resident
from placement.serving.offload.residents import Chunk, Window, find_home, session_places
from placement.serving.offload.sight import SessionSight, Sight, look

BLOCK, NUM_KV_HEADS = 4, 4
WINDOWS: tuple[Window, ...] = (None, 3, 6)
Token = tuple[int, int]  # a sequence and a position


@dataclass
class Dense:
    """What is in the slots of the rank and of each session: the names of tokens in place of keys and values."""

    residency: Residency
    kv_heads: Span
    own: dict[int, Token] = field(default_factory=dict)
    theirs: dict[int, dict[int, Token]] = field(default_factory=lambda: defaultdict(dict))

    def __post_init__(self) -> None:
        self.places = session_places(self.residency, self.kv_heads)

    def step(self, chunks: Sequence[Chunk]) -> None:
        """Lays out a step and checks it."""
        tokens = [(it.sequence, position) for it in chunks for position in range(it.start, it.stop)]
        first_staged = self.residency.num_local_blocks * BLOCK
        sight = look(chunks, self.residency, self.places, WINDOWS, block_size=BLOCK, first_staged=first_staged)
        self.own.update(zip(sight.slots.tolist(), tokens, strict=True))
        for index, session in enumerate(sight.sessions):
            for slot, row in zip(session.slots.tolist(), session.kv_rows.tolist(), strict=True):
                assert sight.slots[row] >= first_staged, "what is sent is staged"
                self.theirs[index][slot] = tokens[row]
        self.check_rows(sight, len(tokens))
        for window in range(len(WINDOWS)):
            self.check_seen(sight, window, tokens)

    def check_rows(self, sight: Sight, num_rows: int) -> None:
        """Each row is answered here, finally by one session for each head, or merged."""
        whole = [Counter(own.query_rows[: own.num_whole].tolist()) for own in sight.sessions]
        for head in range(len(self.kv_heads)):
            answered = Counter([*sight.local_rows.tolist(), *sight.part_rows.tolist()])
            for place, rows in zip(self.places, whole, strict=True):
                answered += rows if place.kv_heads.start <= head < place.kv_heads.stop else Counter()
            assert answered == Counter(range(num_rows))
        for own in sight.sessions:
            assert set(own.query_rows[own.num_whole :].tolist()) <= set(sight.part_rows.tolist())

    def check_seen(self, sight: Sight, window: int, tokens: Sequence[Token]) -> None:
        local: list[Counter[Token]] = [Counter() for _ in tokens]
        for span in sight.local:
            here = [self.own[slot] for slot in slots_of(span.runs).tolist()]
            for row, (first, end) in enumerate(span.seen[window].tolist(), span.first_row):
                local[row].update(here[first:end])
        for head in range(len(self.kv_heads)):
            seen = [Counter(of_row) for of_row in local]
            for index, (place, own) in enumerate(zip(self.places, sight.sessions, strict=True)):
                if place.kv_heads.start <= head < place.kv_heads.stop:
                    self.add_seen(seen, index, own, window, tokens)
            for (sequence, position), found in zip(tokens, seen, strict=True):
                first = max(0, position + 1 - (WINDOWS[window] or position + 1))
                assert found == Counter((sequence, other) for other in range(first, position + 1))

    def add_seen(
        self, seen: list[Counter[Token]], index: int, own: SessionSight, window: int, tokens: Sequence[Token]
    ) -> None:
        width, rows = self.places[index].holder.slots_per_block(BLOCK), iter(own.query_rows.tolist())
        for span in own.spans:
            slots = [block * width + offset for block in own.tables[span.sequence] for offset in range(width)]
            end = max(end for ranges in span.seen for _, end in ranges)
            there = [self.theirs[index][slot] for slot in slots[:end]]
            is_new = [token in tokens for token in there]
            assert is_new == [False] * (end - span.num_new) + [True] * span.num_new
            for first, last in span.seen[window]:
                seen[next(rows)].update(there[first:last])
        assert next(rows, None) is None


def residencies() -> st.SearchStrategy[Residency]:
    """One to three attention workers of unequal weights, with all of 120 blocks or with some of them."""
    return st.builds(
        lambda partition, weights, local: resident(
            partition,
            weights,
            num_kv_heads=NUM_KV_HEADS,
            block_size=BLOCK,
            num_local_blocks=local,
            num_remote_blocks=[120 - local] * len(weights),
        ),
        st.sampled_from(Partition),
        st.lists(st.integers(1, 3), min_size=1, max_size=3),
        st.sampled_from([0, 9, 60]),
    )


@settings(deadline=None)
@given(
    residencies(), st.sampled_from([Span(0, 4), Span(0, 1), Span(1, 3)]), st.booleans(), st.integers(0, 1 << 16),
    st.lists(st.lists(st.sampled_from([0, 1, 1, 2, 9]), min_size=3, max_size=3), min_size=1, max_size=5),
)  # fmt: skip
def test_every_query_sees_every_token_once(
    residency: Residency, kv_heads: Span, keeps_home: bool, seed: int, steps: list[list[int]]
) -> None:
    draw = random.Random(seed)
    dense = Dense(residency, kv_heads)
    pools = _pools(residency, draw)
    blocks: dict[int, list[int]] = {sequence: [] for sequence in range(3)}
    homes = {sequence: draw.choice(pools) for sequence in blocks}
    lengths = dict.fromkeys(blocks, 0)
    for counts in steps:
        chunks, row = [], 0
        for sequence, count in enumerate(counts):
            if not count:
                continue
            start, lengths[sequence] = lengths[sequence], lengths[sequence] + count
            while len(blocks[sequence]) * BLOCK < lengths[sequence]:
                home = homes[sequence] if keeps_home else draw.choice(pools)
                blocks[sequence].append((home or next(filter(None, reversed(pools)))).pop())
            table = np.array(blocks[sequence], np.int64)
            chunk = Chunk(sequence=sequence, first_row=row, start=start, num_tokens=count, blocks=table)
            chunks.append(replace(chunk, home=find_home(table, residency, BLOCK)))
            row += count
        if chunks:
            dense.step(chunks)


def _pools(residency: Residency, draw: random.Random) -> list[list[int]]:
    """The free blocks of each region, in any order."""
    pools = [list(range(it.blocks.start, it.blocks.stop)) for it in residency.regions]
    for pool in pools:
        draw.shuffle(pool)
    return pools


def test_a_prompt_is_attended_to_where_it_is_computed_and_only_handed_over() -> None:
    residency = resident(
        Partition.TOKEN_RANGES, [1, 1], num_kv_heads=2, block_size=BLOCK, num_local_blocks=0, num_remote_blocks=[8, 8]
    )
    chunk = Chunk(sequence=7, first_row=0, start=0, num_tokens=6, blocks=np.array([5, 2]))
    places = session_places(residency, Span(0, 2))
    sight = look([chunk], residency, places, (None,), block_size=BLOCK, first_staged=0)
    assert not sight.is_awaited and sight.local_rows.tolist() == list(range(6))
    assert [own.kv_rows.tolist() for own in sight.sessions] == [[0, 1, 4, 5], [2, 3]]
    assert [own.slots.tolist() for own in sight.sessions] == [[10, 11, 4, 5], [10, 11]]


def test_sessions_are_those_of_holders_that_share_heads_with_the_rank() -> None:
    residency = resident(
        Partition.KV_HEADS, [1, 1, 2], num_kv_heads=8, block_size=BLOCK, num_local_blocks=1, num_remote_blocks=[8] * 3
    )
    found = session_places(residency, Span(3, 6))
    assert [(it.holder.worker, it.kv_heads) for it in found] == [(1, Span(0, 1)), (2, Span(1, 3))]
    assert [it.region for it in found] == [1, 1]
