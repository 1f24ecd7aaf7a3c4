"""The controller's decisions: ``apply(state, event) -> state, commands``. Pure; the actor around it acts.

All ranks of a replica load together, and it is ready when all are. When one rank fails the replica fails with that
rank's cause, the first one, and its other ranks are stopped: groups are rebuilt, not repaired. A failure during the
launch ends the launch; a failure later leaves the other replicas serving. Events of an epoch that has passed are
ignored.
"""

from dataclasses import dataclass, replace
from enum import Enum

from orchestrator.controller.events import (
    Command,
    Event,
    Launch,
    LoadRank,
    Member,
    RankFailed,
    RankLoaded,
    RankProgress,
    RankStarted,
    RankStopped,
    Shutdown,
    StartRank,
    StopRank,
)
from placement.measured.measurements import NOTHING_MEASURED, StageMeasurements
from placement.planning.plan import Shard


class Phase(Enum):
    """Where a rank, a replica or the deployment stands."""

    STARTING = "starting"
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"
    STOPPED = "stopped"

    @property
    def ended(self) -> bool:
        """Nothing runs any more."""
        return self in (Phase.FAILED, Phase.STOPPED)


@dataclass(frozen=True, slots=True, kw_only=True)
class RankState:
    """One worker process. What its stage ``measured`` is known of the first rank there, once that is loaded."""

    shard: Shard
    phase: Phase = Phase.STARTING
    node: str = ""
    address: str = ""
    ranks_port: int = 0
    pid: int = 0
    loaded_bytes: int = 0
    measured: StageMeasurements = NOTHING_MEASURED
    cause: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaState:
    """One copy of the model. ``cause`` is that of the rank that failed first."""

    name: str
    epoch: int
    ranks: tuple[RankState, ...]
    phase: Phase = Phase.STARTING
    cause: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """The deployment. ``launched`` is set once every replica has been ready together."""

    replicas: tuple[ReplicaState, ...] = ()
    phase: Phase = Phase.STARTING
    cause: str = ""
    launched: bool = False


def apply(state: State, event: Event) -> tuple[State, tuple[Command, ...]]:
    """What becomes of the deployment, and what to do about it."""
    match event:
        case Launch():
            return _launch(event)
        case Shutdown():
            return _shutdown(state)
        case _:
            return _rank_event(state, event)


def _launch(event: Launch) -> tuple[State, tuple[Command, ...]]:
    replicas = tuple(
        ReplicaState(
            name=replica.name,
            epoch=event.epoch,
            ranks=tuple(RankState(shard=shard) for shard in replica.shards),
        )
        for replica in event.plan.replicas
    )
    commands = tuple(
        StartRank(replica=replica.name, epoch=event.epoch, shard=rank.shard)
        for replica in replicas
        for rank in replica.ranks
    )
    return State(replicas=replicas), commands


def _shutdown(state: State) -> tuple[State, tuple[Command, ...]]:
    commands = tuple(stop for replica in state.replicas for stop in _stops(replica))
    replicas = tuple(
        replica if replica.phase.ended else replace(replica, phase=Phase.DRAINING) for replica in state.replicas
    )
    phase = Phase.DRAINING if commands else Phase.STOPPED
    return replace(state, replicas=replicas, phase=phase), commands


def _rank_event(
    state: State, event: RankStarted | RankProgress | RankLoaded | RankFailed | RankStopped
) -> tuple[State, tuple[Command, ...]]:
    """Change the rank, then let replica and deployment follow."""
    found = [(i, r) for i, r in enumerate(state.replicas) if (r.name, r.epoch) == (event.replica, event.epoch)]
    if not found:
        return state, ()
    at, replica = found[0]
    before = next(rank for rank in replica.ranks if rank.shard.rank == event.rank)
    if before.phase.ended:
        return state, ()
    after, commands = _change(before, event)
    ranks = tuple(after if rank is before else rank for rank in replica.ranks)
    changed = _follow(replace(replica, ranks=ranks))
    if isinstance(event, RankStarted) and changed.phase is Phase.LOADING:
        commands += _loads(changed)
    if changed.phase is Phase.FAILED and replica.phase is not Phase.FAILED:
        commands += _stops(changed)
    replicas = (*state.replicas[:at], changed, *state.replicas[at + 1 :])
    return _conclude(replace(state, replicas=replicas), commands)


def _change(
    rank: RankState, event: RankStarted | RankProgress | RankLoaded | RankFailed | RankStopped
) -> tuple[RankState, tuple[Command, ...]]:
    match event:
        case RankStarted(node=node, address=address, ranks_port=port, pid=pid):
            return replace(rank, phase=Phase.LOADING, node=node, address=address, ranks_port=port, pid=pid), ()
        case RankProgress(loaded_bytes=loaded_bytes):
            return replace(rank, loaded_bytes=loaded_bytes), ()
        case RankLoaded(measured=measured):
            return replace(rank, phase=Phase.READY, loaded_bytes=rank.shard.weight_bytes, measured=measured), ()
        case RankFailed(cause=cause):
            # The process may still be there, frozen or cut off: make sure that it is not.
            stop = StopRank(replica=event.replica, epoch=event.epoch, rank=event.rank)
            return replace(rank, phase=Phase.FAILED, cause=cause), (stop,)
        case RankStopped():
            return replace(rank, phase=Phase.STOPPED), ()


def _follow(replica: ReplicaState) -> ReplicaState:
    """The replica's phase and cause, from its ranks."""
    if replica.phase is Phase.FAILED:
        return replica
    phases = {rank.phase for rank in replica.ranks}
    for rank in replica.ranks:
        if rank.phase is Phase.FAILED:
            where = rank.node or rank.shard.node
            cause = f"rank {rank.shard.rank} of {replica.name} on {where}: {rank.cause}"
            return replace(replica, phase=Phase.FAILED, cause=cause)
    if phases == {Phase.STOPPED}:
        return replace(replica, phase=Phase.STOPPED)
    if replica.phase is Phase.DRAINING:
        return replica
    if phases == {Phase.READY}:
        return replace(replica, phase=Phase.READY)
    return replace(replica, phase=Phase.STARTING if Phase.STARTING in phases else Phase.LOADING)


def _loads(replica: ReplicaState) -> tuple[Command, ...]:
    """All ranks load at the same time, once the last has started: they connect with each other first."""
    members = tuple(Member(address=r.address, ranks_port=r.ranks_port, shard=r.shard) for r in replica.ranks)
    return tuple(
        LoadRank(
            replica=replica.name,
            epoch=replica.epoch,
            shard=rank.shard,
            address=rank.address,
            members=members if len(members) > 1 else (),
        )
        for rank in replica.ranks
    )


def _stops(replica: ReplicaState) -> tuple[Command, ...]:
    return tuple(
        StopRank(replica=replica.name, epoch=replica.epoch, rank=rank.shard.rank)
        for rank in replica.ranks
        if not rank.phase.ended
    )


def _conclude(state: State, commands: tuple[Command, ...]) -> tuple[State, tuple[Command, ...]]:
    """The deployment's phase and cause, from its replicas."""
    phases = [replica.phase for replica in state.replicas]
    cause = state.cause or next((replica.cause for replica in state.replicas if replica.cause), "")
    if state.phase is Phase.DRAINING:
        ended = all(rank.phase.ended for replica in state.replicas for rank in replica.ranks)
        return replace(state, phase=Phase.STOPPED if ended else Phase.DRAINING, cause=cause), commands
    if not state.launched:
        if Phase.FAILED in phases:
            # A launch is whole or not at all: the rest is stopped, and the first cause is the answer.
            rest = tuple(stop for replica in state.replicas for stop in _stops(replica) if stop not in commands)
            return replace(state, phase=Phase.FAILED, cause=cause), commands + rest
        if all(phase is Phase.READY for phase in phases):
            return replace(state, phase=Phase.READY, launched=True), commands
        loading = Phase.LOADING if Phase.STARTING not in phases else Phase.STARTING
        return replace(state, phase=loading), commands
    serving = any(phase is Phase.READY for phase in phases)
    return replace(state, phase=Phase.READY if serving else Phase.FAILED, cause=cause), commands
