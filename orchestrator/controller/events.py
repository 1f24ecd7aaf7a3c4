"""Owns the events that change the controller's state, and the commands that follow from the state."""

from dataclasses import dataclass

from placement.measured.measurements import NOTHING_MEASURED, StageMeasurements
from placement.planning.plan import Plan, Shard
from protos.codec.loading import Loading

# -- events: what happened ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """This plan is to run, and every replica begins at ``epoch``."""

    plan: Plan
    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RankEvent:
    """Something happened to one rank of one incarnation of a replica."""

    replica: str
    epoch: int
    rank: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RankStarted(RankEvent):
    """The rank's process listens; ``target`` is what its code is generated for."""

    node: str
    address: str
    ranks_port: int
    pid: int
    target: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankProgress(RankEvent):
    """The rank does this now, and has read this much of its weights.

    Attributes:
        loading: what it does.
        total_bytes: all that it has to read; 0 where it does not know yet.
    """

    loaded_bytes: int
    total_bytes: int = 0
    loading: Loading = Loading.WEIGHTS


@dataclass(frozen=True, slots=True, kw_only=True)
class RankLoaded(RankEvent):
    """The rank can run steps.

    Attributes:
        measured: what the ranks of its stage measured; told by the first of several ranks there.
    """

    measured: StageMeasurements = NOTHING_MEASURED


@dataclass(frozen=True, slots=True, kw_only=True)
class RankFailed(RankEvent):
    """The rank's process ended, froze, or could not start or load; ``cause`` is one line for the user."""

    cause: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RankStopped(RankEvent):
    """The rank's process ended because it was told to, or there is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shutdown:
    """Everything is to end; the gateway has drained."""


Event = Launch | RankStarted | RankProgress | RankLoaded | RankFailed | RankStopped | Shutdown


# -- commands: what to do -------------------------------------------------------------------------------------

RankKey = tuple[str, int]
"""Names a rank: (replica, rank)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reserve:
    """Reserve the nodes' resources for all of these shards together."""

    epoch: int
    shards: tuple[tuple[RankKey, Shard], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StartRank:
    """Start the worker process."""

    replica: str
    epoch: int
    shard: Shard

    @property
    def rank(self) -> int:
        """The rank that is to be started."""
        return self.shard.rank


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """The address at which a rank listens for the others of its replica, and the part that it holds."""

    address: str
    ranks_port: int
    shard: Shard


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadRank:
    """Have the worker at ``address`` load its shard.

    Attributes:
        members: all ranks of the replica, in their order.
        attention: the attention workers that hold its keys and values, in their order.
    """

    replica: str
    epoch: int
    shard: Shard
    address: str
    members: tuple[Member, ...] = ()
    attention: tuple[Member, ...] = ()

    @property
    def rank(self) -> int:
        """The rank that is to load."""
        return self.shard.rank


@dataclass(frozen=True, slots=True, kw_only=True)
class FollowRank:
    """Wait for the end of the worker process and say how it came."""

    replica: str
    epoch: int
    rank: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StopRank:
    """End the worker process, by force if it does not end by itself."""

    replica: str
    epoch: int
    rank: int


RankCommand = StartRank | FollowRank | LoadRank | StopRank
Command = Reserve | RankCommand
