"""All-reduce algorithms, and the collectives that they are made of.

Each algorithm is the fastest for some size and link. All n ranks are connected with each other by links of latency a,
and a rank sends and receives B bytes per second. For a tensor of S bytes the times are:

    direct   each rank sends all of its tensor to all others       a + (n-1) S/B         of two: pairwise exchange
    scatter  reduce-scatter, then all-gather                       2a + 2 (n-1)/n S/B
    star     reduce at rank 0, then broadcast                      2a + 2 (n-1) S/B      fewest bytes on a shared medium
    tree     the same along a binomial tree of height h = log2 n   2ha + (n-1 + h) S/B   fewest messages of any one rank

(Thakur, Rabenseifner and Gropp 2005; Li et al. 2025, TPI-LLM, for slow links.) All algorithms add in rank order, in
float32, and round once. So every rank ends with the same bits, and they do not depend on the algorithm: the size of a
tensor, and with it the other sequences of a batch, changes nobody's bits. A ring would change them, and so would a tree
that adds on the way, since they add in other orders and round at every hop. A rank of this tree therefore passes on
the parts that reach it as they are; rank 0 receives n-1 of them, as many as in a star.

By these terms direct is always faster than the tree. But each message also costs its sender and its receiver some time
g of their only thread: 2 (n-1) g for direct, twice that for scatter, 2 (n-1) g at rank 0 of the star, and 4hg for the
tree, in which a sum goes up and down h times. So the tree is faster than direct where (2h-1) a + hS/B < 2 (n-1 - 2h) g,
that is for small tensors of at least 8 ranks that are near each other, or 13 where a = g. It is also faster than the
star for large tensors of more than 3 ranks, since its way down takes h S/B instead of (n-1) S/B. Up to 3 ranks it is
the star.

Shapes: x is any contiguous CPU tensor, of the same shape on all ranks.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from workers.transport.link import Link, Transfer, move


@dataclass(frozen=True, slots=True, kw_only=True)
class Peers:
    """The ranks of a collective, as one of them sees them; they are numbered from 0 in their group.

    Attributes:
        rank: the number of this rank.
        links: the links to all others, by rank.
        deadline_s: when the collective must be done, on the clock of :func:`time.monotonic`.
        alive: raises where a rank is known to be lost.
    """

    rank: int
    num_ranks: int
    links: Mapping[int, Link]
    deadline_s: float
    alive: Callable[[], None]

    def move(self, sends: Mapping[int, Tensor], receives: Mapping[int, Tensor]) -> None:
        """Sends and receives tensors at once, given by the rank that they go to or come from. Raises PeerFailed."""
        transfers = [
            Transfer(
                link=self.links[peer],
                send=payload(sends[peer]) if peer in sends else None,
                receive=payload(receives[peer]) if peer in receives else None,
            )
            for peer in dict.fromkeys((*sends, *receives))
        ]
        move(transfers, deadline_s=self.deadline_s, alive=self.alive)


AllReduce = Callable[[Peers, Tensor], None]
"""A function that sums a contiguous CPU tensor over all ranks, in place. It raises PeerFailed."""


def payload(x: Tensor) -> memoryview:
    """Returns the bytes of a contiguous CPU tensor as a view of its memory."""
    assert x.is_contiguous() and x.device.type == "cpu", (x.shape, x.stride(), x.device)
    view: memoryview = x.reshape(-1).view(torch.uint8).numpy().data
    return view


def add_in_order(parts: Sequence[Tensor], into: Tensor) -> None:
    """Adds ``parts`` from first to last in float32, and rounds once to the dtype of ``into``."""
    if len(parts) == 2:  # a sum of two is rounded once in any case
        torch.add(parts[0], parts[1], out=into)
        return
    total = parts[0].to(torch.float32, copy=True)
    for part in parts[1:]:
        total += part
    into.copy_(total)


def direct(peers: Peers, x: Tensor) -> None:
    """Sums ``x`` over all ranks, in place, with one latency and the most bytes."""
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


def scatter(peers: Peers, x: Tensor) -> None:
    """Sums ``x`` over all ranks, in place, by a reduce-scatter and an all-gather."""
    chunks = x.reshape(-1).tensor_split(peers.num_ranks)
    reduce_scatter(peers, chunks)
    all_gather(peers, chunks)


def reduce_scatter(peers: Peers, chunks: Sequence[Tensor]) -> None:
    """Sums over all ranks the chunk that has this rank's number, in place."""
    own = chunks[peers.rank]
    received = {peer: torch.empty_like(own) for peer in peers.links}
    peers.move({peer: chunks[peer] for peer in peers.links}, received)
    add_in_order([own if rank == peers.rank else received[rank] for rank in range(peers.num_ranks)], own)


def all_gather(peers: Peers, chunks: Sequence[Tensor]) -> None:
    """Sends this rank's chunk to all others, and receives each other rank's, in place."""
    peers.move(dict.fromkeys(peers.links, chunks[peers.rank]), {peer: chunks[peer] for peer in peers.links})


def tree(peers: Peers, x: Tensor) -> None:
    """Sums ``x`` over all ranks, in place, at the root of a binomial tree, whose ranks pass on the parts below them.

    The ranks below one are those that follow it, up to a power of two, in rank order.
    """
    parent, children = branches(peers.rank, peers.num_ranks)
    parts = x.new_empty(sum(map(len, children)) + 1, x.numel()) if children else x.reshape(1, -1)
    if children:
        parts[0] = x.reshape(-1)
        below = {ranks[0]: parts[ranks[0] - peers.rank : ranks[-1] + 1 - peers.rank] for ranks in children}
        peers.move({}, below)
    if parent is None:
        add_in_order(list(parts), x.view(-1))
    else:
        peers.move({parent: parts}, {})
        peers.move({}, {parent: x})
    if children:
        peers.move({ranks[0]: x for ranks in children}, {})


def branches(rank: int, num_ranks: int) -> tuple[int | None, list[range]]:
    """Returns the parent of a rank in a binomial tree, None at the root, and for each child the ranks from it down."""
    span = rank & -rank or num_ranks  # the lowest bit: how many ranks a complete tree has from this one on
    children = []
    width = 1
    while width < span and rank + width < num_ranks:
        children.append(range(rank + width, min(rank + 2 * width, num_ranks)))
        width *= 2
    return (rank & (rank - 1) if rank else None), children


def candidates(num_ranks: int) -> dict[str, AllReduce]:
    """Returns the algorithms that are worth measuring; a tree of up to three ranks is a star."""
    return {name: algorithm for name, algorithm in ALL_REDUCES.items() if name != "tree" or num_ranks > 3}


ALL_REDUCES: Mapping[str, AllReduce] = {
    "direct": direct,
    "scatter": scatter,
    "star": star,
    "tree": tree,
}
"""The algorithms by name, the simplest first."""

ORDER = "adding in rank order in float32 and rounding once"
"""How all of them add, which every rank must do alike."""


def gather(peers: Peers, x: Tensor, others: Mapping[int, Tensor]) -> None:
    """Collects the ranks' tensors at rank 0.

    Args:
        x: the tensor of this rank, which is sent unless it is empty or this is rank 0.
        others: at rank 0, memory for each other rank's tensor, by rank; ranks whose tensors are empty are left out.
    """
    if peers.rank == 0:
        peers.move({}, others)
    elif x.numel():
        peers.move({0: x}, {})


def broadcast(peers: Peers, x: Tensor) -> None:
    """Copies rank 0's ``x`` to all other ranks, in place."""
    if peers.rank:
        peers.move({}, {0: x})
    else:
        peers.move(dict.fromkeys(peers.links, x), {})
