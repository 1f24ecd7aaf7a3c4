"""The sizes that a replica serves within are checked once, where they are put together."""

import pytest

from placement.errors import InvalidConfig
from placement.planning.limits import ReplicaLimits


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
