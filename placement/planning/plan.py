"""The plan: who holds what. A plan holds replicas, a replica stages, a stage shards, one shard a rank."""

from dataclasses import dataclass

from placement.model.part import Part, Span
from placement.model.specs import DeviceSpec, DType, ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """What one rank holds, and where the rank runs.

    Attributes:
        rank: number within the replica, leader 0.
        node: name of the node it runs on.
        part: of the model.
        num_blocks: KV blocks it sets aside.
        weight_bytes: bytes of its weights, as loaded.
        kv_bytes: bytes of its KV blocks.
        workspace_bytes: the most that a step of it allocates.
    """

    rank: int
    node: str
    device: DeviceSpec
    part: Part
    num_blocks: int
    weight_bytes: int
    kv_bytes: int
    workspace_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A run of layers in the pipeline, computed by a group of ranks together."""

    layers: Span
    shards: tuple[Shard, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Replica:
    """One complete copy of the model."""

    name: str
    stages: tuple[Stage, ...]

    @property
    def shards(self) -> tuple[Shard, ...]:
        """All shards, in rank order."""
        return tuple(shard for stage in self.stages for shard in stage.shards)

    @property
    def leader(self) -> Shard:
        """The shard of rank 0."""
        return self.shards[0]

    @property
    def num_blocks(self) -> int:
        """KV blocks a sequence can use: the fewest that any rank holds."""
        return min(shard.num_blocks for shard in self.shards)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Who holds what."""

    model: ModelSpec
    dtype: DType
    block_size: int
    replicas: tuple[Replica, ...]
