"""Measures the all-reduce algorithms over the real links, so that each size of tensor gets the fastest."""

import time

import torch
from torch import Tensor

from placement.measured.collectives import MEASURED_BYTES, AllReduceTable, fastest
from workers.collectives.algorithms import AllReduce, Peers, broadcast, direct, gather
from workers.collectives.group import TensorGroup

_RUNS = 3
# Ranks begin up to one latency apart, and an all-reduce passes that difference on to the next: a single pairwise
# exchange then takes no time at one rank and two latencies at the other, as long as a star. Two in a row take two
# latencies at both.
IN_A_ROW = 2


def measure(group: TensorGroup) -> AllReduceTable:
    """Measures the table of this group, which is the same at every rank. Raises PeerFailed.

    All ranks call it at the same time. An algorithm counts by the best of a few runs, at the slowest rank.
    """
    # New connections have small windows, and the first large message waits for them to grow: none that is measured may.
    group.run(direct, torch.zeros(MEASURED_BYTES[-1] // 4))
    algorithms = group.algorithms
    seconds = torch.tensor(
        [[_measure(group, algorithm, size) for size in MEASURED_BYTES] for algorithm in algorithms.values()]
    )
    most_s = slowest(group, seconds.to(torch.float64))
    measured_s = {name: row.tolist() for name, row in zip(algorithms, most_s, strict=True)}
    return fastest(measured_s, unchecked=group.unchecked)


def _measure(group: TensorGroup, algorithm: AllReduce, num_bytes: int) -> float:
    """Returns the seconds of one all-reduce, the best of a few runs at this rank."""
    x = torch.zeros(num_bytes // 4, device=group.device)
    best_s = float("inf")
    for _ in range(_RUNS):
        group.run(direct, torch.zeros(1))  # so that all ranks begin together
        began_s = time.monotonic()
        for _ in range(IN_A_ROW):
            group.run(algorithm, x)
        best_s = min(best_s, (time.monotonic() - began_s) / IN_A_ROW)
    return best_s


def slowest(group: TensorGroup, own: Tensor) -> Tensor:
    """Returns, at every rank, the elementwise maximum over all ranks. Raises PeerFailed."""
    others = {} if group.rank else {rank: torch.empty_like(own) for rank in range(1, group.num_ranks)}

    def collect(peers: Peers, x: Tensor) -> None:
        gather(peers, x, others)

    group.run(collect, own)
    most = torch.stack([own, *others.values()]).amax(dim=0)
    group.run(broadcast, most)
    return most
