"""How the all-reduce algorithms are measured, by a group that only notes what it is asked for."""

from collections.abc import Callable

import torch
from torch import Tensor

from placement.measured.collectives import MEASURED_BYTES
from workers.collectives.algorithms import ALL_REDUCES, Peers, candidates
from workers.collectives.measure import measure


class NotingGroup:
    """Of one rank, with connections to nobody."""

    rank = 0
    num_ranks = 1
    algorithms = candidates(1)
    unchecked = ()
    device = torch.device("cpu")

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def run(self, algorithm: Callable[[Peers, Tensor], None], x: Tensor) -> None:
        self.sizes.append(x.nbytes)


def test_connections_have_carried_the_largest_sum_before_any_is_timed() -> None:
    group = NotingGroup()
    table = measure(group)  # type: ignore[arg-type]
    assert group.sizes[0] == MEASURED_BYTES[-1]
    assert set(MEASURED_BYTES) <= set(group.sizes)
    assert table.sizes == MEASURED_BYTES and set(table.names) <= set(ALL_REDUCES)
    assert torch.tensor(table.seconds).isfinite().all()
