"""Sequences move between replicas of all shapes, against a dense copy of their keys and values."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from placement.errors import InvalidRequest
from placement.model.part import Part, Span
from placement.model.specs import DType
from placement.model.striping import Stripe
from placement.serving.kv.message_layout import PackedTensor, message_layout, rectangle_bytes
from placement.serving.kv.rectangles import Rectangle, held_rectangles, token_spans, transfer_plan
from placement.serving.kv.runs import slot_runs

DIM = 3
NOTHING = Span(0, 0)
Slots = NDArray[np.int64]


def part(layers: tuple[int, int], heads: tuple[int, int], stripe: Stripe | None = None) -> Part:
    return Part(layers=Span(*layers), kv_heads=Span(*heads), ffn_columns=NOTHING, vocab_rows=NOTHING, stripe=stripe)


@dataclass(frozen=True)
class Replica:
    """A replica's shape, and where it keeps one sequence."""

    parts: tuple[Part, ...]
    block_size: int
    table: tuple[int, ...]
    num_blocks: int

    def positions(self, rank: int) -> Slots:
        """The position that each slot of the rank's cache holds, -1 for none; by the definition, slot by slot."""
        stripe = self.parts[rank].stripe
        held = [
            block * self.block_size + slot
            for block in range(self.num_blocks)
            for slot in range(self.block_size)
            if stripe is None or stripe.start <= slot < stripe.stop
        ]
        places = {block: index for index, block in enumerate(self.table)}
        return np.array(
            [
                places[slot // self.block_size] * self.block_size + slot % self.block_size
                if slot // self.block_size in places
                else -1
                for slot in held
            ],
            dtype=np.int64,
        )

    def cache(self, rank: int) -> NDArray[np.float32]:
        """An empty cache [layers, key and value, KV heads, slots, D] of a rank; -1 is nothing."""
        it = self.parts[rank]
        return np.full((len(it.layers), 2, len(it.kv_heads), len(self.positions(rank)), DIM), -1, np.float32)

    def slots(self, rank: int, tensor: PackedTensor) -> Slots:
        """The slots of a packed tensor's tokens in the rank's cache."""
        runs = slot_runs(self.table, self.block_size, tensor.tokens, self.parts[rank].stripe)
        return np.concatenate([np.arange(start, stop) for start, stop in runs])


def where(part: Part, tensor: PackedTensor) -> tuple[int, int, slice]:
    heads = slice(tensor.kv_heads.start - part.kv_heads.start, tensor.kv_heads.stop - part.kv_heads.start)
    return tensor.layer - part.layers.start, int(tensor.is_value), heads


def cuts(size: int, most: int) -> st.SearchStrategy[list[tuple[int, int]]]:
    """Neighbouring spans that make up [0, size), some of them empty."""
    edges = st.lists(st.integers(0, size), max_size=most - 1).map(sorted)
    return edges.map(lambda inner: list(zip([0, *inner], [*inner, size], strict=True)))


@st.composite
def replicas(draw: st.DrawFn, num_layers: int, num_heads: int, num_tokens: int) -> Replica:
    block_size = draw(st.integers(1, 6))
    stages = [cut for cut in draw(cuts(num_layers, 3)) if cut[0] < cut[1]]
    parts: list[Part] = []
    if len(stages) == 1 and draw(st.booleans()):
        for start, stop in draw(cuts(block_size, 4)):
            parts.append(part(stages[0], (0, num_heads), Stripe(start, stop, block_size)))
    else:
        for stage in stages:
            copies = draw(st.integers(1, 2)) if draw(st.booleans()) else 1
            for _ in range(copies):  # another cut of the same heads: some have several holders
                parts += [part(stage, heads) for heads in draw(cuts(num_heads, 4))]
    needed = -(-num_tokens // block_size)
    num_blocks = needed + draw(st.integers(0, 3))
    table = tuple(draw(st.permutations(range(num_blocks)))[:needed])
    return Replica(parts=tuple(parts), block_size=block_size, table=table, num_blocks=num_blocks)


@st.composite
def moves(draw: st.DrawFn) -> tuple[Replica, Replica, NDArray[np.float32], int]:
    num_layers, num_heads = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    num_tokens = draw(st.integers(0, 30))
    source, target = (draw(replicas(num_layers, num_heads, num_tokens)) for _ in range(2))
    shape = (num_layers, 2, num_heads, num_tokens, DIM)
    dense = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    return source, target, dense, draw(st.integers(0, num_tokens))


@given(moves())
@settings(deadline=None, max_examples=300)
def test_every_number_that_the_target_lacks_arrives_once_and_nothing_else_is_written(
    move: tuple[Replica, Replica, NDArray[np.float32], int],
) -> None:
    source, target, dense, first_token = move
    num_tokens = dense.shape[3]
    transfers = transfer_plan(source.parts, target.parts, num_tokens, first_token)
    caches = [target.cache(rank) for rank in range(len(target.parts))]
    writes = [np.zeros(cache.shape, np.int64) for cache in caches]
    for sender, sent in enumerate(source.parts):
        own = filled(source, sender, dense)
        for receiver, received in enumerate(target.parts):
            message = message_layout(transfers, source=sender, target=receiver, head_dim=DIM, dtype=DType.FLOAT32)
            wire = np.full(message.num_bytes // 4, -2, np.float32)
            for tensor in message.tensors:
                view = packed_view(wire, tensor)
                assert (view == -2).all(), "tensors overlap"
                view[:] = own[where(sent, tensor)][:, source.slots(sender, tensor)]
            assert (wire >= 0).all(), "a byte is sent that nobody wrote, or that holds nothing"
            for tensor in message.tensors:
                slots = target.slots(receiver, tensor)
                caches[receiver][where(received, tensor)][:, slots] = packed_view(wire, tensor)
                writes[receiver][where(received, tensor)][:, slots] += 1
    for rank, cache in enumerate(caches):
        expected = filled(target, rank, dense, first_token)
        np.testing.assert_array_equal(cache, expected)
        np.testing.assert_array_equal(writes[rank], expected != -1)


def filled(replica: Replica, rank: int, dense: NDArray[np.float32], first_token: int = 0) -> NDArray[np.float32]:
    """A rank's cache with the tokens of ``dense`` from ``first_token`` on."""
    cache, it = replica.cache(rank), replica.parts[rank]
    for slot, position in enumerate(replica.positions(rank)):
        if first_token <= position < dense.shape[3]:
            cache[:, :, :, slot] = dense[
                it.layers.start : it.layers.stop, :, it.kv_heads.start : it.kv_heads.stop, position
            ]
    return cache


def packed_view(wire: NDArray[np.float32], tensor: PackedTensor) -> NDArray[np.float32]:
    assert tensor.offset % 4 == tensor.num_bytes % 4 == 0
    stop = (tensor.offset + tensor.num_bytes) // 4
    return wire[tensor.offset // 4 : stop].reshape(len(tensor.kv_heads), tensor.num_tokens, DIM)


@given(moves())
@settings(deadline=None)
def test_a_rank_sends_only_what_it_holds_and_a_rank_gets_only_what_it_holds(
    move: tuple[Replica, Replica, NDArray[np.float32], int],
) -> None:
    source, target, dense, first_token = move
    wanted = Span(first_token, dense.shape[3])
    for transfer in transfer_plan(source.parts, target.parts, dense.shape[3], first_token):
        assert transfer.rectangle.size
        for holder in (source.parts[transfer.source], target.parts[transfer.target]):
            common = [it.intersection(transfer.rectangle) for it in held_rectangles(holder, wanted)]
            assert transfer.rectangle in common


def test_unequal_shares_of_heads_and_ranks_without_heads() -> None:
    # 3:1 of four heads, and a rank that has none, to halves.
    source = [part((0, 2), (0, 3)), part((0, 2), (3, 4)), part((0, 2), (4, 4))]
    target = [part((0, 2), (0, 2)), part((0, 2), (2, 4))]
    transfers = transfer_plan(source, target, 10, 4)
    sent = [(transfer.source, transfer.target, transfer.rectangle.kv_heads) for transfer in transfers]
    assert sent == [(0, 0, Span(0, 2)), (0, 1, Span(2, 3)), (1, 1, Span(3, 4))]
    assert {transfer.rectangle.tokens for transfer in transfers} == {Span(4, 10)}
    assert {transfer.rectangle.layers for transfer in transfers} == {Span(0, 2)}


def test_ranks_that_hold_the_same_heads_send_equal_portions() -> None:
    # One head, of which three ranks hold a copy, to one rank and to two.
    source = [part((0, 1), (0, 1))] * 3
    for num_targets in (1, 2):
        transfers = transfer_plan(source, [part((0, 1), (0, 1))] * num_targets, 30)
        tokens = np.zeros(3, np.int64)
        for transfer in transfers:
            tokens[transfer.source] += len(transfer.rectangle.tokens)
        assert tokens.tolist() == [10 * num_targets] * 3
    # A single token comes from one of them, and another target gets it from another.
    transfers = transfer_plan(source, [part((0, 1), (0, 1))] * 3, 1)
    assert sorted(transfer.source for transfer in transfers) == [0, 1, 2]


def test_layers_come_from_the_stages_that_have_them() -> None:
    source = [part((0, 3), (0, 2)), part((3, 4), (0, 2))]
    target = [part((0, 2), (0, 2)), part((2, 4), (0, 2))]
    sent = [
        (transfer.source, transfer.target, transfer.rectangle.layers) for transfer in transfer_plan(source, target, 5)
    ]
    assert sent == [(0, 0, Span(0, 2)), (0, 1, Span(2, 3)), (1, 1, Span(3, 4))]


def test_stripes_of_unequal_blocks_meet_token_by_token() -> None:
    source = [part((0, 1), (0, 1), Stripe(0, 3, 4)), part((0, 1), (0, 1), Stripe(3, 4, 4))]
    target = [part((0, 1), (0, 1), Stripe(0, 0, 6)), part((0, 1), (0, 1), Stripe(0, 6, 6))]
    sent = [
        (transfer.source, transfer.target, transfer.rectangle.tokens)
        for transfer in transfer_plan(source, target, 10, 1)
    ]
    assert sent == [
        (0, 1, Span(1, 3)),
        (1, 1, Span(3, 4)),
        (0, 1, Span(4, 7)),
        (1, 1, Span(7, 8)),
        (0, 1, Span(8, 10)),
    ]


def test_nothing_is_sent_where_the_target_has_all() -> None:
    assert transfer_plan([part((0, 2), (0, 2))], [part((0, 2), (0, 2))], 7, 7) == []
    empty = message_layout([], source=0, target=0, head_dim=DIM, dtype=DType.BFLOAT16)
    assert empty.num_bytes == 0 and not empty.tensors and not empty.layers


@pytest.mark.parametrize(
    "source",
    [
        [part((0, 2), (0, 1))],
        [part((0, 1), (0, 2))],
        [part((0, 2), (0, 2), Stripe(0, 3, 4))],
        [],
    ],
)
def test_what_nobody_holds_is_named(source: list[Part]) -> None:
    with pytest.raises(InvalidRequest, match="rank 0 of the target needs") as caught:
        transfer_plan(source, [part((0, 2), (0, 2))], 9)
    assert caught.value.field == "source_parts" and "layers" in str(caught.value.value)


def test_tokens_of_a_stripe() -> None:
    assert token_spans(None, Span(3, 9)) == (Span(3, 9),)
    assert token_spans(Stripe(0, 4, 4), Span(3, 9)) == (Span(3, 9),)
    assert token_spans(Stripe(1, 3, 4), Span(2, 10)) == (Span(2, 3), Span(5, 7), Span(9, 10))
    assert token_spans(Stripe(2, 2, 4), Span(0, 9)) == token_spans(None, Span(4, 4)) == ()


def test_intersection_of_rectangles() -> None:
    one = Rectangle(layers=Span(0, 4), kv_heads=Span(1, 3), tokens=Span(5, 9))
    other = Rectangle(layers=Span(2, 6), kv_heads=Span(0, 2), tokens=Span(0, 7))
    both = one.intersection(other)
    assert both == other.intersection(one)
    assert both == Rectangle(layers=Span(2, 4), kv_heads=Span(1, 2), tokens=Span(5, 7)) and both.size == 4
    assert one.intersection(replace(other, tokens=Span(9, 12))).size == 0
    assert rectangle_bytes(both, head_dim=64, dtype=DType.BFLOAT16) == 2 * 4 * 64 * 2


def test_a_message_is_by_layer_then_keys_and_values_by_head_and_token() -> None:
    source = [part((0, 2), (0, 2), Stripe(0, 1, 2)), part((0, 2), (0, 2), Stripe(1, 2, 2))]
    transfers = transfer_plan(source, [part((0, 2), (0, 2))], 5)
    message = message_layout(transfers, source=0, target=0, head_dim=DIM, dtype=DType.BFLOAT16)
    num_bytes = 2 * 3 * DIM * 2  # heads, tokens, dims, bytes
    assert [(tensor.layer, tensor.is_value, tensor.offset) for tensor in message.tensors] == [
        (0, False, 0),
        (0, True, num_bytes),
        (1, False, 2 * num_bytes),
        (1, True, 3 * num_bytes),
    ]
    assert all(tensor.tokens == (Span(0, 1), Span(2, 3), Span(4, 5)) for tensor in message.tensors)
    assert message.layers == {0: Span(0, 2 * num_bytes), 1: Span(2 * num_bytes, 4 * num_bytes)}
    sent = [transfer.rectangle for transfer in transfers if transfer.source == 0]
    assert message.num_bytes == sum(rectangle_bytes(it, head_dim=DIM, dtype=DType.BFLOAT16) for it in sent)


def test_slot_runs_join_what_lies_side_by_side() -> None:
    assert slot_runs([3, 4, 1], 4, [Span(2, 11)]) == ((14, 20), (4, 7))
    assert slot_runs([3, 4, 1], 4, [Span(1, 3), Span(3, 5)]) == ((13, 17),)
    # A rank with slots 1 and 2 of every four keeps them without gaps: block b at 2 b.
    assert slot_runs([3, 4, 1], 4, [Span(0, 12)], Stripe(1, 3, 4)) == ((6, 10), (2, 4))
    assert slot_runs([3, 4, 1], 4, [Span(3, 5)], Stripe(1, 3, 4)) == ()
    assert slot_runs([], 4, [NOTHING]) == ()
    with pytest.raises(AssertionError):
        slot_runs([3], 4, [Span(0, 5)])
