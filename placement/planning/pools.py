"""Describes pools: replicas for the same purpose, which may have sizes of their own."""

from dataclasses import dataclass, replace

from placement.model.specs import DType
from placement.planning.limits import ReplicaLimits
from placement.planning.plan import Role


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """Holds what the replicas of a pool have in common.

    Attributes:
        role: what they are for.
        block_size: tokens of their KV blocks; None: as many as everywhere.
        dtype: the number type that they compute in; None: that of everyone.
    """

    role: Role = Role.MIXED
    block_size: int | None = None
    dtype: DType | None = None

    def limits_of(self, everyone: ReplicaLimits) -> ReplicaLimits:
        """Returns the sizes of its replicas, given those of replicas in no pool."""
        return everyone if self.block_size is None else replace(everyone, block_size=self.block_size)

    @property
    def block_size_field(self) -> str:
        """Returns the key of the configuration that sets the size of its KV blocks."""
        return "serving.block_size" if self.block_size is None else f"serving.pools.{self.role.value}.block_size"


EVERYONE = Pool()
"""Replicas that are in no pool."""
