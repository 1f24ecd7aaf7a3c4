"""Describes who holds what: a plan has replicas, a replica has stages, and a stage has shards, one for each rank."""

from dataclasses import dataclass
from enum import Enum
from typing import Literal

from placement.model.part import Part, Span
from placement.model.specs import DeviceSpec, DType, ModelSpec
from placement.planning.limits import ReplicaLimits
from placement.planning.residency import Residency

KvSizedBy = Literal["setting", "memory", "unknown memory", "sequences", "attention workers"]
"""Says what the number of KV blocks follows from: ``serving.kv_cache``; the memory that is left; the size that stands
in for memory that is not known; the most that sequences can use; or what attention workers hold."""


class Role(Enum):
    """Says what a replica is for."""

    MIXED = "mixed"
    """It computes prompts and answers."""
    PREFILL = "prefill"
    """It computes prompts, whose answers other replicas compute."""
    DECODE = "decode"
    """It computes answers to prompts that other replicas compute."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """Describes what one rank holds, and where the rank runs.

    Attributes:
        rank: the number of the rank within its replica; the leader is 0.
        node: the name of the node that it runs on.
        device: the device that it computes on.
        part: the part of the model that it holds.
        num_blocks: KV blocks that it allocates.
        weight_bytes: bytes of its weights, as loaded.
        kv_bytes: bytes of its KV blocks.
        workspace_bytes: the most bytes that a step allocates.
    """

    rank: int
    node: str
    device: DeviceSpec
    part: Part
    num_blocks: int
    weight_bytes: int
    kv_bytes: int
    workspace_bytes: int

    def described(self, replica: str, node: str = "") -> str:
        """Names the rank of ``replica`` for people, with its worker and the node that it runs on, or is planned for."""
        worker = f"worker {self.device.worker} " if self.device.worker else ""
        return f"rank {self.rank} of {replica} ({worker}on {node or self.node})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A run of layers in the pipeline, computed by a group of ranks together."""

    layers: Span
    shards: tuple[Shard, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Replica:
    """One complete copy of the model.

    Attributes:
        limits: the sizes that it serves within.
        dtype: the number type of its weights, activations, keys and values.
        role: what it is for.
        kv_sized_by: what decided its number of KV blocks.
        residency: where its KV blocks are, where attention workers hold some; None: its own ranks hold all.
    """

    name: str
    stages: tuple[Stage, ...]
    limits: ReplicaLimits
    dtype: DType
    role: Role = Role.MIXED
    kv_sized_by: KvSizedBy = "setting"
    residency: Residency | None = None

    @property
    def shards(self) -> tuple[Shard, ...]:
        """Lists all shards in the order of ranks."""
        return tuple(shard for stage in self.stages for shard in stage.shards)

    @property
    def leader(self) -> Shard:
        """Returns the shard of rank 0. Routing between prefill and decode replicas needs it."""
        return self.shards[0]

    @property
    def num_kv_tokens(self) -> int:
        """Counts the tokens that the KV blocks hold."""
        return self.num_blocks * self.limits.block_size

    @property
    def num_blocks(self) -> int:
        """Counts the KV blocks that sequences can use: the fewest that any rank holds, or those of all regions."""
        if self.residency is not None:
            return self.residency.num_blocks
        return min(shard.num_blocks for shard in self.shards)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All replicas of a deployment, and the model that they serve.

    Attributes:
        dtype: the number type of replicas that have none of their own.
        attention: the attention workers, which replicas share. They have no part of the model, and their KV bytes are
            what they hold of all replicas.
    """

    model: ModelSpec
    dtype: DType
    replicas: tuple[Replica, ...]
    attention: tuple[Shard, ...] = ()

    @property
    def has_roles(self) -> bool:
        """Whether some replicas compute prompts or answers only."""
        return any(replica.role is not Role.MIXED for replica in self.replicas)
