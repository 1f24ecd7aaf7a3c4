"""Says where the keys and values of a replica's blocks are: at its own ranks, or at attention workers.

A replica counts its KV blocks from 0, wherever they are. Each region of them has its holders: none where the replica's
own ranks hold it, and otherwise the attention workers that divide it by KV heads, or by slots of every block. Regions
also divide requests: where each attention worker has a region of its own, a sequence is kept in one of them (Lamina,
Chen et al. 2024). A sequence may have blocks in several regions: its attention is then merged from parts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from placement.model.part import Span
from placement.model.striping import Stripe
from placement.planning.splitting import Dimension, deal, spans


class Partition(Enum):
    """How attention is divided among attention workers."""

    KV_HEADS = "kv_heads"
    """Every worker has some KV heads of all sequences."""
    REQUESTS = "requests"
    """Every worker has all heads of some sequences."""
    TOKEN_RANGES = "token_ranges"
    """Every worker has some slots of each block of all sequences; answers are merged by log-sum-exp."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """Describes what an attention worker holds of a region's blocks.

    Attributes:
        worker: the index of the attention worker in its replica.
        kv_heads: KV heads of the model; not empty.
        stripe: the slots of each block that it holds; None: all.
    """

    worker: int
    kv_heads: Span
    stripe: Stripe | None = None

    def slots_per_block(self, block_size: int) -> int:
        """Counts the slots of a block that it holds."""
        return block_size if self.stripe is None else self.stripe.width


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """A range of a replica's KV blocks, and who holds it: the replica's own ranks where there are no holders."""

    blocks: Span
    holders: tuple[Holder, ...] = ()

    @property
    def is_local(self) -> bool:
        """Tells whether the replica's own ranks hold the keys and values."""
        return not self.holders


@dataclass(frozen=True, slots=True, kw_only=True)
class Residency:
    """Holds the regions of all KV blocks, in order and without gaps; only the first may be local."""

    regions: tuple[Region, ...]

    def __post_init__(self) -> None:
        first = 0
        for region in self.regions:
            assert region.blocks.start == first and len(region.blocks), self
            first = region.blocks.stop
        assert self.regions and not any(region.is_local for region in self.regions[1:]), self

    @property
    def num_blocks(self) -> int:
        """Counts all KV blocks."""
        return self.regions[-1].blocks.stop

    @property
    def num_local_blocks(self) -> int:
        """Counts the blocks that the replica's own ranks hold, which are the first ones."""
        return len(self.regions[0].blocks) if self.regions[0].is_local else 0

    @property
    def workers(self) -> tuple[int, ...]:
        """Lists the attention workers that hold something, in ascending order."""
        return tuple(sorted({holder.worker for region in self.regions for holder in region.holders}))


def everything_local(num_blocks: int) -> Residency:
    """Returns the residency of a replica without attention workers."""
    return Residency(regions=(Region(blocks=Span(0, num_blocks)),))


def resident(
    partition: Partition,
    weights: Sequence[float],
    *,
    num_kv_heads: int,
    block_size: int,
    num_local_blocks: int,
    num_remote_blocks: Sequence[int],
) -> Residency:
    """Divides KV blocks among attention workers.

    Args:
        weights: how fast each worker attends, in any unit; a worker that gets nothing by it holds nothing.
        num_local_blocks: blocks that the replica's own ranks hold.
        num_remote_blocks: for each worker, how many blocks of what it holds fit into its memory. Workers that divide
            each block have as many blocks as the one with the fewest.
    """
    regions = [Region(blocks=Span(0, num_local_blocks))] if num_local_blocks else []
    first = num_local_blocks
    if partition is Partition.REQUESTS:
        for worker, (weight, count) in enumerate(zip(weights, num_remote_blocks, strict=True)):
            if weight and count:
                holder = Holder(worker=worker, kv_heads=Span(0, num_kv_heads))
                regions.append(Region(blocks=Span(first, first + count), holders=(holder,)))
                first += count
        return Residency(regions=tuple(regions))
    holders = _divided(partition, weights, num_kv_heads=num_kv_heads, block_size=block_size)
    count = min(num_remote_blocks[holder.worker] for holder in holders)
    if count:
        regions.append(Region(blocks=Span(first, first + count), holders=holders))
    return Residency(regions=tuple(regions))


def head_spans(num_kv_heads: int, weights: Sequence[float]) -> tuple[Span, ...]:
    """Returns the KV heads of each worker by its weight, empty for some where there are many workers."""
    return spans(Dimension(name="KV heads", size=num_kv_heads), deal(num_kv_heads, weights))


def slot_spans(block_size: int, weights: Sequence[float]) -> tuple[Span, ...]:
    """Returns the slots of a block that each worker holds by its weight, likewise."""
    return spans(Dimension(name="slots of a block", size=block_size), deal(block_size, weights))


def _divided(
    partition: Partition, weights: Sequence[float], *, num_kv_heads: int, block_size: int
) -> tuple[Holder, ...]:
    """Returns the holders that have a part of each block."""
    if partition is Partition.KV_HEADS:
        heads = head_spans(num_kv_heads, weights)
        return tuple(Holder(worker=worker, kv_heads=own) for worker, own in enumerate(heads) if own)
    whole = Span(0, num_kv_heads)
    return tuple(
        Holder(worker=worker, kv_heads=whole, stripe=Stripe(own.start, own.stop, block_size))
        for worker, own in enumerate(slot_spans(block_size, weights))
        if own
    )
