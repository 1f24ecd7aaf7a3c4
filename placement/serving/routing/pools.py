"""Decides which replicas compute prompts, and which answers, as the load of their pools changes.

Replicas that are for prompts, or for answers, are pools of their own (Splitwise, Patel et al. 2024). While those of a
phase are too busy, mixed replicas help with it. While these are too busy as well, one replica of the other pool is
pulled: it works as a mixed one, until the pressure is over. What it has by then it finishes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from placement.planning.plan import Role

PHASES = (Role.PREFILL, Role.DECODE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Thresholds:
    """Says when a phase has too few replicas, in seconds that its work queues for. They ascend, so that nobody swings.

    Attributes:
        home_s: below it, the helpers go home.
        spill_s: above it, mixed replicas help.
        pull_s: above it, although mixed replicas help, one of the other pool is pulled.
    """

    home_s: float = 0.25
    spill_s: float = 1.0
    pull_s: float = 3.0

    def __post_init__(self) -> None:
        assert 0.0 < self.home_s < self.spill_s < self.pull_s, self


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A replica that accepts requests, and how long work of each phase would queue there.

    Attributes:
        role: what it is for, pulled or not.
        prompt_s: seconds until it began with a prompt.
        answer_s: seconds until it had a place for an answer.
    """

    name: str
    role: Role
    prompt_s: float = 0.0
    answer_s: float = 0.0

    def queue_s(self, phase: Role) -> float:
        """Returns how long work of that phase would queue."""
        return self.prompt_s if phase is Role.PREFILL else self.answer_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Pools:
    """Holds what was decided of the pools.

    Attributes:
        spilled: the phases that mixed replicas help with.
        pulled: the replicas that work as mixed ones, although they are for one phase.
    """

    spilled: frozenset[Role] = frozenset()
    pulled: frozenset[str] = frozenset()

    def works_as(self, name: str, role: Role) -> Role:
        """Returns what a replica works as."""
        return Role.MIXED if name in self.pulled else role

    def serving(self, phase: Role, members: Sequence[tuple[str, Role]]) -> list[str]:
        """Returns the names of those that serve a phase: all, where none is for it or mixed."""
        roles = [(name, self.works_as(name, role)) for name, role in members]
        own = [name for name, role in roles if role is phase]
        mixed = [name for name, role in roles if role is Role.MIXED]
        if own and phase not in self.spilled:
            # Those that were pulled help whatever the threshold of mixed ones says.
            return own + [name for name in mixed if name in self.pulled and dict(members)[name] is not phase]
        return own + mixed or [name for name, _ in members]

    def answering(self, members: Sequence[tuple[str, Role]]) -> list[str]:
        """Returns the names of those that may serve a whole request: all, where each is for prompts."""
        return [name for name, role in members if self.works_as(name, role) is not Role.PREFILL] or [
            name for name, _ in members
        ]


def balanced(pools: Pools, members: Sequence[Member], thresholds: Thresholds) -> Pools:
    """Returns what is decided of the pools once more; of each phase at most one replica is pulled, or sent home."""
    pools = replace(pools, pulled=pools.pulled & {member.name for member in members})
    for phase in PHASES:
        pools = _balanced(pools, members, phase, thresholds)
    return pools


def _balanced(pools: Pools, members: Sequence[Member], phase: Role, thresholds: Thresholds) -> Pools:
    other = Role.DECODE if phase is Role.PREFILL else Role.PREFILL
    own = [it for it in members if it.role is phase and it.name not in pools.pulled]
    mixed = [it for it in members if it.role is Role.MIXED]
    helpers = [it for it in members if it.role is other and it.name in pools.pulled]
    if not any(it.role is not Role.MIXED for it in members):
        return Pools()
    own_s, most_s = _least_s(own, phase), _least_s([*own, *mixed], phase)
    spilled = pools.spilled
    if own_s > thresholds.spill_s:
        spilled |= {phase}
    elif own_s < thresholds.home_s:
        spilled -= {phase}
    pulled = pools.pulled
    if helpers and most_s < thresholds.home_s:
        pulled -= {min(helpers, key=lambda it: (it.queue_s(phase), it.name)).name}
    elif min(most_s, _least_s(helpers, phase)) > thresholds.pull_s:
        idle = [it for it in members if it.role is other and it.name not in pulled]
        if idle and _least_s(idle, other) < thresholds.spill_s:
            pulled |= {min(idle, key=lambda it: (it.queue_s(other), it.name)).name}
    return Pools(spilled=spilled, pulled=pulled)


def _least_s(members: Sequence[Member], phase: Role) -> float:
    return min((member.queue_s(phase) for member in members), default=float("inf"))
