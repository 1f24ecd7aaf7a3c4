"""What the controller's state machine takes, events, and what it gives, commands."""

from dataclasses import dataclass

from placement.measured.measurements import NOTHING_MEASURED, StageMeasurements
from placement.planning.plan import Plan, Shard

# -- events: what happened ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """Run this plan. Every replica begins at ``epoch``."""

    plan: Plan
    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RankEvent:
    """Something about one rank of one incarnation of a replica."""

    replica: str
    epoch: int
    rank: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RankStarted(RankEvent):
    """The process listens."""

    node: str
    address: str
    ranks_port: int
    pid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RankProgress(RankEvent):
    """Weights were read."""

    loaded_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RankLoaded(RankEvent):
    """The rank can run steps. ``measured``: of its stage, by the first rank of several there."""

    measured: StageMeasurements = NOTHING_MEASURED


@dataclass(frozen=True, slots=True, kw_only=True)
class RankFailed(RankEvent):
    """The process ended, froze, or could not start or load. ``cause`` is one line for the user."""

    cause: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RankStopped(RankEvent):
    """The process ended because we asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shutdown:
    """Stop everything; the gateway has drained."""


Event = Launch | RankStarted | RankProgress | RankLoaded | RankFailed | RankStopped | Shutdown


# -- commands: what to do -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class StartRank:
    """Start the worker process."""

    replica: str
    epoch: int
    shard: Shard


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A rank of a replica of several, as the others are told of it: where it listens for them, and what it holds."""

    address: str
    ranks_port: int
    shard: Shard


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadRank:
    """Have the worker at ``address`` load its shard.

    Attributes:
        members: all ranks of the replica, in their order; none where it has one alone.
    """

    replica: str
    epoch: int
    shard: Shard
    address: str
    members: tuple[Member, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class StopRank:
    """End the worker process, by force if it does not end by itself."""

    replica: str
    epoch: int
    rank: int


Command = StartRank | LoadRank | StopRank
