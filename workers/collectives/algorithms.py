"""Ways to sum a tensor over ranks, each the best for some size and link.

With n ranks that are all connected with each other by links of latency a, and S bytes, of which a rank sends and
receives B per second:

    direct   everyone sends all to everyone                  a + (n-1) S/B         two ranks: the pairwise exchange
    scatter  everyone sums a part, and sends it to all       2a + 2 (n-1)/n S/B
    star     to rank 0, which sends the sum to all           2a + 2 (n-1) S/B      the fewest bytes on a shared medium
    tree     the same along a binomial tree, h = log2 n up   2ha + (n-1 + h) S/B   the fewest messages of any one rank

(Thakur, Rabenseifner and Gropp 2005; Li et al. 2025, TPI-LLM, for slow links.) All add in the order of ranks, in
float32, and round once: every rank ends with the same bits, and they are the same whichever way is taken, so that a
sum's size, and with it who else is in a batch, changes nobody's bits. Rings would change them, and trees that add on
the way: they add in other orders, and round at every hop. So a rank of this tree hands on the parts that reach it as
they are, n-1 of them in all to rank 0, as many as to that of a star.

By these terms direct is always faster than the tree. But a message also costs the rank that sends it and the one that
receives it some time g each, of their only thread: direct 2 (n-1) g, scatter twice that, star 2 (n-1) g at rank 0, the
tree 4hg, as a sum goes up and down h times. So the tree is faster than direct where (2h-1) a + hS/B < 2 (n-1 - 2h) g:
small sums of many ranks that are near each other, 8 of them at least, or 13 where a = g. It is faster than the star for
large sums too, of more than 3 ranks: h S/B on the way down, not (n-1) S/B. For up to 3 it is the star.

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


AllReduce = Callable[[Peers, Tensor], None]
"""Sums a contiguous CPU tensor over all ranks, in place. Raises PeerFailed."""


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


def scatter(peers: Peers, x: Tensor) -> None:
    """Sums ``x`` over all ranks, in place: every rank sums a part of it, then gives that to all others."""
    parts = x.reshape(-1).tensor_split(peers.num_ranks)
    reduce_scatter(peers, parts)
    all_gather(peers, parts)


def reduce_scatter(peers: Peers, parts: Sequence[Tensor]) -> None:
    """Sums, in place, the one of ``parts`` that is this rank's."""
    mine = parts[peers.rank]
    came = {peer: torch.empty_like(mine) for peer in peers.links}
    peers.move({peer: parts[peer] for peer in peers.links}, came)
    add_in_order([mine if rank == peers.rank else came[rank] for rank in range(peers.num_ranks)], mine)


def all_gather(peers: Peers, parts: Sequence[Tensor]) -> None:
    """Everyone has each rank's own of ``parts`` afterwards."""
    peers.move(dict.fromkeys(peers.links, parts[peers.rank]), {peer: parts[peer] for peer in peers.links})


def tree(peers: Peers, x: Tensor) -> None:
    """Sums ``x`` over all ranks, in place, at the root of a binomial tree, whose ranks hand on what is below them.

    Below a rank are those after it up to a power of two, in their order.
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
    """The parent of a rank in a binomial tree, None at the root, and all ranks below it, by its children."""
    span = rank & -rank or num_ranks  # the lowest bit: how many ranks there are from this one on, in a whole tree
    children = []
    width = 1
    while width < span and rank + width < num_ranks:
        children.append(range(rank + width, min(rank + 2 * width, num_ranks)))
        width *= 2
    return (rank & (rank - 1) if rank else None), children


def ways(num_ranks: int) -> dict[str, AllReduce]:
    """Those worth measuring: a tree of up to three ranks is a star."""
    return {name: way for name, way in ALL_REDUCES.items() if name != "tree" or num_ranks > 3}


ALL_REDUCES: Mapping[str, AllReduce] = {
    "direct": direct,
    "scatter": scatter,
    "star": star,
    "tree": tree,
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
