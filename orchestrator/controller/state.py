"""Owns what the controller knows and wants of a deployment: ``apply(state, event) -> state``. Pure.

What must be done follows from the state, whichever events led to it: see :mod:`orchestrator.controller.supervision`.

A replica is ready when all its ranks are. When one rank fails the replica fails with the cause of the rank that failed
first. A failure during the launch ends the launch; a failure later leaves the other replicas serving. Events of an
epoch that has passed, and of ranks that have ended, are ignored.
"""

from dataclasses import dataclass, replace
from enum import Enum

from orchestrator.controller.events import (
    Event,
    Launch,
    RankFailed,
    RankLoaded,
    RankProgress,
    RankStarted,
    RankStopped,
    Shutdown,
)
from placement.measured.measurements import NOTHING_MEASURED, StageMeasurements
from placement.model.specs import DType
from placement.planning.attention import GROUP
from placement.planning.plan import Role, Shard
from protos.codec.loading import Loading


class Phase(Enum):
    """How far a rank, a replica or the deployment is."""

    STARTING = "starting"
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"
    STOPPED = "stopped"

    @property
    def ended(self) -> bool:
        """Whether nothing runs any more."""
        return self in (Phase.FAILED, Phase.STOPPED)


@dataclass(frozen=True, slots=True, kw_only=True)
class RankState:
    """One worker process.

    Attributes:
        node: the node it runs on; empty until it has started, as are ``address``, ``ranks_port``, ``pid`` and
            ``target``, which is what its code is generated for.
        measured: what the ranks of its stage measured; of the first of several ranks there, once that is loaded.
        total_bytes: what it has to read, as it says itself; 0 until then.
        loading: what it does while it loads; None before and after.
        cause: why it failed.
    """

    shard: Shard
    phase: Phase = Phase.STARTING
    node: str = ""
    address: str = ""
    ranks_port: int = 0
    pid: int = 0
    target: str = ""
    loaded_bytes: int = 0
    total_bytes: int = 0
    loading: Loading | None = None
    measured: StageMeasurements = NOTHING_MEASURED
    cause: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaState:
    """One copy of the model.

    Attributes:
        role: what it is for.
        block_size: the tokens of its KV blocks.
        dtype: the number type that it computes in.
        cause: that of the rank that failed first.
        offloads: whether attention workers hold its keys and values, so that they load before it.
    """

    name: str
    epoch: int
    ranks: tuple[RankState, ...]
    block_size: int
    dtype: DType
    role: Role = Role.MIXED
    phase: Phase = Phase.STARTING
    cause: str = ""
    offloads: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """The deployment.

    Attributes:
        launched: whether all replicas have been ready at the same time.
        dtype: the number type of its plan; None before there is one.
        attention: the attention workers, a group like the ranks of a replica; None: there are none.
    """

    replicas: tuple[ReplicaState, ...] = ()
    phase: Phase = Phase.STARTING
    cause: str = ""
    launched: bool = False
    dtype: DType | None = None
    attention: ReplicaState | None = None

    @property
    def groups(self) -> tuple[ReplicaState, ...]:
        """Lists all groups of ranks: the attention workers, if there are any, and the replicas."""
        return self.replicas if self.attention is None else (self.attention, *self.replicas)

    def with_groups(self, groups: tuple[ReplicaState, ...]) -> "State":
        """Returns the state with other groups, in the same order."""
        if self.attention is None:
            return replace(self, replicas=groups)
        return replace(self, attention=groups[0], replicas=groups[1:])


def apply(state: State, event: Event) -> State:
    """Returns what becomes of the deployment."""
    match event:
        case Launch():
            return _launch(event)
        case Shutdown():
            return _shutdown(state)
        case _:
            return _rank_event(state, event)


def _launch(event: Launch) -> State:
    replicas = tuple(
        ReplicaState(
            name=replica.name,
            epoch=event.epoch,
            ranks=tuple(RankState(shard=shard) for shard in replica.shards),
            block_size=replica.limits.block_size,
            dtype=replica.dtype,
            role=replica.role,
            offloads=replica.residency is not None,
        )
        for replica in event.plan.replicas
    )
    return State(replicas=replicas, dtype=event.plan.dtype, attention=_attention(event))


def _attention(event: Launch) -> ReplicaState | None:
    shards = event.plan.attention
    if not shards:
        return None
    ranks = tuple(RankState(shard=shard) for shard in shards)
    return ReplicaState(name=GROUP, epoch=event.epoch, ranks=ranks, block_size=0, dtype=event.plan.dtype)


def _shutdown(state: State) -> State:
    groups = tuple(group if group.phase.ended else replace(group, phase=Phase.DRAINING) for group in state.groups)
    return replace(state.with_groups(groups), phase=Phase.STOPPED if _all_ended(state) else Phase.DRAINING)


def _all_ended(state: State) -> bool:
    return all(rank.phase.ended for group in state.groups for rank in group.ranks)


RankChange = RankStarted | RankProgress | RankLoaded | RankFailed | RankStopped


def _rank_event(state: State, event: RankChange) -> State:
    """Changes the rank, then lets its replica and the deployment follow."""
    found = [(i, r) for i, r in enumerate(state.groups) if (r.name, r.epoch) == (event.replica, event.epoch)]
    if not found:
        return state
    at, replica = found[0]
    before = next(rank for rank in replica.ranks if rank.shard.rank == event.rank)
    if before.phase.ended:
        return state
    after = _change(before, event)
    ranks = tuple(after if rank is before else rank for rank in replica.ranks)
    changed = _follow(replace(replica, ranks=ranks))
    groups = (*state.groups[:at], changed, *state.groups[at + 1 :])
    return _conclude(state.with_groups(groups))


def _change(rank: RankState, event: RankChange) -> RankState:
    match event:
        case RankStarted(node=node, address=address, ranks_port=port, pid=pid, target=target):
            return replace(
                rank, phase=Phase.LOADING, node=node, address=address, ranks_port=port, pid=pid, target=target
            )
        case RankProgress(loaded_bytes=loaded_bytes, total_bytes=total_bytes, loading=loading):
            return replace(rank, loaded_bytes=loaded_bytes, total_bytes=total_bytes, loading=loading)
        case RankLoaded(measured=measured):
            read = rank.shard.weight_bytes
            return replace(
                rank, phase=Phase.READY, loading=None, loaded_bytes=read, total_bytes=read, measured=measured
            )
        case RankFailed(cause=cause):
            return replace(rank, phase=Phase.FAILED, cause=cause)
        case RankStopped():
            return replace(rank, phase=Phase.STOPPED)


def _follow(replica: ReplicaState) -> ReplicaState:
    """Derives the replica's phase and cause from its ranks."""
    if replica.phase is Phase.FAILED:
        return replica
    phases = {rank.phase for rank in replica.ranks}
    for rank in replica.ranks:
        if rank.phase is Phase.FAILED:
            cause = f"{rank.shard.described(replica.name, rank.node)}: {rank.cause}"
            return replace(replica, phase=Phase.FAILED, cause=cause)
    if phases == {Phase.STOPPED}:
        return replace(replica, phase=Phase.STOPPED)
    if replica.phase is Phase.DRAINING:
        return replica
    if phases == {Phase.READY}:
        return replace(replica, phase=Phase.READY)
    return replace(replica, phase=Phase.STARTING if Phase.STARTING in phases else Phase.LOADING)


def _conclude(state: State) -> State:
    """Derives the deployment's phase and cause from its replicas."""
    phases = [replica.phase for replica in state.replicas]
    cause = state.cause or next((group.cause for group in state.groups if group.cause), "")
    if state.phase is Phase.DRAINING:
        return replace(state, phase=Phase.STOPPED if _all_ended(state) else Phase.DRAINING, cause=cause)
    if not state.launched:
        phases = [group.phase for group in state.groups]
        if Phase.FAILED in phases:  # a launch is whole or not at all
            return replace(state, phase=Phase.FAILED, cause=cause)
        if all(phase is Phase.READY for phase in phases):
            return replace(state, phase=Phase.READY, launched=True)
        return replace(state, phase=Phase.LOADING if Phase.STARTING not in phases else Phase.STARTING)
    serving = any(phase is Phase.READY for phase in phases)
    return replace(state, phase=Phase.READY if serving else Phase.FAILED, cause=cause)
