"""Ways to sum a tensor over ranks, each the best for some size and link.

With n ranks, links of latency a and S bytes, on a link of B bytes per second each way:

    direct  everyone sends all to everyone      a + (n-1) S/B         two ranks: the pairwise exchange
    star    to rank 0, which sends the sum      2a + 2 (n-1) S/B
    tree    up and down a binomial tree         2 log2(n) (a + S/B)
    ring    parts go round, twice               2 (n-1) (a + S/(n B))

(Thakur, Rabenseifner and Gropp 2005; Li et al. 2025, TPI-LLM, for slow links.) All ranks end with the same bits:
direct and star add in the order of ranks, tree and ring in an order that depends on nothing but the number of ranks.
Sums of bfloat16 numbers are made in float32 and rounded once a step.

Shapes: x is any contiguous CPU tensor, the same on all ranks.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from workers.transport.link import Link, Transfer, move


@dataclass(frozen=True, slots=True, kw_only=True)
class Peers:
    """The ranks that sum together, numbered from 0 in their group.

    Attributes:
        links: to all others.
        deadline_s: when the operation must be done, by :func:`time.monotonic`.
        alive: raises where a rank is known to be lost.
    """

    rank: int
    num_ranks: int
    links: Mapping[int, Link]
    deadline_s: float
    alive: Callable[[], None]

    def move(self, sends: Mapping[int, Tensor], receives: Mapping[int, Tensor]) -> None:
        """Sends and receives tensors, by the rank that they go to or come from, all at once."""
        transfers = [
            Transfer(
                link=self.links[peer],
                send=payload(sends[peer]) if peer in sends else None,
                receive=payload(receives[peer]) if peer in receives else None,
            )
            for peer in dict.fromkeys((*sends, *receives))
        ]
        move(transfers, deadline_s=self.deadline_s, alive=self.alive)


def payload(x: Tensor) -> memoryview:
    """The bytes of a contiguous tensor, shared with it."""
    assert x.is_contiguous() and x.device.type == "cpu", (x.shape, x.stride(), x.device)
    view: memoryview = x.reshape(-1).view(torch.uint8).numpy().data
    return view


def add_in_order(parts: Sequence[Tensor], into: Tensor) -> None:
    """The sum of ``parts``, first to last, rounded to the dtype of ``into`` at the end."""
    if len(parts) == 2:  # the sum of two is rounded once in any case
        torch.add(parts[0], parts[1], out=into)
        return
    total = parts[0].to(torch.float32, copy=True)
    for part in parts[1:]:
        total += part
    into.copy_(total)


def direct(peers: Peers, x: Tensor) -> None:
    """Sums ``x`` over all ranks, in place: one latency, and the most bytes."""
    others = {peer: torch.empty_like(x) for peer in peers.links}
    peers.move(dict.fromkeys(others, x), others)
    add_in_order([x if rank == peers.rank else others[rank] for rank in range(peers.num_ranks)], x)


def star(peers: Peers, x: Tensor) -> None:
    """Sums ``x`` over all ranks, in place, at rank 0."""
    if peers.rank:
        peers.move({0: x}, {})
        peers.move({}, {0: x})
        return
    others = {peer: torch.empty_like(x) for peer in peers.links}
    peers.move({}, others)
    add_in_order([x, *(others[rank] for rank in range(1, peers.num_ranks))], x)
    peers.move(dict.fromkeys(others, x), {})


def tree(peers: Peers, x: Tensor) -> None:
    """Sums ``x`` over all ranks, in place, up a binomial tree to rank 0 and down again."""
    distances = [1 << i for i in range((peers.num_ranks - 1).bit_length())]
    reached = len(distances)
    for i, distance in enumerate(distances):
        if peers.rank & distance:
            peers.move({peers.rank - distance: x}, {})
            reached = i
            break
        if peers.rank + distance < peers.num_ranks:
            other = torch.empty_like(x)
            peers.move({}, {peers.rank + distance: other})
            add_in_order([x, other], x)
    if peers.rank:
        peers.move({}, {peers.rank - distances[reached]: x})
    for distance in reversed(distances[:reached]):
        if peers.rank + distance < peers.num_ranks:
            peers.move({peers.rank + distance: x}, {})


def ring(peers: Peers, x: Tensor) -> None:
    """Sums ``x`` over all ranks, in place: every rank sums a part, then passes the sums on."""
    parts = x.reshape(-1).tensor_split(peers.num_ranks)
    rank, num_ranks = peers.rank, peers.num_ranks
    after, before = (rank + 1) % num_ranks, (rank - 1) % num_ranks
    for step in range(num_ranks - 1):
        mine, theirs = parts[(rank - step) % num_ranks], parts[(rank - step - 1) % num_ranks]
        came = torch.empty_like(theirs)
        peers.move({after: mine}, {before: came})
        add_in_order([came, theirs], theirs)
    for step in range(num_ranks - 1):
        mine, theirs = parts[(rank + 1 - step) % num_ranks], parts[(rank - step) % num_ranks]
        peers.move({after: mine}, {before: theirs})


ALL_REDUCES: Mapping[str, Callable[[Peers, Tensor], None]] = {
    "direct": direct,
    "star": star,
    "tree": tree,
    "ring": ring,
}
"""By name, the simplest first."""


def gather(peers: Peers, mine: Tensor, others: Mapping[int, Tensor]) -> None:
    """Collects tensors at rank 0.

    Args:
        mine: what this rank has, sent unless it is rank 0.
        others: at rank 0, memory for what each other rank has, by its rank; those that have nothing are left out.
    """
    if peers.rank == 0:
        peers.move({}, others)
    elif mine.numel():
        peers.move({0: mine}, {})


def broadcast(peers: Peers, x: Tensor) -> None:
    """Everyone has rank 0's ``x`` afterwards."""
    if peers.rank:
        peers.move({}, {0: x})
    else:
        peers.move(dict.fromkeys(peers.links, x), {})
