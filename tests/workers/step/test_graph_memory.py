"""Checks which steps decode graphs take, and what is put in place for them. It needs neither Triton nor a GPU."""

from dataclasses import fields
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.attention import SequenceSpan
from kernels.cuda.plan import PART, DevicePlan, SharedParts, plan_step
from placement.planning.memory import MOST_GRAPHED
from tests.support.captures import run_again
from workers.step.graphs import DecodeGraphs, Replay, StepInputs, StepMemory, graph_sizes, next_size

SIZES = (1, 2, 4, 8)
WINDOWS = (None, 300)
CPU = torch.device("cpu")


def step(lengths: list[int], num_queries: int = 1, *, share: bool = False) -> StepInputs:
    """Makes a step of sequences with these tokens and queries each, in which every number tells its row.

    With ``share`` those that have a part in common with others attend to their first together.
    """
    spans, free = [], 0
    for index, length in enumerate(lengths):
        spans.append(
            SequenceSpan(query_start=index * num_queries, num_queries=num_queries, runs=((free, free + length),))
        )
        free += length
    rows = torch.arange(1, 1 + len(lengths) * num_queries)
    members = tuple(index for index, length in enumerate(lengths) if length > PART)
    common = {None: [SharedParts(members=members, first=0, stop=1)] if share and len(members) > 1 else []}
    return StepInputs(
        token_ids=rows,
        positions=100 * rows,
        slots=10 * rows,
        attention={window: plan_step(spans, window, CPU, common.get(window, [])) for window in WINDOWS},
    )


def memory(max_decodes: int = 8, max_tokens: int = 5000) -> StepMemory:
    return StepMemory(like=step([1]), max_decodes=max_decodes, max_tokens=max_tokens)


class Computes:
    """A function to capture that records its calls. A row's result is ten times its token."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __call__(self, inputs: StepInputs) -> Tensor:
        self.sizes.append(len(inputs.token_ids))
        return inputs.token_ids[:, None].float() * 10


@pytest.mark.parametrize(("num_tokens", "size"), [(1, 1), (2, 2), (3, 4), (5, 8), (8, 8)])
def test_the_next_size_is_the_least_that_is_enough(num_tokens: int, size: int) -> None:
    assert next_size(num_tokens, SIZES) == size


@given(st.integers(1, 5000))
def test_sizes_rise_to_the_most_there_can_be_without_great_gaps(max_decodes: int) -> None:
    sizes = graph_sizes(max_decodes)
    assert sizes[0] == 1 and sizes[-1] == min(max_decodes, MOST_GRAPHED)
    assert all(low < high <= 2 * low for low, high in pairwise(sizes))


@pytest.mark.parametrize("num_decodes", range(1, 9))
def test_a_step_of_decodes_runs_in_the_next_larger_graph(num_decodes: int) -> None:
    compute, replayed = Computes(), list[int]()

    def capture(run: Replay) -> Replay:
        run()
        size = compute.sizes[-1]
        return lambda: (replayed.append(size), run())[1]

    graphs = DecodeGraphs(compute=compute, inputs=memory(), capture=capture, sizes=SIZES)
    assert compute.sizes == [8, 8, 4, 2, 1]  # the first to know what logits are
    tokens = step([5] * num_decodes)
    assert graphs.can_run(tokens)
    assert graphs(tokens).flatten().tolist() == [10.0 * row for row in range(1, num_decodes + 1)]
    assert replayed == [next_size(num_decodes, SIZES)]


@pytest.mark.parametrize(
    "tokens",
    [step([5] * 9), step([6, 7], num_queries=2), step([4990, 11])],
    ids=["too many", "chunks", "too long"],
)
def test_other_steps_are_not_taken(tokens: StepInputs) -> None:
    graphs = DecodeGraphs(compute=Computes(), inputs=memory(), capture=run_again, sizes=SIZES)
    assert not graphs.can_run(tokens)


def test_a_step_of_prefill_and_decode_is_not_taken() -> None:
    spans = [
        SequenceSpan(query_start=0, num_queries=1, runs=((0, 5),)),
        SequenceSpan(query_start=1, num_queries=2, runs=((5, 9),)),
    ]
    rows = torch.arange(3)
    plans = {window: plan_step(spans, window, CPU) for window in WINDOWS}
    graphs = DecodeGraphs(compute=Computes(), inputs=memory(), capture=run_again, sizes=SIZES)
    assert not graphs.can_run(StepInputs(token_ids=rows, positions=rows, slots=rows, attention=plans))


def test_room_for_fewer_decodes_than_the_largest_size_takes_no_more() -> None:
    graphs = DecodeGraphs(compute=Computes(), inputs=memory(max_decodes=3), capture=run_again)
    assert graphs.can_run(step([5] * 3)) and not graphs.can_run(step([5] * 4))


def in_use(plan: DevicePlan, of: DevicePlan) -> list[Tensor]:
    """Selects the part of a plan's tables that a kernel reads for the tokens of another."""
    num_decodes, num_merges, num_shared = plan.counts[:3].tolist()
    in_order = (plan.decodes[:num_decodes], plan.merges[:num_merges], plan.shared[:num_shared])
    return [plan.slots[: len(of.slots)], plan.members[: len(of.members)], *in_order]


def tensors(inputs: StepInputs) -> list[Tensor]:
    """Lists all tensors that a captured computation reads."""
    found = [inputs.token_ids, inputs.positions, inputs.slots]
    for plan in inputs.attention.values():
        assert isinstance(plan, DevicePlan)
        found += [table for field in fields(plan) if isinstance(table := getattr(plan, field.name), Tensor)]
    return found


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.lists(st.integers(1, 900), min_size=1, max_size=8), st.booleans()), max_size=6))
def test_every_step_is_all_in_place_and_nothing_is_left_of_those_before(steps: list[tuple[list[int], bool]]) -> None:
    inputs = memory(max_tokens=8 * 900)
    for lengths, share in steps:
        tokens, held = step(lengths, share=share), inputs.step(8)
        assert inputs.can_hold(tokens)
        inputs.put(tokens)
        count = len(lengths)
        assert torch.equal(held.token_ids[:count], tokens.token_ids)
        assert torch.equal(held.positions[:count], tokens.positions)
        assert held.slots.tolist() == [*tokens.slots.tolist(), *[-1] * (8 - count)]  # -1: written nowhere
        for window in WINDOWS:
            found, expected = held.attention[window], tokens.attention[window]
            assert isinstance(found, DevicePlan) and isinstance(expected, DevicePlan)
            for table, wanted in zip(in_use(found, expected), in_use(expected, expected), strict=True):
                assert torch.equal(table, wanted)


@pytest.mark.parametrize("size", SIZES)
def test_what_a_graph_reads_stays_where_it_was_captured(size: int) -> None:
    inputs = memory(max_tokens=7000)
    captured = [(table.data_ptr(), table.shape) for table in tensors(inputs.step(size))]
    for lengths in ([700] * size, [3], [1, 600, 5, 8][:size]):
        inputs.put(step(lengths))
        assert [(table.data_ptr(), table.shape) for table in tensors(inputs.step(size))] == captured


@pytest.mark.parametrize("size", SIZES)
def test_a_graph_of_any_size_sees_every_part_of_its_longest_steps(size: int) -> None:
    inputs = StepMemory(like=step([1]), max_decodes=8, max_tokens=160_000)
    tokens = step([20_000] * size)
    inputs.put(tokens)
    for window in WINDOWS:
        held, plan = inputs.step(size).attention[window], tokens.attention[window]
        assert isinstance(held, DevicePlan) and isinstance(plan, DevicePlan)
        assert len(plan.decodes) <= len(held.decodes) and len(plan.merges) <= len(held.merges)
        assert plan.num_partials <= held.num_partials
        assert size == 1 or len(held.shared)
