"""Decides what the controller does: ``plan(state, observed) -> commands``, whatever happened before. Pure.

All ranks of a replica load together, once the last of them has started: they connect with each other first. Where
attention workers hold its keys and values those load before, so that they can be connected with. When one rank fails
the others are stopped: groups are rebuilt, not repaired; and a launch is whole or not at all.

The commands are all that is still to be done, so a command is planned again until its effect shows in the state or in
what is observed. An event that is lost costs nothing but the time until the next.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from orchestrator.controller.events import Command, FollowRank, LoadRank, Member, RankKey, Reserve, StartRank, StopRank
from orchestrator.controller.state import Phase, RankState, ReplicaState, State

_ENDING = (Phase.DRAINING, Phase.FAILED, Phase.STOPPED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """What there is of the deployment.

    Attributes:
        reserved: whether nodes hold the resources of its ranks.
        processes: the ranks that may have a process: a start was tried, and no stop has ended since.
        followed: the ranks whose process somebody waits for the end of.
    """

    reserved: bool = False
    processes: frozenset[RankKey] = frozenset()
    followed: frozenset[RankKey] = frozenset()


def plan(state: State, observed: Observed) -> tuple[Command, ...]:
    """Returns all commands whose effect is still missing; the same command may be under way already."""
    starts = tuple(_starts(state))
    if starts and not observed.reserved:
        shards = {(start.replica, start.shard.rank): start.shard for start in starts}
        return (*_stops(state, observed), Reserve(epoch=starts[0].epoch, shards=tuple(shards.items())))
    return (*_stops(state, observed), *starts, *_follows(state, observed), *_loads(state))


def _is_wanted(state: State, replica: ReplicaState) -> bool:
    return state.phase not in _ENDING and replica.phase not in _ENDING


def _starts(state: State) -> Iterator[StartRank]:
    for replica in state.groups:
        for rank in replica.ranks if _is_wanted(state, replica) else ():
            if rank.phase is Phase.STARTING:
                yield StartRank(replica=replica.name, epoch=replica.epoch, shard=rank.shard)


def _follows(state: State, observed: Observed) -> Iterator[FollowRank]:
    """A rank that is to be stopped needs nobody who follows it, as its stop says when it has ended."""
    for replica in state.groups:
        for rank in replica.ranks if _is_wanted(state, replica) else ():
            runs = rank.phase in (Phase.LOADING, Phase.READY)
            if runs and (replica.name, rank.shard.rank) not in observed.followed:
                yield FollowRank(replica=replica.name, epoch=replica.epoch, rank=rank.shard.rank)


def _loads(state: State) -> Iterator[LoadRank]:
    workers = state.attention
    for replica in state.groups:
        if replica.offloads and (workers is None or workers.phase is not Phase.READY):
            continue  # its ranks connect with them while they load
        if replica.phase is Phase.LOADING and _is_wanted(state, replica):
            members = tuple(_member(rank) for rank in replica.ranks)
            for rank in replica.ranks:
                if rank.phase is Phase.LOADING:
                    yield LoadRank(
                        replica=replica.name,
                        epoch=replica.epoch,
                        shard=rank.shard,
                        address=rank.address,
                        members=members,
                        attention=tuple(map(_member, workers.ranks)) if workers and replica.offloads else (),
                    )


def _member(rank: RankState) -> Member:
    return Member(address=rank.address, ranks_port=rank.ranks_port, shard=rank.shard)


def _stops(state: State, observed: Observed) -> Iterator[StopRank]:
    """A rank that has failed may still have a process, frozen or cut off; and one that was starting, a late one."""
    for replica in state.groups:
        wanted = _is_wanted(state, replica)
        for rank in replica.ranks:
            may_run = not rank.phase.ended or (replica.name, rank.shard.rank) in observed.processes
            if may_run and (rank.phase.ended or not wanted):
                yield StopRank(replica=replica.name, epoch=replica.epoch, rank=rank.shard.rank)
