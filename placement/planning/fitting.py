"""Says which ranks share which memory: a rank may have a limit of its own, and those on a CPU share their node's."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from placement.model.part import Part
from placement.model.specs import DeviceSpec, NodeSpec
from placement.planning.memory import Footprint, format_bytes

EACH_WORKER = "each worker"
"""Names all workers, where :func:`worker_name` names one."""

Blocks = Sequence[int]
"""The number of KV blocks of each replica."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """A rank on its device, and the memory that it takes there.

    Attributes:
        node, device: the machine and its device that the rank is placed on.
        replica: the place of its replica among all replicas.
        part: the part of the model that it holds.
        fixed: the bytes that it needs without KV blocks.
        block_size: the tokens of one KV block.
        block_bytes: the bytes of one KV block; 0 where attention workers hold those of the replica.
        num_own_blocks: the KV blocks that it holds then, with their bytes in ``fixed``; None: all of the replica's.
    """

    node: NodeSpec
    device: DeviceSpec
    replica: int
    part: Part
    fixed: Footprint
    block_size: int
    block_bytes: int
    num_own_blocks: int | None = None

    def need(self, blocks: Blocks) -> Footprint:
        """Returns the bytes that it needs, where replicas have so many blocks."""
        kv_bytes = self.fixed.kv_bytes + blocks[self.replica] * self.block_bytes
        return replace(self.fixed, kv_bytes=kv_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """Memory that is known, and the ranks that it must hold.

    Attributes:
        name: what people call it.
        node: the node that it belongs to; None: it is the memory of one worker alone.
    """

    name: str
    node: str | None
    memory_bytes: int
    ranks: tuple[Placed, ...]

    def needs(self, blocks: Blocks) -> list[Footprint]:
        """Returns the bytes that each rank needs."""
        return [rank.need(blocks) for rank in self.ranks]

    def lacking(self, blocks: Blocks) -> int:
        """Counts the bytes that are missing; 0 where everything fits."""
        return max(0, sum(need.total_bytes for need in self.needs(blocks)) - self.memory_bytes)

    def describe(self, blocks: Blocks, purpose: str = "") -> str:
        """Says in a clause what is needed here, for which purpose, and what there is."""
        return f"{_needed(self.needs(blocks), purpose)}, and {self.name} has {format_bytes(self.memory_bytes)}"


def worker_name(node: NodeSpec, device: DeviceSpec) -> str:
    """Returns what people call the worker on a device: its name, since workers of one node may share the CPU."""
    return f"worker {device.worker}" if device.worker else f"{device.name} of node {node.name}"


def rooms(ranks: Sequence[Placed]) -> tuple[Room, ...]:
    """Lists the memory that limits these ranks, as far as it is known, that of single workers first."""
    return (*_of_workers(ranks), *_of_nodes([rank for rank in ranks if rank.device.kind == "cpu"]))


def _of_workers(ranks: Sequence[Placed]) -> Iterator[Room]:
    for rank in ranks:
        own = rank.device.memory_bytes
        # A CPU with the memory of its node has no limit of its own.
        if own is not None and (rank.device.kind == "cuda" or own != rank.node.memory_bytes):
            yield Room(name=worker_name(rank.node, rank.device), node=None, memory_bytes=own, ranks=(rank,))


def _of_nodes(on_cpu: Sequence[Placed]) -> Iterator[Room]:
    for node in {rank.node.name: rank.node for rank in on_cpu}.values():
        if node.memory_bytes is not None:
            neighbours = tuple(rank for rank in on_cpu if rank.node.name == node.name)
            yield Room(name=f"node {node.name}", node=node.name, memory_bytes=node.memory_bytes, ranks=neighbours)


def first_lacking(among: Sequence[Room], blocks: Blocks) -> Room | None:
    """Returns the first memory that does not hold its ranks; None where all do."""
    return next((room for room in among if room.lacking(blocks)), None)


def _needed(needs: Sequence[Footprint], purpose: str) -> str:
    total = format_bytes(sum(need.total_bytes for need in needs))
    if len(needs) == 1:
        return f"1 worker needs {total}{purpose} ({needs[0]})"
    largest = max(needs, key=lambda need: need.total_bytes)
    shape = f"{largest}, each" if all(need == largest for need in needs) else f"the largest: {largest}"
    return f"{len(needs)} workers need {total}{purpose} ({shape})"
