"""Measures every way of summing on the links there are, so that each size has the one that suits it."""

import time

import torch
from torch import Tensor

from placement.measured.collectives import MEASURED_BYTES, AllReduceTable, fastest
from workers.collectives.algorithms import AllReduce, Peers, broadcast, direct, gather
from workers.collectives.group import TensorGroup

_RUNS = 3
# Ranks begin up to a latency apart, which one sum hands on to the next: a single pairwise exchange then takes one rank
# nothing and the other two latencies, as long as the star takes. Two in a row take both of them two.
IN_A_ROW = 2


def measure(group: TensorGroup) -> AllReduceTable:
    """The table of this group: the same at every rank. All ranks call it at the same time. Raises PeerFailed.

    What counts of an algorithm is the best of a few runs, at the rank where it takes longest.
    """
    # New connections have small windows: whatever outgrew them first would wait for latencies that it has never again.
    group.run(direct, torch.zeros(MEASURED_BYTES[-1] // 4))
    ways = group.ways
    seconds = torch.tensor([[_measure(group, way, size) for size in MEASURED_BYTES] for way in ways.values()])
    most_s = slowest(group, seconds.to(torch.float64))
    return fastest({name: row.tolist() for name, row in zip(ways, most_s, strict=True)}, unchecked=group.unchecked)


def _measure(group: TensorGroup, way: AllReduce, num_bytes: int) -> float:
    x = torch.zeros(num_bytes // 4, device=group.device)
    best_s = float("inf")
    for _ in range(_RUNS):
        group.run(direct, torch.zeros(1))  # all begin together
        began_s = time.monotonic()
        for _ in range(IN_A_ROW):
            group.run(way, x)
        best_s = min(best_s, (time.monotonic() - began_s) / IN_A_ROW)
    return best_s


def slowest(group: TensorGroup, mine: Tensor) -> Tensor:
    """The greatest of every number over all ranks, at every rank. Raises PeerFailed."""
    others = {} if group.rank else {rank: torch.empty_like(mine) for rank in range(1, group.num_ranks)}

    def collect(peers: Peers, x: Tensor) -> None:
        gather(peers, x, others)

    group.run(collect, mine)
    most = torch.stack([mine, *others.values()]).amax(dim=0)
    group.run(broadcast, most)
    return most
