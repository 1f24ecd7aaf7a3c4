"""Decides whether one replica computes a prompt and another its answer, and which (Splitwise, Patel et al. 2024).

What is compared is when a request is complete, and by how much its prompt holds the answers up that run where it is
computed. Queues, computation and transfers are all in seconds.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from placement.planning.limits import ReplicaLimits
from placement.planning.plan import Role
from placement.serving.routing.choice import (
    Candidate,
    Route,
    RouteKind,
    first_token_s,
    places_short,
    route_alone,
    running_step_s,
    tokens_per_s,
)
from placement.serving.routing.links import LinkSpeed
from placement.serving.routing.pools import Pools

CLEAR_GAIN = 0.2
"""The share of the seconds until the first token that another way than the usual one must save."""
_LEAST_GAIN_S = 0.02
"""What it must save at the least: what steps are expected to take is not known more closely."""
_NO_LINK = LinkSpeed()


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Holds what the cost of a request depends on, beside the replicas.

    Attributes:
        kv_bytes_per_token: bytes of the keys and values of a token; 0: not known, so that only those are a pair that
            are meant to be.
        answer_tokens: tokens that its answer is expected to have.
        links: by the replica that sends and the one that receives.
        decode_s: seconds that a token of an answer is taken to need where that was not measured.
    """

    prompt_tokens: int
    limits: ReplicaLimits
    kv_bytes_per_token: int
    answer_tokens: float
    links: Mapping[tuple[str, str], LinkSpeed]
    decode_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """A way to serve a request.

    Attributes:
        prefill: who computes the prompt; None: the one that answers.
        first_s: seconds until the first token.
        answer_s: seconds from then to the last one.
        harm_s: seconds by which running answers are held up, all together.
        num_bytes: bytes of keys and values that are sent.
        exposed_s: seconds by which they delay the first token.
    """

    replica: Candidate
    prefill: Candidate | None = None
    first_s: float
    answer_s: float
    harm_s: float
    num_bytes: int = 0
    exposed_s: float = 0.0

    @property
    def cost_s(self) -> float:
        """Returns what is compared."""
        return self.own_s + self.harm_s

    @property
    def own_s(self) -> float:
        """Returns the seconds until the request is complete."""
        return self.first_s + self.answer_s

    @property
    def order(self) -> tuple[float, int, str, str]:
        """Returns what options are sorted by, so that the choice is reproducible."""
        prefill = "" if self.prefill is None else self.prefill.load.name
        return self.cost_s, -self.replica.load.free_blocks, self.replica.load.name, prefill


def choose(ranked: Sequence[Candidate], pools: Pools, costs: Costs, *, always: bool) -> Route:
    """Chooses who serves a request that may be split: the pair together, or one replica alone.

    Those that are for a phase serve it, unless another way is clearly better. Where all replicas are mixed, the usual
    way is one replica alone.

    Args:
        ranked: the replicas that accept requests, by the time of the first token; at least one.
        always: whether it is split wherever there are two replicas.
    """
    members = [(it.load.name, it.load.role) for it in ranked]
    prompts, answers = (set(pools.serving(phase, members)) for phase in (Role.PREFILL, Role.DECODE))
    first, last = ([it for it in ranked if it.load.name in names] for names in (prompts, answers))
    pairs = [split_option(p, d, costs) for p in first for d in last if p is not d]
    if always:
        pairs = pairs or [split_option(p, d, costs) for p in ranked for d in ranked if p is not d]
        if not pairs:
            return route_alone(ranked, costs.limits)
        return _split_route(min(pairs, key=lambda it: it.order), None, pools, costs)
    home = [it for it in ranked if it.load.name in prompts & answers]
    away = [it for it in ranked if it.load.name not in prompts & answers]
    usual, unusual = _by_role(pairs, pools)
    options = [*([alone_option(home[0], costs)] if home else []), *usual]
    known = [it for it in unusual if costs.kv_bytes_per_token and _is_measured(it)]
    others = [*([alone_option(away[0], costs)] if away else []), *known]
    best = min(options or others, key=lambda it: it.order)
    other = min(others, key=lambda it: it.order, default=best)
    # Alone, a request goes where its first token comes soonest; a pair has to be better than every such way.
    rivals = [best, *(alone_option(it, costs) for it in home)] if other.prefill is not None else [best]
    if all(_is_clearly_better(other, rival) for rival in rivals):
        best = other
    if best.prefill is not None:
        return _split_route(best, _soonest_alone([*options, *others]), pools, costs)
    group = home if best.replica in home else away
    return route_alone(group, costs.limits, _alone_kind(best.replica, pools))


def _is_clearly_better(other: Option, usual: Option) -> bool:
    """Tells whether another way is worth it.

    A request is split among replicas that are not meant for it only where it is itself complete sooner: done for the
    sake of others alone, it costs everybody more than it saves, as the next prompt harms those that it has joined.
    """
    if other.prefill is not None and usual.own_s - other.own_s <= max(_LEAST_GAIN_S, CLEAR_GAIN * usual.first_s):
        return False
    return usual.cost_s - other.cost_s > max(_LEAST_GAIN_S, CLEAR_GAIN * (usual.first_s + usual.harm_s))


def alone_option(replica: Candidate, costs: Costs) -> Option:
    """Returns what it costs where one replica computes everything."""
    return Option(
        replica=replica,
        first_s=replica.first_token_s,
        answer_s=_answer_s(replica, costs),
        harm_s=harm_s(replica, replica.new_tokens, costs.limits),
    )


def split_option(prefill: Candidate, replica: Candidate, costs: Costs) -> Option:
    """Returns what it costs where ``prefill`` computes the prompt and ``replica`` its last token and the answer.

    ``prefill`` computes what is not in its own cache, whatever the other has: later tokens attend to earlier ones. What
    the other has is not sent. A transfer that fails costs the time until then, and the prompt is computed twice.

    ``replica`` takes blocks for the whole prompt before it asks for it: of the time until it has them, only what waits
    before the prompt at the other is done.
    """
    limits, last = costs.limits, costs.prompt_tokens - 1
    new_tokens = max(0, last - prefill.cached_tokens)
    num_bytes = max(0, last - replica.cached_tokens) * costs.kv_bytes_per_token
    link = costs.links.get((prefill.load.name, replica.load.name), _NO_LINK)
    exposed_s = link.exposed_s(num_bytes)
    load, speed = replica.load, replica.speed
    room_s = speed.place_s(places_short(load, costs.prompt_tokens, limits), num_running=load.num_running)
    own_s = _prompt_s(prefill, new_tokens, limits)
    queue_s = first_token_s(prefill.load, prefill.speed, new_tokens, limits) - own_s
    budget = load.token_budget or limits.token_budget
    again_s = link.failed_share * replica.first_token_s
    last_s = running_step_s(load, speed) + speed.prefill_s(1, num_decodes=load.num_running, token_budget=budget)
    return Option(
        replica=replica,
        prefill=prefill,
        first_s=max(room_s, queue_s) + own_s + exposed_s + last_s + again_s,
        answer_s=_answer_s(replica, costs),
        harm_s=harm_s(prefill, new_tokens, limits) + link.failed_share * harm_s(replica, replica.new_tokens, limits),
        num_bytes=num_bytes,
        exposed_s=exposed_s,
    )


def harm_s(candidate: Candidate, new_tokens: int, limits: ReplicaLimits) -> float:
    """Returns the seconds by which so many tokens of a prompt hold up what runs there, over all sequences."""
    load, speed = candidate.load, candidate.speed
    if not load.num_running or not new_tokens:
        return 0.0
    budget = load.token_budget or limits.token_budget
    num_steps = -(-new_tokens // max(1, budget - load.num_running))
    prompt_s = _prompt_s(candidate, new_tokens, limits)
    return load.num_running * max(0.0, prompt_s - num_steps * speed.decode.at(load.num_running))


def _prompt_s(candidate: Candidate, new_tokens: int, limits: ReplicaLimits) -> float:
    """Returns the seconds that so many tokens of a prompt take, once nothing is before them."""
    load, budget = candidate.load, candidate.load.token_budget or limits.token_budget
    return candidate.speed.prefill_s(new_tokens, num_decodes=load.num_running, token_budget=budget)


def _answer_s(replica: Candidate, costs: Costs) -> float:
    decode = replica.speed.decode
    return costs.answer_tokens * (decode.at(replica.load.num_running + 1) if decode.weight else costs.decode_s)


def _is_measured(option: Option) -> bool:
    """Tells whether what a pair costs is measured, so that an unusual one may be judged by it."""
    assert option.prefill is not None
    return option.prefill.is_measured and option.replica.is_measured and option.replica.speed.decode.weight > 0


def _by_role(pairs: Iterable[Option], pools: Pools) -> tuple[list[Option], list[Option]]:
    """Returns the usual pairs, and the others."""
    usual: list[Option] = []
    unusual: list[Option] = []
    for pair in pairs:
        assert pair.prefill is not None
        (usual if _has_role(pair.prefill, pair.replica, pools) else unusual).append(pair)
    return usual, unusual


def _has_role(prefill: Candidate, replica: Candidate, pools: Pools) -> bool:
    """Tells whether one of the two is for its phase only, and none for the other, so that they are a usual pair."""
    first, second = (pools.works_as(it.load.name, it.load.role) for it in (prefill, replica))
    if first is Role.DECODE or second is Role.PREFILL:
        return False
    return first is Role.PREFILL or second is Role.DECODE


def _soonest_alone(options: Iterable[Option]) -> Option | None:
    return min((it for it in options if it.prefill is None), key=lambda it: it.first_s, default=None)


def _alone_kind(replica: Candidate, pools: Pools) -> RouteKind:
    if replica.load.name in pools.pulled:
        return RouteKind.PULLED
    return RouteKind.SPILLED if replica.load.role is Role.MIXED and pools.spilled else RouteKind.ALONE


def _split_route(option: Option, alone: Option | None, pools: Pools, costs: Costs) -> Route:
    assert option.prefill is not None
    names = {option.prefill.load.name, option.replica.load.name}
    helps = any(it.load.role is Role.MIXED for it in (option.prefill, option.replica)) and bool(pools.spilled)
    kind = RouteKind.PULLED if names & pools.pulled else RouteKind.SPILLED if helps else RouteKind.SPLIT
    return Route(
        replica=option.replica.load.name,
        prefill=option.prefill.load.name,
        reason=_reason(option, alone, costs),
        kind=kind,
        new_tokens=max(0, costs.prompt_tokens - 1 - option.prefill.cached_tokens),
    )


def _reason(option: Option, alone: Option | None, costs: Costs) -> str:
    """Says in a sentence why a prompt is computed by one replica and answered by another."""
    assert option.prefill is not None
    p, d = option.prefill, option.replica
    words = (
        f"{p.load.name} computes the prompt and {d.load.name} the answer, as the first token is expected in "
        f"{option.first_s:.3g} s: {p.load.name} has {p.load.pending_tokens} pending and {p.new_tokens} new tokens"
        f"{f', {p.cached_tokens} more in its cache' if p.cached_tokens else ''}, at "
        f"{'' if p.is_measured else 'an assumed '}{tokens_per_s(p, costs.limits):.3g} tokens/s; {d.load.name} has "
        f"{d.load.num_running} sequences running, {d.load.free_blocks} of {d.load.total_blocks} blocks free, and waits "
        f"{option.exposed_s:.2g} s more for {option.num_bytes / 1e6:.3g} MB"
    )
    if alone is None:
        return words
    held_up = f", and hold up others by {alone.harm_s:.3g} s" if alone.harm_s else ""
    return f"{words}; {alone.replica.load.name} alone would take {alone.first_s:.3g} s{held_up}"
