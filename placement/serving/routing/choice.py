"""Chooses the replica that serves a request, from the live load and the measured speed of all replicas."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from placement.planning.limits import ReplicaLimits
from placement.planning.plan import Role
from placement.serving.routing.speed import ReplicaSpeed

# Without any measurement all replicas are taken to be equally fast, so that the fewest pending tokens decide.
_ASSUMED = ReplicaSpeed.expected(prefill_tokens_per_s=1000.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaLoad:
    """The load that a replica's leader last reported.

    Attributes:
        accepting: whether the replica is ready, and not draining.
        pending_tokens: tokens still to be computed for what waits and runs there.
        token_budget: the most tokens of its steps; 0 where it has not said so, and it is that of the limits.
        role: what it is for.
        block_size: tokens of its KV blocks; 0 where that is the one of the limits.
        num_moving: sequences that hold blocks and run in no step, as their keys and values are on the way.
    """

    name: str
    accepting: bool
    pending_tokens: int
    num_running: int
    num_waiting: int
    free_blocks: int
    total_blocks: int
    token_budget: int = 0
    role: Role = Role.MIXED
    block_size: int = 0
    num_moving: int = 0

    @property
    def num_sequences(self) -> int:
        """Counts the sequences that are there, in whatever phase."""
        return self.num_running + self.num_waiting + self.num_moving

    @property
    def prompt_tokens(self) -> int:
        """Counts the pending tokens of prompts: each running sequence has one more, which belongs to its answer."""
        return max(0, self.pending_tokens - self.num_running)


class RouteKind(StrEnum):
    """Kinds of routes, as they are counted."""

    ALONE = "alone"
    """One replica serves the whole request."""
    SPLIT = "split"
    """One replica computes the prompt, another the answer."""
    SPILLED = "spilled"
    """As those for a phase are too busy, a mixed replica helps with it."""
    PULLED = "pulled"
    """As mixed replicas are too busy as well, one that is for the other phase helps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """A decision: which replicas serve a request, and why.

    Attributes:
        replica: the replica that computes the answer.
        prefill: the one that computes the prompt for it; None: it computes the prompt itself.
        new_tokens: tokens of the prompt that are expected to be computed, rather than found in a cache.
    """

    replica: str
    reason: str
    prefill: str | None = None
    kind: RouteKind = RouteKind.ALONE
    new_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A replica as it would serve a prompt.

    Attributes:
        speed: its measured speed, or the one that it is taken to have.
        is_measured: whether the speed is its own.
        new_tokens: tokens of the prompt that it has no keys and values of.
        first_token_s: seconds until the first token of the answer.
    """

    load: ReplicaLoad
    speed: ReplicaSpeed
    is_measured: bool
    new_tokens: int
    cached_tokens: int
    first_token_s: float


def shortest_queue(
    loads: Iterable[ReplicaLoad],
    prompt_tokens: int,
    *,
    limits: ReplicaLimits,
    speeds: Mapping[str, ReplicaSpeed],
    cached_tokens: Mapping[str, int],
) -> Route | None:
    """Chooses the replica that gives the first token soonest: the shortest queue, in seconds (Splitwise, Patel et al.
    2024, compares queues in tokens, among equal machines).

    A replica whose speed is unknown is taken to be as fast as the fastest that is known, so that it is tried and
    measured. Ties go to the replica with most free blocks, then to the first by name, so that the choice is
    reproducible.

    Args:
        prompt_tokens: how many tokens the request's prompt has.
        limits: the sizes that all replicas serve within.
        speeds: by replica; those that are not in it, or not known, are assumed.
        cached_tokens: by replica, how many leading tokens of the prompt it has keys and values of; 0 where it is not in
            it.

    Returns:
        the route, or None where no replica accepts requests.
    """
    found = candidates(loads, prompt_tokens, limits=limits, speeds=speeds, cached_tokens=cached_tokens)
    return route_alone(found, limits) if found else None


def candidates(
    loads: Iterable[ReplicaLoad],
    prompt_tokens: int,
    *,
    limits: ReplicaLimits,
    speeds: Mapping[str, ReplicaSpeed],
    cached_tokens: Mapping[str, int],
) -> list[Candidate]:
    """Returns the replicas that accept requests, the one first that gives the first token soonest.

    The arguments are those of ``shortest_queue``.
    """
    accepting = [load for load in loads if load.accepting]
    known = {load.name: speeds[load.name] for load in accepting if load.name in speeds and speeds[load.name].is_known}
    fastest = min(known.values(), key=lambda it: _alone_s(it, prompt_tokens, limits.token_budget), default=_ASSUMED)
    found = [
        _candidate(load, prompt_tokens, limits, known.get(load.name), fastest, cached_tokens.get(load.name, 0))
        for load in accepting
    ]
    return sorted(found, key=lambda it: (it.first_token_s, -it.load.free_blocks, it.load.name))


def route_alone(ranked: Sequence[Candidate], limits: ReplicaLimits, kind: RouteKind = RouteKind.ALONE) -> Route:
    """Returns the route to the first of the candidates, which are in order."""
    best = ranked[0]
    return Route(replica=best.load.name, reason=_reason(ranked, limits), kind=kind, new_tokens=best.new_tokens)


def first_token_s(load: ReplicaLoad, speed: ReplicaSpeed, new_tokens: int, limits: ReplicaLimits) -> float:
    """Returns the seconds until the first token of a prompt of which a replica has to compute ``new_tokens``.

    Prompts that came before are computed first, in steps that also compute the decodes of what runs. Where there is
    neither a place nor memory for one sequence more, some of what runs has to end first.
    """
    before = load.prompt_tokens
    budget = load.token_budget or limits.token_budget
    queue_s = speed.prefill_s(before + new_tokens, num_decodes=load.num_running, token_budget=budget)
    own_s = speed.prefill_s(new_tokens, num_decodes=load.num_running, token_budget=budget)
    places_s = speed.place_s(places_short(load, new_tokens, limits), num_running=load.num_running)
    return running_step_s(load, speed) + max(queue_s, places_s + own_s)


def running_step_s(load: ReplicaLoad, speed: ReplicaSpeed) -> float:
    """Returns the seconds of the step that runs when a sequence comes."""
    return speed.decode.at(load.num_running) if load.num_running else 0.0


def places_short(load: ReplicaLoad, new_tokens: int, limits: ReplicaLimits) -> int:
    """Counts the sequences that must end before a new one can run, which needs blocks for ``new_tokens``."""
    short = load.num_sequences + 1 - limits.max_num_seqs
    if load.free_blocks * (load.block_size or limits.block_size) < new_tokens:
        short = max(short, load.num_waiting + 1)
    return max(0, min(short, load.num_sequences))


def _candidate(
    load: ReplicaLoad,
    prompt_tokens: int,
    limits: ReplicaLimits,
    own_speed: ReplicaSpeed | None,
    fastest: ReplicaSpeed,
    cached_tokens: int,
) -> Candidate:
    cached = max(0, min(cached_tokens, prompt_tokens - 1))  # the last token is always computed
    speed = fastest if own_speed is None else own_speed
    return Candidate(
        load=load,
        speed=speed,
        is_measured=own_speed is not None,
        new_tokens=prompt_tokens - cached,
        cached_tokens=cached,
        first_token_s=first_token_s(load, speed, prompt_tokens - cached, limits),
    )


def _reason(ranked: Sequence[Candidate], limits: ReplicaLimits) -> str:
    """Says in a sentence why the first of the candidates, which are in order, was chosen."""
    best = ranked[0]
    words = (
        f"the first token is expected from {best.load.name} in {best.first_token_s:.3g} s: "
        f"{best.load.pending_tokens} pending and {best.new_tokens} new tokens"
        f"{f', {best.cached_tokens} more in its cache' if best.cached_tokens else ''}, at "
        f"{'' if best.is_measured else 'an assumed '}{tokens_per_s(best, limits):.3g} tokens/s, "
        f"{best.load.num_running} sequences running, {best.load.free_blocks} of {best.load.total_blocks} blocks free"
    )
    if len(ranked) == 1:
        return f"{words}; it is the only replica that accepts requests"
    second = ranked[1]
    return f"{words}; next of {len(ranked)} is {second.load.name} in {second.first_token_s:.3g} s"


def tokens_per_s(candidate: Candidate, limits: ReplicaLimits) -> float:
    """Returns how many tokens of the prompt it computes in a second."""
    budget = candidate.load.token_budget or limits.token_budget
    return candidate.new_tokens / max(1e-9, _alone_s(candidate.speed, candidate.new_tokens, budget))


def _alone_s(speed: ReplicaSpeed, num_tokens: int, token_budget: int) -> float:
    """Returns the seconds that a prompt takes where nothing else runs."""
    return speed.prefill_s(num_tokens, num_decodes=0, token_budget=token_budget)
