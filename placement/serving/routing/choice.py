"""Chooses the replica that serves a request, from the live load and the measured speed of all replicas."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from placement.planning.limits import ReplicaLimits
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
    """

    name: str
    accepting: bool
    pending_tokens: int
    num_running: int
    num_waiting: int
    free_blocks: int
    total_blocks: int
    token_budget: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """A decision: which replica serves a request, and why."""

    replica: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Candidate:
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
    accepting = [load for load in loads if load.accepting]
    known = {load.name: speeds[load.name] for load in accepting if load.name in speeds and speeds[load.name].is_known}
    fastest = min(known.values(), key=lambda it: _alone_s(it, prompt_tokens, limits.token_budget), default=_ASSUMED)
    candidates = [
        _candidate(load, prompt_tokens, limits, known.get(load.name), fastest, cached_tokens.get(load.name, 0))
        for load in accepting
    ]
    candidates.sort(key=lambda it: (it.first_token_s, -it.load.free_blocks, it.load.name))
    if not candidates:
        return None
    return Route(replica=candidates[0].load.name, reason=_reason(candidates, limits))


def first_token_s(load: ReplicaLoad, speed: ReplicaSpeed, new_tokens: int, limits: ReplicaLimits) -> float:
    """Returns the seconds until the first token of a prompt of which a replica has to compute ``new_tokens``.

    Prompts that came before are computed first, in steps that also compute the decodes of what runs. Where there is
    neither a place nor memory for one sequence more, some of what runs has to end first.
    """
    # Each running sequence has a token to be computed that belongs to its answer.
    before = max(0, load.pending_tokens - load.num_running)
    budget = load.token_budget or limits.token_budget
    queue_s = speed.prefill_s(before + new_tokens, num_decodes=load.num_running, token_budget=budget)
    own_s = speed.prefill_s(new_tokens, num_decodes=load.num_running, token_budget=budget)
    places_s = speed.place_s(_places_short(load, new_tokens, limits), num_running=load.num_running)
    running_step_s = speed.decode.at(load.num_running) if load.num_running else 0.0
    return running_step_s + max(queue_s, places_s + own_s)


def _places_short(load: ReplicaLoad, new_tokens: int, limits: ReplicaLimits) -> int:
    """Counts the sequences that must end before a new one can run."""
    short = load.num_running + load.num_waiting + 1 - limits.max_num_seqs
    if load.free_blocks * limits.block_size < new_tokens:
        short = max(short, load.num_waiting + 1)
    return max(0, min(short, load.num_running + load.num_waiting))


def _candidate(
    load: ReplicaLoad,
    prompt_tokens: int,
    limits: ReplicaLimits,
    own_speed: ReplicaSpeed | None,
    fastest: ReplicaSpeed,
    cached_tokens: int,
) -> _Candidate:
    cached = max(0, min(cached_tokens, prompt_tokens - 1))  # the last token is always computed
    speed = fastest if own_speed is None else own_speed
    return _Candidate(
        load=load,
        speed=speed,
        is_measured=own_speed is not None,
        new_tokens=prompt_tokens - cached,
        cached_tokens=cached,
        first_token_s=first_token_s(load, speed, prompt_tokens - cached, limits),
    )


def _reason(candidates: list[_Candidate], limits: ReplicaLimits) -> str:
    """Says in a sentence why the first of the candidates, which are in order, was chosen."""
    best = candidates[0]
    tokens_per_s = best.new_tokens / max(
        1e-9, _alone_s(best.speed, best.new_tokens, best.load.token_budget or limits.token_budget)
    )
    words = (
        f"the first token is expected from {best.load.name} in {best.first_token_s:.3g} s: "
        f"{best.load.pending_tokens} pending and {best.new_tokens} new tokens"
        f"{f', {best.cached_tokens} more in its cache' if best.cached_tokens else ''}, at "
        f"{'' if best.is_measured else 'an assumed '}{tokens_per_s:.3g} tokens/s, "
        f"{best.load.num_running} sequences running, {best.load.free_blocks} of {best.load.total_blocks} blocks free"
    )
    if len(candidates) == 1:
        return f"{words}; it is the only replica that accepts requests"
    second = candidates[1]
    return f"{words}; next of {len(candidates)} is {second.load.name} in {second.first_token_s:.3g} s"


def _alone_s(speed: ReplicaSpeed, num_tokens: int, token_budget: int) -> float:
    """Returns the seconds that a prompt takes where nothing else runs."""
    return speed.prefill_s(num_tokens, num_decodes=0, token_budget=token_budget)
