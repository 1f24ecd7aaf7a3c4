"""Portions, groups of 8-bit integers, and where tokens lie: each against its definition."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from placement.errors import InvalidRequest
from placement.model.part import Part, Span
from placement.model.specs import DType
from placement.model.striping import Stripe
from placement.serving.kv.int8_layout import SCALE_BYTES, group_lengths, int8_layout
from placement.serving.kv.message_layout import message_layout
from placement.serving.kv.peers import KvFormat, ReplicaRanks
from placement.serving.kv.portions import PORTION_TOKENS, PortionLayouts, bytes_per_token, portions
from placement.serving.kv.rectangles import common_layers, held_rectangles, transfer_plan
from placement.serving.kv.runs import block_runs, slot_runs, token_runs
from tests.support.planning import MODEL

EMPTY = Span(0, 0)


def part(layers: tuple[int, int], heads: tuple[int, int], stripe: Stripe | None = None) -> Part:
    return Part(layers=Span(*layers), kv_heads=Span(*heads), ffn_columns=EMPTY, vocab_rows=EMPTY, stripe=stripe)


@st.composite
def spans(draw: st.DrawFn, most: int = 40) -> tuple[Span, ...]:
    """Runs of positions, in ascending order and apart."""
    edges = sorted(draw(st.sets(st.integers(0, most), max_size=8)))
    return tuple(Span(start, stop) for start, stop in zip(edges[::2], edges[1::2], strict=False))


@st.composite
def stripes(draw: st.DrawFn, block_size: int) -> Stripe | None:
    start, stop = sorted((draw(st.integers(0, block_size)), draw(st.integers(0, block_size))))
    return draw(st.sampled_from([None, Stripe(start, stop, block_size)]))


@given(st.data(), st.integers(1, 6), spans())
def test_slots_found_by_runs_are_those_found_by_blocks(
    data: st.DataObject, size: int, tokens: tuple[Span, ...]
) -> None:
    needed = -(-(tokens[-1].stop if tokens else 0) // size)
    table = data.draw(st.permutations(range(needed + 2)))[:needed]
    stripe = data.draw(stripes(size))
    runs = block_runs(table, size, tokens[-1].stop if tokens else 0)
    assert token_runs(runs, tokens, stripe) == slot_runs(table, size, tokens, stripe)


@given(spans(), st.integers(1, 7))
def test_a_group_has_the_tokens_that_lie_in_one_block(tokens: tuple[Span, ...], block_size: int) -> None:
    positions = [position for span in tokens for position in range(span.start, span.stop)]
    blocks = [position // block_size for position in positions]
    assert list(group_lengths(tokens, block_size)) == [blocks.count(block) for block in sorted(set(blocks))]


def test_integers_are_laid_out_behind_their_scales() -> None:
    source, target = part((0, 2), (0, 2), Stripe(0, 3, 4)), part((0, 2), (0, 1))
    other = part((0, 2), (0, 2), Stripe(3, 4, 4))
    plan = transfer_plan([source, other], [target], 10, 1)
    native = message_layout(plan, source=0, target=0, head_dim=8, dtype=DType.FLOAT32)
    layout = int8_layout(native, head_dim=8, block_size=4)
    tokens = 2 + 3 + 2  # of the positions 1 to 9 in three blocks
    assert [tensor.num_bytes for tensor in layout.tensors] == [3 * SCALE_BYTES + tokens * 8] * 4
    assert [tensor.offset for tensor in layout.tensors] == [0, 68, 136, 204]
    assert layout.layers == {0: Span(0, 136), 1: Span(136, 272)}


@pytest.mark.parametrize("dtype", DType)
def test_the_bytes_of_a_token_are_those_that_a_transfer_of_whole_blocks_has(dtype: DType) -> None:
    whole, sizes = Part.whole(MODEL), {}
    for kind in KvFormat:
        its = ReplicaRanks(epoch=1, incarnation=bytes(16), parts=(whole,), addresses=(), dtype=dtype, block_size=16)
        layouts = PortionLayouts(source=its, target=its, head_dim=MODEL.head_dim, format=kind)
        sizes[kind] = bytes_per_token(MODEL, dtype=dtype, format=kind, block_size=16)
        assert layouts.of(Span(0, 64), source=0, target=0).num_bytes == 64 * sizes[kind]
    assert sizes[KvFormat.INT8] == pytest.approx(sizes[KvFormat.NATIVE] / dtype.itemsize, rel=0.01)


@given(st.integers(0, 3 * PORTION_TOKENS), st.integers(0, 3 * PORTION_TOKENS))
def test_portions_follow_each_other_and_are_cut_at_places_that_all_know(start: int, count: int) -> None:
    cut = list(portions(Span(start, start + count)))
    assert [span.start for span in cut] == [start, *(span.stop for span in cut[:-1])][: len(cut)]
    assert sum(map(len, cut)) == count and all(0 < len(span) <= PORTION_TOKENS for span in cut)
    assert all(span.stop % PORTION_TOKENS == 0 for span in cut[:-1])


@st.composite
def parts(draw: st.DrawFn) -> Part:
    layers, heads = (sorted((draw(st.integers(0, 3)), draw(st.integers(0, 3)))) for _ in range(2))
    stripe = draw(st.integers(1, 5).flatmap(stripes))
    return part((layers[0], layers[1]), (heads[0], heads[1]), stripe)


@given(parts(), parts(), st.integers(0, 50), st.integers(0, 50))
def test_ranks_have_a_layer_in_common_where_some_token_of_it_is(
    source: Part, target: Part, start: int, count: int
) -> None:
    tokens = Span(start, start + count)
    held, needed = held_rectangles(source, tokens), held_rectangles(target, tokens)
    both = [one.intersection(other) for one in held for other in needed]
    layers = {layer for it in both if it.size for layer in range(it.layers.start, it.layers.stop)}
    common = common_layers(source, target, tokens)
    assert set(range(common.start, common.stop)) == layers


def ranks(*its: Part) -> ReplicaRanks:
    return ReplicaRanks(epoch=1, incarnation=bytes(16), parts=its, addresses=(), dtype=DType.FLOAT32, block_size=4)


def test_what_no_source_rank_holds_is_found_in_the_first_tokens() -> None:
    halves = [part((0, 1), (0, 1), Stripe(start, start + 2, 4)) for start in (0, 2)]
    whole = ranks(part((0, 1), (0, 1)))
    for source, tokens, is_held in (
        (halves, Span(5, 10**9), True),
        (halves[:1], Span(4, 6), True),
        (halves[:1], Span(5, 10**9), False),
        ([], Span(0, 1), False),
    ):
        layouts = PortionLayouts(source=ranks(*source), target=whole, head_dim=2, format=KvFormat.NATIVE)
        if is_held:
            layouts.check(tokens)
        else:
            with pytest.raises(InvalidRequest, match="rank 0 of the target"):
                layouts.check(tokens)
