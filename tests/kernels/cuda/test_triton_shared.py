"""Attention in Triton over tokens that decodes share, once for all of them, against the reference in float32."""

from dataclasses import replace

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from kernels import reference
from kernels.attention import LayerCache, SequenceSpan
from tests.kernels.cpu.test_shared_prefix import Forest, Node, prefix
from tests.support.triton.triton_cases import (
    ATTENTION_TOLERANCE,
    DEVICE,
    DTYPES,
    HAS_GPU,
    REASON,
    RUNS_HERE,
    AttentionCase,
)

if not RUNS_HERE:
    pytest.skip(REASON, allow_module_level=True)

from kernels.cuda import attention, shared
from kernels.cuda.plan import MEMBERS, PART, DevicePlan, narrowed, put, room_for_decodes
from kernels.cuda.variant import open_kernels

KERNELS = open_kernels(DEVICE)
TYPES = pytest.mark.parametrize("dtype", DTYPES, ids=str)
SMALL = {"num_kv_heads": 1, "group": 3, "head_dim": 16, "seed": 3}
NEAR_PART = st.sampled_from([PART - 1, PART, PART + 1, 2 * PART + 40])
LEAVES = st.lists(st.builds(Node, num_tokens=st.sampled_from([1, 40, PART + 3])), min_size=1, max_size=3)
GROUPS = st.builds(lambda length, leaves: Node(num_tokens=length, children=tuple(leaves)), NEAR_PART, LEAVES)
NESTED = st.builds(
    lambda length, groups, leaves: Node(num_tokens=length, children=(*groups, *leaves)),
    NEAR_PART,
    st.lists(GROUPS, min_size=1, max_size=2),
    LEAVES,
)


@pytest.fixture(autouse=True)
def _share_whatever_can_be_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "PASS_BYTES", 0)


def case_of(forest: Forest, dtype: torch.dtype) -> AttentionCase:
    cache = LayerCache(keys=forest.keys.to(DEVICE, dtype), values=forest.values.to(DEVICE, dtype))
    return AttentionCase(query=forest.query.to(DEVICE, dtype), cache=cache, spans=tuple(forest.spans))


def attend(case: AttentionCase, plan: DevicePlan) -> torch.Tensor:
    return attention.attention(case.query, case.query, case.query, case.cache, plan, case.query.shape[2] ** -0.5)


def plan_of(forest: Forest, window: int | None = None) -> DevicePlan:
    plan = KERNELS.plan(forest.spans, window=window, shared=forest.shared)
    assert isinstance(plan, DevicePlan)
    return plan


def agrees(forest: Forest, dtype: torch.dtype, window: int | None = None) -> None:
    case, tolerance = case_of(forest, dtype), ATTENTION_TOLERANCE[dtype]
    found = attend(case, plan_of(forest, window))
    torch.testing.assert_close(found, case.expected(window), atol=tolerance, rtol=tolerance)


# No smaller examples are looked for: under the interpreter that takes minutes.
@settings(deadline=None, max_examples=100 if HAS_GPU else 6, phases=(Phase.explicit, Phase.generate))
@given(
    roots=st.lists(NESTED | GROUPS, min_size=1, max_size=2),
    shape=st.sampled_from([(1, 1, 16), (2, 3, 32), (1, 5, 24)]),
    dtype=st.sampled_from(DTYPES),
    window=st.sampled_from([None, None, 300]),
)
def test_nested_groups_agree_with_the_reference(
    roots: list[Node], shape: tuple[int, int, int], dtype: torch.dtype, window: int | None
) -> None:
    num_kv_heads, group, head_dim = shape
    agrees(Forest(roots, num_kv_heads=num_kv_heads, group=group, head_dim=head_dim, seed=len(roots)), dtype, window)


@TYPES
def test_more_members_than_a_task_and_than_a_tile_holds(dtype: torch.dtype) -> None:
    forest = Forest([prefix(MEMBERS + 2, PART, own=3)], num_kv_heads=1, group=2, head_dim=16, seed=1)
    assert len(plan_of(forest).shared) == 2
    agrees(forest, dtype)


@TYPES
@pytest.mark.parametrize("head_dim", [80, 256])
def test_any_head_dimension_agrees(dtype: torch.dtype, head_dim: int) -> None:
    agrees(Forest([prefix(3, PART)], num_kv_heads=1, group=4, head_dim=head_dim, seed=2), dtype)


def test_a_decode_whose_every_token_is_shared_agrees() -> None:
    forest = Forest([Node(num_tokens=PART - 1, children=(Node(num_tokens=1),) * 3)], **SMALL)
    first = forest.spans[0].runs
    spans = [SequenceSpan(query_start=row, num_queries=1, runs=first) for row in range(3)]
    case = replace(case_of(forest, torch.float32), spans=tuple(spans))
    plan = KERNELS.plan(spans, shared=[replace(forest.shared[0], num_tokens=PART, runs=first)])
    assert isinstance(plan, DevicePlan) and len(plan.shared) == 1 and not len(plan.decodes)
    torch.testing.assert_close(attend(case, plan), case.expected(), atol=2e-5, rtol=2e-5)


def test_a_prefill_beside_its_group_reads_the_prefix_itself() -> None:
    forest = Forest([prefix(4, PART + 9)], **SMALL)
    grown = (*forest.spans[3].runs, (forest.free, forest.free + 20))
    spans = [*forest.spans[:3], SequenceSpan(query_start=3, num_queries=20, runs=grown)]
    keys, values = torch.randn(2, 1, forest.free + 20, 16)
    query = torch.randn(23, 3, 16)
    cache = LayerCache(keys=keys.to(DEVICE), values=values.to(DEVICE))
    case = AttentionCase(query=query.to(DEVICE), cache=cache, spans=tuple(spans))
    plan = KERNELS.plan(spans, shared=forest.shared)
    assert isinstance(plan, DevicePlan) and plan.members[:, 0].tolist() == [0, 1, 2] and len(plan.chunks)
    torch.testing.assert_close(attend(case, plan), case.expected(), atol=2e-5, rtol=2e-5)


def test_members_leave_and_the_rest_go_on_in_the_same_room() -> None:
    """As a CUDA graph runs it: always the same launches, on what was last put there."""
    forest = Forest([prefix(4, PART + 9, own=30)], **SMALL)
    case, room = case_of(forest, torch.float32), room_for_decodes(4, 4000, None, DEVICE)
    expected = reference.attention(case.query, case.query, case.query, case.cache, reference.plan(case.spans), 0.25)
    for left in (4, 2, 1):
        members = tuple(range(left))
        plan = KERNELS.plan(case.spans[:left], shared=[replace(forest.shared[0], members=members)])
        assert isinstance(plan, DevicePlan) and bool(len(plan.shared)) == (left > 1)
        put(plan, room)
        found = attend(case, narrowed(room, 4))[:left]
        torch.testing.assert_close(found, expected[:left], atol=2e-5, rtol=2e-5)
        assert torch.equal(found, attend(replace(case, query=case.query[:left]), plan))
