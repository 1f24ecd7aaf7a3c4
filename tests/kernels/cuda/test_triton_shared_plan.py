"""What a GPU attends to once for several decodes: when it pays, and that every token is attended to once for each."""

import random
from collections import defaultdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.attention import SequenceSpan, SharedSpan
from kernels.cuda import shared as rule
from kernels.cuda.plan import (
    MEMBERS,
    PART,
    DevicePlan,
    SharedParts,
    fits,
    narrowed,
    plan_step,
    put,
    room_for_decodes,
)
from kernels.cuda.shared import PASS_BYTES, TOKEN_BYTES, choose, worthwhile
from tests.kernels.cpu.test_shared_prefix import Forest, Node, prefix, spans_of, trees
from tests.kernels.cuda.test_triton_plan import slots_of

CPU = torch.device("cpu")
PASS_TOKENS = PASS_BYTES // TOKEN_BYTES


def parts(num_members: int, num_parts: int) -> SharedParts:
    return SharedParts(members=tuple(range(num_members)), first=0, stop=num_parts)


def common(members: tuple[int, ...], first_token: int, num_tokens: int) -> SharedSpan:
    runs = ((first_token, first_token + num_tokens),)
    return SharedSpan(members=members, first_token=first_token, num_tokens=num_tokens, runs=runs)


def test_sharing_pays_where_it_saves_more_reading_than_a_pass_takes() -> None:
    assert not worthwhile([])
    assert not worthwhile([parts(2, 1)])
    assert not worthwhile([parts(2, PASS_TOKENS // PART)])
    assert worthwhile([parts(2, PASS_TOKENS // PART + 1)])
    assert worthwhile([parts(64, 4096 // PART)])


@given(st.lists(st.tuples(st.integers(2, 300), st.integers(1, 80)), min_size=1, max_size=5))
def test_one_pass_is_paid_by_all_groups_together(groups: list[tuple[int, int]]) -> None:
    shared = [parts(*group) for group in groups]
    saved = sum((members - 1) * num_parts * PART * TOKEN_BYTES for members, num_parts in groups)
    assert worthwhile(shared) == (saved > PASS_BYTES)
    if any(worthwhile([one]) for one in shared):
        assert worthwhile(shared)


def test_whole_parts_are_shared_by_decodes_that_see_them() -> None:
    spans = spans_of((9000, 1), (9000, 1), (9000, 9), (8990, 1))
    offered = [common((0, 1, 2, 3), 0, 4000), common((0, 1, 2, 3), 4000, 3000), common((0, 1), 7000, 200)]
    first, second = choose(spans, offered)
    assert first == SharedParts(members=(0, 1, 3), first=0, stop=4000 // PART)
    assert second == SharedParts(members=(0, 1, 3), first=4000 // PART + 1, stop=7000 // PART)
    (in_window,) = choose(spans, offered, window=4000)
    assert in_window == SharedParts(members=(0, 1, 3), first=5000 // PART + 1, stop=7000 // PART)
    assert not choose(spans, offered, window=2500)  # two parts are left
    assert not choose(spans, [common((0, 2), 0, 8000)])  # one decode has none to share with


def test_more_shared_than_a_member_has_is_caught() -> None:
    with pytest.raises(AssertionError):
        choose(spans_of((100, 1), (50, 1)), [common((0, 1), 0, 60)])


def seen_and_merged(plan: DevicePlan) -> tuple[dict[int, list[int]], dict[int, list[int]]]:
    """Slots that each row attends to, and partial results that its parts leave, both in the order of positions."""
    found: dict[int, list[tuple[int, list[int], int]]] = defaultdict(list)
    num_decodes, num_merges, num_shared, _ = plan.counts.tolist()
    for row, first_slot, begin, end, partial, *_ in plan.decodes[:num_decodes].tolist():
        found[row].append((begin, plan.slots[first_slot + begin : first_slot + end].tolist(), partial))
    for first, count, first_slot, begin, end, number, *rest in plan.shared[:num_shared].tolist():
        assert 1 <= count <= MEMBERS and begin == number * PART and end == begin + PART and rest == [0, 0]
        for row, partial in plan.members[first : first + count].tolist():
            found[row].append((begin, plan.slots[first_slot + begin : first_slot + end].tolist(), partial + number))
    merges = {row: list(range(first, first + n)) for row, first, n, _ in plan.merges[:num_merges].tolist()}
    ordered = {row: sorted(pieces) for row, pieces in found.items()}
    partials = {row: [partial for *_, partial in pieces] for row, pieces in ordered.items()}
    assert {row: some for row, some in partials.items() if some != [-1]} == merges
    return {row: [slot for _, slots, _ in pieces for slot in slots] for row, pieces in ordered.items()}, merges


FORESTS = st.lists(trees(90) | trees(3 * PART), min_size=1, max_size=4)


@settings(deadline=None, max_examples=60)
@given(roots=FORESTS, window=st.none() | st.integers(1, 4 * PART), keep=st.randoms(use_true_random=False))
def test_every_token_that_a_decode_sees_is_in_one_part_shared_or_its_own(
    roots: list[Node], window: int | None, keep: random.Random
) -> None:
    """Whichever shared spans are used, nested or not; partial results and their order are as without."""
    forest = Forest(roots, num_kv_heads=1, group=1, head_dim=16, seed=1)
    offered = keep.sample(forest.shared, keep.randint(0, len(forest.shared)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rule, "PASS_BYTES", 0)
        chosen = choose(forest.spans, offered, window=window)
    plan = plan_step(forest.spans, window, CPU, chosen)
    seen, merges = seen_and_merged(plan)
    assert seen == {span.query_start: slots_of(span)[-(window or 1 << 30) :] for span in forest.spans}
    alone = plan_step(forest.spans, window, CPU)
    _, merges_alone = seen_and_merged(alone)
    assert {row: len(some) for row, some in merges.items() if len(some) > 1} == {
        row: len(some) for row, some in merges_alone.items()
    }
    assert sorted(partial for some in merges.values() for partial in some) == list(range(plan.num_partials))


def test_shared_tokens_are_planned_once() -> None:
    forest = Forest([prefix(150, 4096, own=10)], num_kv_heads=1, group=1, head_dim=16, seed=0)
    plan = plan_step(forest.spans, None, CPU, choose(forest.spans, forest.shared))
    assert len(plan.shared) == 4096 // PART * 3 and len(plan.members) == 150  # blocks of members
    assert (plan.decodes[:, 3] - plan.decodes[:, 2]).sum() == 150 * 10


def test_a_chunk_beside_its_group_is_no_member() -> None:
    spans = [*spans_of((900, 1)), SequenceSpan(query_start=1, num_queries=3, runs=((0, 900),))]
    spans.append(SequenceSpan(query_start=4, num_queries=1, runs=((0, 700), (1000, 1100))))
    plan = plan_step(spans, None, CPU, [SharedParts(members=(0, 2), first=0, stop=2)])
    seen, _ = seen_and_merged(plan)
    assert seen == {0: list(range(900)), 4: [*range(700), *range(1000, 1100)]}
    assert len(plan.shared) == 2 and plan.members[:, 0].tolist() == [0, 4]


@pytest.mark.parametrize("members", [(0,), ()])
def test_fewer_than_two_do_not_share(members: tuple[int, ...]) -> None:
    with pytest.raises(AssertionError):
        SharedParts(members=members, first=0, stop=1)


def test_room_for_decodes_has_room_for_what_they_share() -> None:
    forest = Forest([prefix(6, 4 * PART), prefix(3, PART + 9)], num_kv_heads=1, group=1, head_dim=16, seed=2)
    room = room_for_decodes(10, 20_000, None, CPU)
    for shared in ([parts(6, 4)], [], [parts(2, 1), SharedParts(members=(6, 7, 8), first=0, stop=1)]):
        plan = plan_step(forest.spans, None, CPU, shared)
        assert fits(plan, room)
        put(plan, room)
        assert seen_and_merged(narrowed(room, 9)) == seen_and_merged(plan)
    assert len(narrowed(room, 1).shared) == 0 and len(narrowed(room, 2).shared)


def test_more_groups_than_there_is_room_for_do_not_fit() -> None:
    spans = spans_of(*[(20 * PART, 1)] * 2)
    nested = [SharedParts(members=(0, 1), first=first, stop=first + 1) for first in range(9)]
    room = room_for_decodes(2, 40 * PART, None, CPU)
    assert fits(plan_step(spans, None, CPU, nested[:4]), room)
    assert not fits(plan_step(spans, None, CPU, nested), room)
