"""Keeps who holds which KV blocks. A block is free once its last hold is released.

Sequences, steps that execute and transfers between replicas are all owners of holds, so that no block is given away
while anybody may read or write it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

from placement.serving.kv.blocks import BlockPool


@dataclass(frozen=True, slots=True)
class SequenceOwner:
    """An owner: a sequence that computes or reads the keys and values in the blocks."""

    sequence_id: int


@dataclass(frozen=True, slots=True)
class StepOwner:
    """An owner: a step that executes and touches the blocks of a sequence that has ended."""

    step: int


@dataclass(frozen=True, slots=True)
class TransferOwner:
    """An owner: a transfer of a sequence's keys and values to or from another replica."""

    sequence_id: int


Owner = SequenceOwner | StepOwner | TransferOwner


@dataclass(slots=True, eq=False, kw_only=True)
class Hold:
    """A claim on blocks, by which an owner keeps them from being free.

    Attributes:
        hold_id: names the hold in events and commands; no other hold ever has it.
        blocks: the blocks in the order of tokens; the list only grows.
    """

    hold_id: int
    owner: Owner
    blocks: list[int]


class Holds:
    """Keeps all holds on the blocks of a pool."""

    def __init__(self, pool: BlockPool) -> None:
        self.pool = pool
        self._holds: dict[int, Hold] = {}
        self._ids = count(1)

    def take(self, owner: Owner, num_blocks: int, *, found: Sequence[int] = ()) -> Hold:
        """Holds the blocks ``found``, which are in use or cached, and then ``num_blocks`` new ones.

        Raises:
            OutOfBlocks: fewer blocks are free; then nothing is held.
        """
        self.pool.share(found)
        try:
            taken = self.pool.allocate(num_blocks, after=found[-1] if found else None)
        except BaseException:
            self.pool.release(found)
            raise
        return self._add(owner, [*found, *taken])

    def share(self, blocks: Sequence[int], owner: Owner) -> Hold:
        """Holds blocks that are in use or cached, for one more owner."""
        self.pool.share(blocks)
        return self._add(owner, list(blocks))

    def grow(self, hold: Hold, num_blocks: int) -> None:
        """Adds new blocks at the end of a hold, right behind its last one where they are free. Raises OutOfBlocks."""
        hold.blocks += self.pool.allocate(num_blocks, after=hold.blocks[-1])

    def pass_on(self, hold: Hold, owner: Owner) -> None:
        """Makes ``owner`` the new owner of a hold."""
        assert hold.hold_id in self._holds, hold
        hold.owner = owner

    def release(self, hold: Hold, *, retain: bool) -> None:
        """Ends a hold. Blocks that nobody else holds are free, or cached where ``retain`` and they have a name."""
        del self._holds[hold.hold_id]
        self.pool.release(hold.blocks, retain=retain)

    def of(self, kind: type[Owner]) -> list[Hold]:
        """Returns the holds whose owners are of one kind, oldest first."""
        return [hold for hold in self._holds.values() if isinstance(hold.owner, kind)]

    def check(self) -> None:
        """Asserts that every block has as many references as holds."""
        self.pool.check([hold.blocks for hold in self._holds.values()])

    def _add(self, owner: Owner, blocks: list[int]) -> Hold:
        hold = Hold(hold_id=next(self._ids), owner=owner, blocks=blocks)
        self._holds[hold.hold_id] = hold
        return hold
