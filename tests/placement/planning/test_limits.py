"""The sizes that a replica serves within are checked once, where they are put together."""

import pytest

from placement.errors import InvalidConfig
from placement.planning.limits import ReplicaLimits, most_auto_tokens


@pytest.mark.parametrize(
    ("block", "budget", "seqs", "field"),
    [
        (0, 8, 4, "serving.block_size"),
        (16, 0, 1, "serving.token_budget"),
        (16, 8, 0, "serving.max_num_seqs"),
        (16, 4, 5, "serving.token_budget"),
    ],
)
def test_sizes_that_cannot_work_are_refused_by_name(block: int, budget: int, seqs: int, field: str) -> None:
    with pytest.raises(InvalidConfig) as caught:
        ReplicaLimits(block_size=block, token_budget=budget, max_num_seqs=seqs)
    assert caught.value.field == field


@pytest.mark.parametrize("step_time_s", [0.0, -1.0, float("nan"), float("inf")])
def test_a_time_that_no_step_takes_is_refused(step_time_s: float) -> None:
    with pytest.raises(InvalidConfig) as caught:
        ReplicaLimits(block_size=16, token_budget=64, max_num_seqs=8, step_time_s=step_time_s)
    assert caught.value.field == "serving.step_time_s"


@pytest.mark.parametrize(
    ("kinds", "seqs", "most"),
    [
        (["cpu"], 32, 512),
        (["cuda", "cuda"], 32, 2048),
        (["cuda", "cpu"], 32, 512),
        (["cpu"], 600, 600),  # else decodes could stall
        (["cuda"], 4096, 4096),
    ],
)
def test_memory_is_planned_for_the_most_tokens_that_a_step_may_come_to_have(
    kinds: list[str], seqs: int, most: int
) -> None:
    assert most_auto_tokens(kinds, max_num_seqs=seqs) == most


def test_what_a_step_has_at_most_is_said_before_it_is_chosen() -> None:
    assert ReplicaLimits(block_size=16, token_budget=64, max_num_seqs=8).budget_words == "64"
    limits = ReplicaLimits(block_size=16, token_budget=512, max_num_seqs=8, step_time_s=0.5)
    assert limits.budget_words == "auto (at most 512)"
