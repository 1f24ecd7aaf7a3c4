"""Which steps decode graphs take, and what is put in place for them. Needs neither Triton nor a GPU."""

import pytest
import torch
from torch import Tensor

from kernels.attention import SequenceSpan
from kernels.cuda.plan import DevicePlan, plan_step
from tests.support.captures import run_again
from workers.decoder import RopeTables, TokenBatch
from workers.graphs import Computed, DecodeGraphs, StepMemory, next_size

SIZES = (1, 2, 4, 8)
WINDOWS = (None, 300)
CPU = torch.device("cpu")


def step(lengths: list[int], num_queries: int = 1) -> TokenBatch:
    """Sequences of so many tokens, with so many queries each; every number in it tells its row."""
    spans, free = [], 0
    for index, length in enumerate(lengths):
        spans.append(
            SequenceSpan(query_start=index * num_queries, num_queries=num_queries, runs=((free, free + length),))
        )
        free += length
    rows = torch.arange(1, 1 + len(lengths) * num_queries)
    table = rows[:, None, None].float().expand(-1, 1, 4)
    return TokenBatch(
        token_ids=rows,
        slots=10 * rows,
        rope={window: RopeTables(cos=table, sin=-table) for window in WINDOWS},
        attention={window: plan_step(spans, window, CPU) for window in WINDOWS},
    )


def memory(max_decodes: int = 8, max_tokens: int = 5000) -> StepMemory:
    return StepMemory(like=step([1]), max_decodes=max_decodes, max_tokens=max_tokens)


class Computes:
    """Keeps what it was asked to compute. A row's result is ten times its token."""

    def __init__(self) -> None:
        self.asked: list[TokenBatch] = []

    def __call__(self, tokens: TokenBatch) -> Computed:
        self.asked.append(tokens)
        hidden = tokens.token_ids[:, None].float() * 10
        return Computed(hidden=hidden, logits=-hidden)


@pytest.mark.parametrize(("num_tokens", "size"), [(1, 1), (2, 2), (3, 4), (8, 8), (9, None)])
def test_the_next_size_is_the_least_that_is_enough(num_tokens: int, size: int | None) -> None:
    assert next_size(num_tokens, SIZES) == size


@pytest.mark.parametrize("num_decodes", range(1, 9))
def test_a_step_of_decodes_runs_in_the_next_larger_graph(num_decodes: int) -> None:
    compute = Computes()
    graphs = DecodeGraphs(compute=compute, inputs=memory(), capture=run_again, sizes=SIZES)
    assert [len(tokens.token_ids) for tokens in compute.asked] == [8, 4, 2, 1]
    compute.asked.clear()
    found = graphs(step([5] * num_decodes))
    assert found.logits is not None
    assert found.hidden.flatten().tolist() == [10.0 * row for row in range(1, num_decodes + 1)]
    assert torch.equal(found.logits, -found.hidden)
    assert [len(tokens.token_ids) for tokens in compute.asked] == [next_size(num_decodes, SIZES)]


@pytest.mark.parametrize(
    "tokens",
    [step([5] * 9), step([6, 7], num_queries=2), step([4990, 11])],
    ids=["too many", "chunks", "too long"],
)
def test_other_steps_are_computed_as_they_are(tokens: TokenBatch) -> None:
    compute = Computes()
    graphs = DecodeGraphs(compute=compute, inputs=memory(), capture=run_again, sizes=SIZES)
    graphs(tokens)
    assert compute.asked[-1] is tokens


def test_graphs_larger_than_the_memory_are_not_captured() -> None:
    compute = Computes()
    DecodeGraphs(compute=compute, inputs=memory(max_decodes=3), capture=run_again, sizes=SIZES)
    assert [len(tokens.token_ids) for tokens in compute.asked] == [2, 1]


def in_use(plan: DevicePlan, of: DevicePlan) -> list[Tensor]:
    """The part of a plan's tables that a kernel looks at, for the tokens of another."""
    num_decodes, num_merges = plan.counts[:2].tolist()
    return [plan.slots[: len(of.slots)], plan.decodes[:num_decodes], plan.merges[:num_merges]]


def test_a_step_is_all_in_place_and_nothing_is_left_of_the_one_before() -> None:
    inputs = memory()
    for lengths in ([700, 3, 900, 1, 40, 2, 9, 8], [2, 600, 5], [1]):
        tokens, held = step(lengths), inputs.step(8)
        assert inputs.can_hold(tokens)
        inputs.put(tokens)
        count = len(lengths)
        assert torch.equal(held.token_ids[:count], tokens.token_ids)
        assert held.slots.tolist() == [*tokens.slots.tolist(), *[-1] * (8 - count)]  # -1: written nowhere
        for window in WINDOWS:
            assert torch.equal(held.rope[window].cos[:count], tokens.rope[window].cos)
            assert torch.equal(held.rope[window].sin[:count], tokens.rope[window].sin)
            found, expected = held.attention[window], tokens.attention[window]
            assert isinstance(found, DevicePlan) and isinstance(expected, DevicePlan)
            for table, wanted in zip(in_use(found, expected), in_use(expected, expected), strict=True):
                assert torch.equal(table, wanted)


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
