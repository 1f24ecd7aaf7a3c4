"""Owns the part of the cluster YAML that says which workers compute what: ``serving.pools``."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal, Protocol

from pydantic import ConfigDict, Field

from orchestrator.config.parallelism import ReplicaConfig
from orchestrator.config.types import STRICT, WorkerName
from placement.model.specs import DType
from placement.planning.plan import Role
from placement.planning.pools import EVERYONE, Pool


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolConfig:
    """Workers whose replicas have the same purpose. workers, node_labels or both select them."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    workers: Annotated[tuple[WorkerName, ...], Field(max_length=1024)] = ()
    """Names of workers; the name of a worker with a count stands for all of them."""
    node_labels: Mapping[str, str] = field(default_factory=dict)
    """Selects the workers whose own node_labels have all of these."""
    block_size: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Tokens of one KV block of its replicas. Default: serving.block_size."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Number type of weights, activations and KV of its replicas. Default: that of model.dtype."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolsConfig:
    """Which workers are for prompts, and which for answers. All others are for both."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    prefill: PoolConfig | None = None
    """The workers that are for prompts."""
    decode: PoolConfig | None = None
    """The workers that are for answers, to prompts that others computed."""

    @property
    def each(self) -> Iterator[tuple[Role, PoolConfig]]:
        """Yields the pools that there are, and what each is for."""
        for role, pool in ((Role.PREFILL, self.prefill), (Role.DECODE, self.decode)):
            if pool is not None:
                yield role, pool


class Selects(Protocol):
    """Selects workers by their names, by labels of their nodes, or both."""

    @property
    def workers(self) -> tuple[str, ...]: ...
    @property
    def node_labels(self) -> Mapping[str, str]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedWorker:
    """A worker as pools select it.

    Attributes:
        name: its own name, such as ``fast-0``.
        entry: the name of its entry in the file, such as ``fast``; None where that has none.
        labels: the labels that its node must have.
    """

    name: str
    entry: str | None
    labels: Mapping[str, str]


def members(pool: Selects, workers: Sequence[NamedWorker]) -> list[str]:
    """Returns the names of the workers that a pool selects, in their order."""
    named = frozenset(pool.workers)
    return [
        worker.name for worker in workers if worker.name in named or worker.entry in named or has_labels(pool, worker)
    ]


def has_labels(pool: Selects, worker: NamedWorker) -> bool:
    """Tells whether a pool selects a worker by its labels."""
    return bool(pool.node_labels) and pool.node_labels.items() <= worker.labels.items()


def pool_of_each(pools: PoolsConfig | None, workers: Sequence[NamedWorker]) -> dict[str, Pool]:
    """Returns the pool of each worker by its name, in the order of workers."""
    found = {worker.name: EVERYONE for worker in workers}
    for role, pool in () if pools is None else pools.each:
        own = Pool(role=role, block_size=pool.block_size, dtype=None if pool.dtype is None else DType(pool.dtype))
        found |= dict.fromkeys(members(pool, workers), own)
    return found


def replica_pool(replica: ReplicaConfig, pool_of: Mapping[str, Pool]) -> Pool:
    """Returns the pool of a replica: that of its workers, or what its role says where they are in none."""
    pool = pool_of[replica.stages[0].workers[0]]
    return pool if replica.role is None or pool is not EVERYONE else Pool(role=Role(replica.role))
