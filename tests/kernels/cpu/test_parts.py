"""Attention over parts of what queries see, merged: the same as over all of it at once."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from kernels import reference
from kernels.attention import LayerCache, PartSpan, SequenceSpan, SharedSpan
from kernels.cpu import variant as cpu
from kernels.protocol import Kernels

DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 1e-2}


class Case:
    """One sequence's last ``num_queries`` of ``num_tokens`` tokens, whose KV lies in order, dealt out to ranks."""

    def __init__(
        self, num_tokens: int, num_queries: int, owners: list[int], *, group: int, head_dim: int, dtype: torch.dtype
    ) -> None:
        generator = torch.Generator().manual_seed(num_tokens)
        self.num_tokens, self.num_queries, self.owners = num_tokens, num_queries, owners
        self.query = torch.randn(num_queries, 2 * group, head_dim, generator=generator).to(dtype)
        keys, values = torch.randn(2, 2, num_tokens, head_dim, generator=generator).to(dtype)
        self.cache = LayerCache(keys=keys.contiguous(), values=values.contiguous())
        self.scale = head_dim**-0.5

    def whole(self, window: int | None) -> Tensor:
        span = SequenceSpan(query_start=0, num_queries=self.num_queries, runs=((0, self.num_tokens),))
        plan = reference.plan([span], window=window)
        return reference.attention(self.query, self.query, self.query, self.cache, plan, self.scale)

    def span(self, rank: int, window: int | None) -> PartSpan:
        """What all queries see of a rank's tokens, counted token by token."""
        held = [token for token in range(self.num_tokens) if self.owners[token % len(self.owners)] == rank]
        seen = []
        for position in range(self.num_tokens - self.num_queries, self.num_tokens):
            oldest = 0 if window is None else position - window + 1
            seen.append((sum(t < oldest for t in held), sum(t <= position for t in held)))
        return PartSpan(query_start=0, runs=_runs(held), seen=np.array(seen, np.int64))


def _runs(slots: list[int]) -> NDArray[np.int64]:
    groups = itertools.groupby(enumerate(slots), key=lambda pair: pair[1] - pair[0])
    members = [[slot for _, slot in group] for _, group in groups]
    return np.array([(run[0], run[-1] + 1) for run in members], np.int64).reshape(-1, 2)


@pytest.mark.parametrize("kernels", [cpu, reference], ids=["cpu", "reference"])
@settings(deadline=None, max_examples=60)
@given(
    num_tokens=st.integers(1, 1300),
    num_queries=st.integers(1, 90),
    owners=st.lists(st.integers(0, 2), min_size=1, max_size=24),
    group=st.integers(1, 4),
    head_dim=st.sampled_from([16, 20, 32, 64]),
    window=st.one_of(st.none(), st.integers(1, 400)),
    dtype=DTYPES,
)
def test_parts_of_ranks_merge_to_the_whole(
    kernels: Kernels,
    num_tokens: int,
    num_queries: int,
    owners: list[int],
    group: int,
    head_dim: int,
    window: int | None,
    dtype: torch.dtype,
) -> None:
    num_queries = min(num_queries, num_tokens)
    case = Case(num_tokens, num_queries, owners, group=group, head_dim=head_dim, dtype=dtype)
    plans = [kernels.plan_parts([case.span(rank, window)]) for rank in range(3)]
    parts = [kernels.attend_parts(case.query, case.cache, plan, case.scale) for plan in plans]
    merged, _ = reference.merge_partials(*zip(*parts, strict=True))
    torch.testing.assert_close(merged.to(dtype), case.whole(window), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.every_target
@pytest.mark.parametrize("kernels", [cpu, reference], ids=["cpu", "reference"])
@pytest.mark.parametrize("num_queries", [1, 40])
def test_a_row_that_sees_nothing_weighs_nothing(kernels: Kernels, num_queries: int) -> None:
    case = Case(700, num_queries, [0], group=2, head_dim=32, dtype=torch.float32)
    blind = PartSpan(query_start=0, runs=np.array([(0, 700)]), seen=np.zeros((num_queries, 2), np.int64))
    for spans in ([blind], []):
        output, mass = kernels.attend_parts(case.query, case.cache, kernels.plan_parts(spans), case.scale)
        assert not output.any() and (mass == -torch.inf).all()


@pytest.mark.every_target
@pytest.mark.parametrize("kernels", [cpu, reference], ids=["cpu", "reference"])
def test_queries_that_see_nothing_beside_others_that_do(kernels: Kernels) -> None:
    case = Case(300, 50, [0], group=2, head_dim=32, dtype=torch.float32)
    seen = np.stack((np.arange(50) * 3, np.arange(50) * 3 + np.repeat([0, 2], 25)), axis=1)
    plan = kernels.plan_parts([PartSpan(query_start=0, runs=np.array([(100, 300)]), seen=seen)])
    output, mass = kernels.attend_parts(case.query, case.cache, plan, case.scale)
    assert not output[:25].any() and (mass[:25] == -torch.inf).all()
    assert output[25:].any(-1).all() and mass[25:].isfinite().all()


def test_several_spans_and_rows_of_none() -> None:
    case = Case(900, 60, [0], group=2, head_dim=32, dtype=torch.float32)
    single = PartSpan(query_start=3, runs=np.array([(0, 600)]), seen=np.array([[10, 600]]))
    chunk = PartSpan(query_start=20, runs=np.array([(650, 900)]), seen=np.array([[0, 1 + i] for i in range(40)]))
    for plan in (cpu.plan_parts([chunk, single]), cpu.plan_parts([single, chunk])):
        got, mass = cpu.attend_parts(case.query, case.cache, plan, case.scale)
        expected, expected_mass = reference.attend_parts(case.query, case.cache, plan, case.scale)
        torch.testing.assert_close(got, expected, atol=3e-6, rtol=3e-6)
        torch.testing.assert_close(mass, expected_mass, atol=1e-5, rtol=1e-5)
        assert not got[4:20].any()


def test_single_queries_that_share_tokens_get_the_bits_of_reading_them_alone() -> None:
    """Six queries, one of which sees other tokens in between; parts of 512."""
    case = Case(2600, 6, [0], group=4, head_dim=64, dtype=torch.bfloat16)
    common, own = (0, 1500), [(1500 + 150 * row, 1500 + 150 * row + 20 * row + 1) for row in range(6)]
    spans = [
        PartSpan(query_start=row, runs=np.array([common, own[row]]), seen=np.array([[0, 1501 + 20 * row]]))
        for row in range(6)
    ]
    shared = SharedSpan(members=(0, 1, 2, 3, 4, 5), first_token=0, num_tokens=1500, runs=(common,))
    alone, together = cpu.plan_parts(spans), cpu.plan_parts(spans, [shared])
    assert together.tasks is not None and together.tasks.tasks[:, 1].max() > 1, "it pays, so it is shared"
    found, expected = (cpu.attend_parts(case.query, case.cache, plan, case.scale) for plan in (together, alone))
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
