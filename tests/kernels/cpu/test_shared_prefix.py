"""Attention over tokens that sequences share, once for all of them, is attention."""

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import reference
from kernels.attention import AttentionPlan, LayerCache, Run, SequenceSpan, SharedSpan, num_slots
from kernels.cpu import variant as cpu
from kernels.cpu.attention import paged
from kernels.cpu.attention.shared import choose, worthwhile
from kernels.cpu.attention.tasks import MAX_QUERIES, PART, plan_tasks

TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 1e-2}
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])


@pytest.fixture(autouse=True)
def _keep_the_number_of_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """Tokens that all sequences below have in common; a leaf's are a sequence's own."""

    num_tokens: int
    children: tuple["Node", ...] = ()


def trees(max_tokens: int) -> st.SearchStrategy[Node]:
    leaves = st.builds(Node, num_tokens=st.integers(1, max_tokens))
    inner = st.integers(1, max_tokens)
    return st.recursive(
        leaves,
        lambda below: st.builds(Node, num_tokens=inner, children=st.lists(below, min_size=1, max_size=5).map(tuple)),
        max_leaves=12,
    )


class Forest:
    """Sequences that share as their trees say, their tokens scattered over a cache; each a decode."""

    def __init__(self, roots: Sequence[Node], *, num_kv_heads: int, group: int, head_dim: int, seed: int) -> None:
        self.rng, self.free = random.Random(seed), 0
        self.spans: list[SequenceSpan] = []
        self.shared: list[SharedSpan] = []
        for root in roots:
            self._grow(root, ())
        generator = torch.Generator().manual_seed(seed)
        self.query = torch.randn(len(self.spans), num_kv_heads * group, head_dim, generator=generator)
        shape = 2, num_kv_heads, self.free, head_dim
        self.keys, self.values = torch.randn(shape, generator=generator)
        self.scale = head_dim**-0.5

    def _grow(self, node: Node, above: tuple[Run, ...]) -> None:
        runs: list[Run] = []
        while (missing := node.num_tokens - num_slots(tuple(runs))) > 0:
            self.free += self.rng.randint(0, 3)
            taken = self.rng.randint(1, missing)
            runs.append((self.free, self.free + taken))
            self.free += taken
        self.rng.shuffle(runs)
        if not node.children:
            row = len(self.spans)
            self.spans.append(SequenceSpan(query_start=row, num_queries=1, runs=(*above, *runs)))
            return
        first = len(self.spans)
        for child in node.children:
            self._grow(child, (*above, *runs))
        members = tuple(range(first, len(self.spans)))
        common = {"first_token": num_slots(above), "num_tokens": node.num_tokens, "runs": tuple(runs)}
        self.shared.append(SharedSpan(members=members, **common))  # type: ignore[arg-type]

    def attend(self, shared: Sequence[SharedSpan], dtype: torch.dtype) -> Tensor:
        query, cache = self.query.to(dtype), LayerCache(keys=self.keys.to(dtype), values=self.values.to(dtype))
        output = torch.full(query.shape, torch.nan, dtype=dtype)
        paged.attend(query, cache, plan_tasks(self.spans, None, shared), self.scale, output)
        return output

    def by_reference(self, dtype: torch.dtype) -> Tensor:
        query, cache = self.query.to(dtype), LayerCache(keys=self.keys.to(dtype), values=self.values.to(dtype))
        plan = reference.plan(self.spans, shared=self.shared)
        return reference.attention(query, query, query, cache, plan, self.scale)


@settings(deadline=None, max_examples=120)
@given(
    roots=st.lists(trees(90) | trees(1800), min_size=1, max_size=4),
    shape=st.sampled_from([(1, 1, 16), (2, 3, 32), (1, 8, 64), (3, 2, 80)]),
    dtype=DTYPES,
    keep=st.randoms(use_true_random=False),
    seed=st.integers(0, 2**20),
)
def test_nested_groups_agree_with_the_reference(
    roots: list[Node], shape: tuple[int, int, int], dtype: torch.dtype, keep: random.Random, seed: int
) -> None:
    """Whichever of the shared spans are used, in whatever order, of whichever members; and their bits do not tell."""
    num_kv_heads, group, head_dim = shape
    forest = Forest(roots, num_kv_heads=num_kv_heads, group=group, head_dim=head_dim, seed=seed)
    shared = []
    for common in keep.sample(forest.shared, keep.randint(0, len(forest.shared))):
        members = keep.sample(common.members, keep.randint(1, len(common.members)))
        shared.append(
            SharedSpan(
                members=tuple(members),
                first_token=common.first_token,
                num_tokens=common.num_tokens,
                runs=common.runs,
            )
        )
    got = forest.attend(shared, dtype)
    torch.testing.assert_close(got, forest.by_reference(dtype), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    assert torch.equal(got, forest.attend([], dtype))


def prefix(num_members: int, num_tokens: int, own: int = 40) -> Node:
    return Node(num_tokens=num_tokens, children=(Node(num_tokens=own),) * num_members)


@pytest.mark.every_target
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [PART - 1, PART, 4 * PART + 300])
def test_more_members_and_tokens_than_one_task_holds(num_tokens: int, dtype: torch.dtype) -> None:
    forest = Forest([prefix(2 * MAX_QUERIES + 3, num_tokens)], num_kv_heads=2, group=3, head_dim=32, seed=1)
    got, expected = forest.attend(forest.shared, dtype), forest.by_reference(dtype)
    torch.testing.assert_close(got, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.every_target
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_depend_neither_on_the_group_nor_on_threads_or_batch_mates(dtype: torch.dtype) -> None:
    group, others = prefix(7, 1300), [Node(num_tokens=900), prefix(3, 50), prefix(3, PART)]
    forest = Forest([group, *others], num_kv_heads=2, group=4, head_dim=64, seed=5)
    torch.set_num_threads(1)
    expected = forest.attend(forest.shared, dtype)
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        assert torch.equal(forest.attend(forest.shared, dtype), expected)
    assert torch.equal(forest.attend([], dtype), expected)


def test_only_whole_parts_are_shared_wherever_the_span_begins() -> None:
    tree = Node(num_tokens=300, children=(prefix(3, 2 * PART + 250), prefix(4, PART), Node(num_tokens=5)))
    forest = Forest([tree], num_kv_heads=2, group=2, head_dim=32, seed=8)
    plan = plan_tasks(forest.spans, None, forest.shared)
    shared = plan.tasks[plan.tasks[:, 1] > 1]
    # Of what the three share, positions 512 to 1536; of what the four do, 300 to 812, no part is whole.
    assert shared[:, 1].tolist() == [3, 3] and shared[:, 4].tolist() == [PART, PART]
    assert torch.equal(forest.attend(forest.shared, torch.bfloat16), forest.attend([], torch.bfloat16))


def test_many_threads_at_once_lose_no_part() -> None:
    tree = Node(num_tokens=1600, children=(prefix(6, 1100, own=600), prefix(40, 1300), Node(num_tokens=2)))
    forest = Forest([tree], num_kv_heads=3, group=2, head_dim=32, seed=6)
    torch.set_num_threads(1)
    expected = forest.attend(forest.shared, torch.float32)
    torch.set_num_threads(4)
    assert all(torch.equal(forest.attend(forest.shared, torch.float32), expected) for _ in range(50))


@pytest.mark.parametrize("window", [None, 700])
def test_a_prefill_beside_its_group_reads_the_prefix_itself(window: int | None) -> None:
    """A chunk may be named as a member: it is one of the batch like any other."""
    forest = Forest([prefix(6, 600)], num_kv_heads=2, group=4, head_dim=64, seed=7)
    grown = (*forest.spans[5].runs, (forest.free, forest.free + 50))
    spans = [*forest.spans[:5], SequenceSpan(query_start=5, num_queries=50, runs=grown)]
    shape = 2, 2, forest.free + 50, 64
    cache = LayerCache(keys=torch.randn(shape)[0], values=torch.randn(shape)[1])
    query = torch.randn(55, 8, 64)
    plans = [kernels.plan(spans, window=window, shared=forest.shared) for kernels in (cpu, reference)]
    got, expected = (
        kernels.attention(query, query, query, cache, plan, 0.125)
        for kernels, plan in zip((cpu, reference), plans, strict=True)
    )
    torch.testing.assert_close(got, expected, atol=3e-6, rtol=3e-6)
    assert tasks_with_many_decodes(plans[0]) == 1


def tasks_with_many_decodes(plan: AttentionPlan) -> int:
    """Tasks of several queries that leave partial results: those of shared runs."""
    assert plan.tasks is not None
    return int(((plan.tasks.tasks[:, 1] > 1) & (plan.tasks.tasks[:, -1] >= 0)).sum())


def test_shared_tokens_are_planned_once() -> None:
    forest = Forest([prefix(16, 4096, own=10)], num_kv_heads=1, group=1, head_dim=16, seed=0)
    plan = cpu.plan(forest.spans, shared=forest.shared).tasks
    assert plan is not None
    assert plan.tasks[:, 4].sum() == 4096 + 16 * 10
    assert cpu.plan(forest.spans).tasks.tasks[:, 4].sum() == 16 * (4096 + 10)  # type: ignore[union-attr]


def test_sharing_pays_by_members_and_tokens() -> None:
    assert not worthwhile(num_members=0, num_tokens=10_000)
    assert not worthwhile(num_members=1, num_tokens=10_000)
    assert not choose(spans_of((600, 1), (600, 1)), [common((0, 1), 0, PART - 1)])
    assert worthwhile(num_members=2, num_tokens=2 * PART)
    assert worthwhile(num_members=64, num_tokens=4096)


@given(num_members=st.integers(2, 300), num_parts=st.integers(1, 40))
def test_what_pays_goes_on_paying_with_whole_parts_more(num_members: int, num_parts: int) -> None:
    if worthwhile(num_members=num_members, num_tokens=num_parts * PART):
        assert worthwhile(num_members=num_members, num_tokens=(num_parts + 1) * PART)


def spans_of(*lengths: tuple[int, int]) -> list[SequenceSpan]:
    return [
        SequenceSpan(query_start=row, num_queries=queries, runs=((0, tokens),))
        for row, (tokens, queries) in enumerate(lengths)
    ]


def common(members: tuple[int, ...], first_token: int, num_tokens: int) -> SharedSpan:
    runs = ((first_token, first_token + num_tokens),)
    return SharedSpan(members=members, first_token=first_token, num_tokens=num_tokens, runs=runs)


def test_decodes_share_what_all_of_them_see() -> None:
    spans = spans_of((2000, 1), (2000, 1), (2000, 9), (1990, 1))
    offered = [common((0, 1, 2, 3), 0, 1024), common((0, 1, 2, 3), 1024, 900), common((0, 2), 1924, 60)]

    def shared(window: int | None) -> list[tuple[tuple[int, ...], int, int]]:
        return [(kept.members, kept.first_token, kept.num_tokens) for kept in choose(spans, offered, window=window)]

    assert shared(None) == [((0, 1, 3), 0, 1024), ((0, 1, 3), 1024, 512)]
    assert shared(1500) == [((0, 1, 3), 512, 512), ((0, 1, 3), 1024, 512)]
    assert shared(976) == [((0, 1, 3), 1024, 512)]
    assert not shared(970)  # one is left that sees a whole part


@pytest.mark.parametrize(("window", "num_shared"), [(600, 0), (1100, 1), (1600, 2)])
def test_what_is_shared_within_windows_changes_no_bit(window: int, num_shared: int) -> None:
    forest = Forest([prefix(9, 1700, own=60)], num_kv_heads=2, group=4, head_dim=32, seed=9)
    query, cache = forest.query, LayerCache(keys=forest.keys, values=forest.values)
    plans = [cpu.plan(forest.spans, window=window, shared=shared) for shared in (forest.shared, [])]
    together, alone = (cpu.attention(query, query, query, cache, plan, 0.2) for plan in plans)
    assert tasks_with_many_decodes(plans[0]) == num_shared
    assert torch.equal(together, alone)
    expected = reference.attention(query, query, query, cache, plans[1], 0.2)
    torch.testing.assert_close(together, expected, atol=3e-6, rtol=3e-6)


@pytest.mark.parametrize(
    ("members", "first_token", "num_tokens"), [((), 0, 4), ((1, 1), 0, 4), ((0, 1), -1, 4), ((0, 1), 0, 5)]
)
def test_impossible_shared_spans_are_caught(members: tuple[int, ...], first_token: int, num_tokens: int) -> None:
    with pytest.raises(AssertionError):
        SharedSpan(members=members, first_token=first_token, num_tokens=num_tokens, runs=((0, 4),))


def test_more_shared_than_a_member_has_is_caught() -> None:
    with pytest.raises(AssertionError):
        choose(spans_of((900, 1), (500, 1)), [common((0, 1), 0, 600)])


def test_members_leave_and_the_rest_go_on() -> None:
    """Step by step fewer members, down to none: each step's result is right."""
    forest = Forest([prefix(5, 1100)], num_kv_heads=2, group=2, head_dim=32, seed=3)
    expected = forest.by_reference(torch.float32)
    for left in itertools.accumulate(range(5), lambda left, _: left[1:], initial=tuple(range(5))):
        shared = [common_of(forest.shared[0], left)] if left else []
        torch.testing.assert_close(forest.attend(shared, torch.float32), expected, atol=3e-6, rtol=3e-6)


def common_of(shared: SharedSpan, members: tuple[int, ...]) -> SharedSpan:
    return SharedSpan(members=members, first_token=shared.first_token, num_tokens=shared.num_tokens, runs=shared.runs)
