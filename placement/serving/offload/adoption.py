"""Decides which blocks of attention workers can be used again by the next incarnation of a replica. Pure."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from placement.model.part import Span
from placement.planning.residency import Residency
from placement.serving.offload.orders import Names


@dataclass(frozen=True, slots=True, kw_only=True)
class Adoption:
    """Holds what a replica may use again.

    Attributes:
        names: the blocks that can be used again, by the hash of their text.
        stale: blocks of which a worker has a name that does not count: it is to forget that.
    """

    names: Names
    stale: tuple[int, ...]


def agree(residency: Residency, held: Mapping[int, Names]) -> Adoption:
    """Returns the blocks of which all holders have the same text.

    Args:
        held: for each attention worker, the names of the blocks that it kept for the one model rank of the replica. A
            worker that is missing has nothing.
    """
    names: dict[int, bytes] = {}
    for region in residency.regions:
        if region.is_local:
            continue
        first, *others = [held.get(holder.worker, {}) for holder in region.holders]
        for block, name in first.items():
            if region.blocks.start <= block < region.blocks.stop and all(other.get(block) == name for other in others):
                names[block] = name
    named = {block for of_worker in held.values() for block in of_worker}
    return Adoption(names=names, stale=tuple(sorted(named - names.keys())))


def emptiest(kept: Collection[int], num_blocks: int, count: int) -> Span:
    """Returns the first of those runs of ``count`` blocks, or of all if there are fewer, in which the fewest are kept.

    Args:
        num_blocks: all blocks, whose numbers ``kept`` has.
    """
    count = min(count, num_blocks)
    before = [0]  # the kept blocks before each block
    for block in range(num_blocks):
        before.append(before[-1] + (block in kept))
    start = min(range(num_blocks - count + 1), key=lambda first: before[first + count] - before[first])
    return Span(start, start + count)
