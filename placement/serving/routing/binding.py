"""Decides which of the requests that wait are bound to a replica now, and why the others wait.

A request is bound when there is room where it should go, not when it arrives: until then it can go elsewhere, should
that become faster. Requests are looked at by priority, then in order of arrival, and each is counted where it should
go, bound or not. So what comes later neither takes the room of what came before, nor overtakes it at a replica that is
full.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

from placement.planning.limits import ReplicaLimits
from placement.serving.routing.choice import ReplicaLoad, Route
from placement.serving.routing.prompt import Prompt

_LOOKED_AT = 16
"""The most requests that wait and are looked at; those behind them are looked at once some of them are bound."""


class WaitReason(StrEnum):
    """Why a request waits."""

    NO_PLACE = "no_place"
    """As many sequences as a replica runs at once are there."""
    NO_BLOCKS = "no_blocks"
    """Too few KV blocks are free for its prompt."""
    PROMPTS = "prompts"
    """Prompts of about two steps wait there."""
    BEHIND = "behind"
    """Others that came before, or matter more, wait for the same replica."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """A request that waits.

    Attributes:
        number: counts the requests in order of their arrival.
        priority: the greater goes first.
    """

    number: int
    prompt: Prompt
    priority: int = 0

    @property
    def rank(self) -> tuple[int, int]:
        """Returns what requests are sorted by."""
        return -self.priority, self.number


@dataclass(frozen=True, slots=True, kw_only=True)
class Bindings:
    """A decision.

    Attributes:
        bound: by number, the requests that go to replicas now, in order.
        waits: by number, why the others wait.
    """

    bound: Mapping[int, Route] = field(default_factory=dict)
    waits: Mapping[int, WaitReason] = field(default_factory=dict)

    def counts(self) -> Counter[WaitReason]:
        """Counts the requests that wait, by reason."""
        return Counter(self.waits.values())


def bind(
    waiting: Sequence[Waiting],
    loads: Sequence[ReplicaLoad],
    limits: ReplicaLimits,
    choose: Callable[[Sequence[ReplicaLoad], Prompt], Route | None],
) -> Bindings:
    """Decides which requests are bound.

    Args:
        waiting: by rank.
        loads: of all replicas, with what was bound before.
        choose: returns where a prompt should go under the load that it is given.
    """
    by_name = {load.name: load for load in loads if load.accepting}
    bound: dict[int, Route] = {}
    waits: dict[int, WaitReason] = {}
    full: set[str] = set()
    for request in waiting:
        if len(waits) >= _LOOKED_AT or full >= by_name.keys():
            break
        if not any(load.num_sequences < limits.max_num_seqs for load in by_name.values()):
            break
        route = choose(list(by_name.values()), request.prompt)
        assert route is not None, "a replica accepts"
        reasons = {name: _why_not(by_name[name], route, request.prompt, limits) for name in _names(route)}
        for name, reason in reasons.items():
            if reason is not None or name in full:
                full.add(name)
                waits.setdefault(request.number, reason or WaitReason.BEHIND)
        if request.number not in waits:
            bound[request.number] = route
        for name in _names(route):
            by_name[name] = with_request(by_name[name], route, request.prompt, limits)
    has_place = any(load.num_sequences < limits.max_num_seqs for load in by_name.values())
    for request in waiting:
        if request.number not in bound:
            waits.setdefault(request.number, WaitReason.BEHIND if has_place else WaitReason.NO_PLACE)
    return Bindings(bound=bound, waits=waits)


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """Counts what a request brings to one of the replicas of its route.

    Attributes:
        num_tokens: tokens that are computed there before the first one of an answer.
        num_sequences: sequences that run there.
        num_blocks: KV blocks that are taken there at once, for keys and values that come from elsewhere.
    """

    num_tokens: int
    num_sequences: int
    num_blocks: int = 0


def share(load: ReplicaLoad, route: Route, prompt: Prompt, limits: ReplicaLimits) -> Share:
    """Returns what a request brings to a replica of its route."""
    if load.name == route.prefill:
        return Share(num_tokens=route.new_tokens, num_sequences=1)
    count = prompt.num_sequences
    if route.prefill is not None:
        size = load.block_size or limits.block_size
        return Share(num_tokens=count, num_sequences=count, num_blocks=-(-len(prompt.token_ids) // size))
    # As the replica's own report counts them: each sequence is pending with its whole prompt, shared or not.
    return Share(num_tokens=route.new_tokens + (count - 1) * len(prompt.token_ids), num_sequences=count)


def with_request(load: ReplicaLoad, route: Route, prompt: Prompt, limits: ReplicaLimits) -> ReplicaLoad:
    """Returns the load of a replica of the route with one request more."""
    part = share(load, route, prompt, limits)
    return replace(
        load,
        pending_tokens=load.pending_tokens + part.num_tokens,
        num_waiting=load.num_waiting + part.num_sequences,
        free_blocks=max(0, load.free_blocks - part.num_blocks),
    )


def _why_not(load: ReplicaLoad, route: Route, prompt: Prompt, limits: ReplicaLimits) -> WaitReason | None:
    """Says why a replica has no room for a request; an idle one has room for any."""
    if not load.num_sequences:
        return None
    part = share(load, route, prompt, limits)
    if load.num_sequences + part.num_sequences > limits.max_num_seqs:
        return WaitReason.NO_PLACE
    before, size = load.prompt_tokens, load.block_size or limits.block_size
    # Forks share the blocks of their prompt, and then need one each.
    needed = part.num_blocks or -(-route.new_tokens // size) + part.num_sequences
    if load.free_blocks - -(-before // size) < needed:
        return WaitReason.NO_BLOCKS
    budget = load.token_budget or limits.token_budget
    answers_only = load.name == route.replica and route.prefill is not None
    # A replica that has less than a step of prompts left gets one of any size, or it would pause between two long ones.
    if not answers_only and before > budget and before + part.num_tokens > 2 * budget:
        return WaitReason.PROMPTS
    return None


def _names(route: Route) -> tuple[str, ...]:
    return (route.replica,) if route.prefill is None else (route.replica, route.prefill)
