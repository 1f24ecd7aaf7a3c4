"""Decides how many KV blocks each replica has: as many as a setting gives, or as the memory that is left does."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from placement.planning.fitting import Blocks, Placed, Room
from placement.planning.memory import num_blocks_for, num_blocks_of
from placement.planning.plan import KvSizedBy

CPU_SHARE, GPU_SHARE = 0.5, 0.9
"""The share of the memory that weights, workspace and process leave free that becomes KV blocks, where no size is set.

The memory of a CPU is also that of the page cache and of all other programs of its machine."""
UNKNOWN_MEMORY_KV_BYTES = 256 * 2**20
"""The most bytes of KV blocks on a device whose memory is not known, where no size is set."""
SHORT_SEQUENCE_TOKENS = 2048
"""The tokens that KV blocks hold at least, where no size and no context is set, and the model has as many."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """The ranks of all replicas, the memory that limits them, and how large their KV cache shall be.

    Attributes:
        kv_cache_bytes: the size that is set for the rank with the largest blocks; None: none is.
        asked_tokens: the context that is asked for; None: none is.
        model_tokens: the context that the model was made for.
    """

    replicas: tuple[tuple[Placed, ...], ...]
    rooms: tuple[Room, ...]
    kv_cache_bytes: int | None
    max_num_seqs: int
    asked_tokens: int | None
    model_tokens: int

    @property
    def least_tokens(self) -> int:
        """Counts the tokens that the KV blocks of a replica must hold."""
        if self.asked_tokens is not None:
            return self.asked_tokens
        return 1 if self.kv_cache_bytes is not None else min(SHORT_SEQUENCE_TOKENS, self.model_tokens)

    @property
    def block_sizes(self) -> list[int]:
        """Returns for each replica the tokens of a block."""
        return [ranks[0].block_size for ranks in self.replicas]

    def holding(self, num_tokens: int) -> Blocks:
        """Returns the blocks with which each replica holds so many tokens of a sequence."""
        return [num_blocks_of(num_tokens, block_size=size) for size in self.block_sizes]

    def held_tokens(self, blocks: Blocks) -> int:
        """Counts the tokens that every replica holds with so many blocks."""
        return min(num_blocks * size for num_blocks, size in zip(blocks, self.block_sizes, strict=True))

    @property
    def least(self) -> Blocks:
        """Returns the fewest blocks that each replica can have."""
        return self.holding(self.least_tokens)

    @property
    def most(self) -> Blocks:
        """Returns the blocks of each replica that all its sequences can use at once."""
        return [self.max_num_seqs * num_blocks for num_blocks in self.holding(self.asked_tokens or self.model_tokens)]

    @property
    def largest_block_bytes(self) -> list[int]:
        """Returns for each replica the bytes of a block on the rank where it takes most; 0: others hold its blocks."""
        return [max(rank.block_bytes for rank in ranks) for ranks in self.replicas]

    @property
    def least_setting(self) -> int:
        """Returns the smallest ``serving.kv_cache`` with which every replica has the blocks that it must have."""
        return max(fewest * size for fewest, size in zip(self.least, self.largest_block_bytes, strict=True))

    def blocks_of(self, kv_cache_bytes: int) -> Blocks:
        """Returns the blocks of each replica where ``serving.kv_cache`` is set so."""
        return [
            num_blocks_for(kv_cache_bytes, bytes_per_block=size) if size else most
            for size, most in zip(self.largest_block_bytes, self.most, strict=True)
        ]


def auto_blocks(demand: Demand) -> list[tuple[int, KvSizedBy]]:
    """Returns the blocks of each replica where no size is set, and what decided their number.

    All ranks of a replica have as many, so the one with the least memory for its share of a block decides. The ranks of
    one node hold as many tokens each as their common memory gives. Nobody has more than all sequences together can use,
    or less than one needs, for which there must be room.
    """
    limits: list[list[tuple[int, KvSizedBy]]] = [[(most, "sequences")] for most in demand.most]
    for room in demand.rooms:
        for rank, num_blocks in zip(room.ranks, _blocks_in(room), strict=True):
            if rank.block_bytes:
                limits[rank.replica].append((num_blocks, "memory"))
    for ranks in demand.replicas:
        for rank in ranks:
            if rank.block_bytes and rank.device.memory_bytes is None:
                limits[rank.replica].append((UNKNOWN_MEMORY_KV_BYTES // rank.block_bytes, "unknown memory"))
    fewest = [min(of_replica, key=lambda limit: limit[0]) for of_replica in limits]
    return [
        (max(num_blocks, least), sized_by) for (num_blocks, sized_by), least in zip(fewest, demand.least, strict=True)
    ]


def _blocks_in(room: Room) -> list[int]:
    """Counts the blocks that each rank of a room gets of its stated share, so that all hold as many tokens."""
    span = math.lcm(*(rank.block_size for rank in room.ranks))
    span_bytes = sum(rank.block_bytes * (span // rank.block_size) for rank in room.ranks)
    left = room.memory_bytes - sum(rank.fixed.total_bytes for rank in room.ranks)
    share = CPU_SHARE if room.ranks[0].device.kind == "cpu" else GPU_SHARE
    kv_bytes = int(max(0, left) * share)
    return [kv_bytes * span // (rank.block_size * span_bytes) if span_bytes else 0 for rank in room.ranks]


def most_setting(demand: Demand, among: Sequence[Room], at_most: int) -> int | None:
    """Returns the largest ``serving.kv_cache``, up to ``at_most``, that fits; None where not even the least does."""
    low, high = demand.least_setting, max(at_most, demand.least_setting)
    if any(room.lacking(demand.blocks_of(low)) for room in among):
        return None
    while low < high:
        middle = (low + high + 1) // 2
        if any(room.lacking(demand.blocks_of(middle)) for room in among):
            high = middle - 1
        else:
            low = middle
    return low
