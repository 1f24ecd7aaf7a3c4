"""Routes requests to replicas by what it has learnt of each: its speed, which prompts it was sent, and its links."""

from collections.abc import Iterable, Sequence
from typing import Literal

from placement.planning.limits import ReplicaLimits
from placement.serving.routing.choice import Candidate, ReplicaLoad, Route, candidates, places_short, route_alone
from placement.serving.routing.links import LinkSpeed
from placement.serving.routing.pools import Member, Pools, Thresholds, balanced
from placement.serving.routing.prefixes import SentPrefixes
from placement.serving.routing.prompt import Prompt
from placement.serving.routing.speed import ReplicaSpeed
from placement.serving.routing.splitting import Costs, choose
from placement.serving.step_plan import StepLoad

__all__ = ["Disaggregation", "Prompt", "Router"]

Disaggregation = Literal["auto", "never", "always"]
"""Says whether one replica computes a prompt and another its answer: where that is faster, never, or wherever there are
two."""

_ASSUMED_ANSWER_TOKENS = 64.0
_UNKNOWN = ReplicaSpeed()


class Router:
    """Keeps what is known of each replica, by its name, and chooses among them. It takes no time of any clock.

    Attributes:
        pools: which phases mixed replicas help with, and which replicas help the other pool.
    """

    def __init__(
        self,
        limits: ReplicaLimits,
        *,
        mode: Disaggregation = "auto",
        kv_bytes_per_token: int = 0,
        thresholds: Thresholds | None = None,
    ) -> None:
        """``limits`` are the sizes that all replicas serve within."""
        self.pools = Pools()
        self._limits = limits
        self._mode = mode
        self._kv_bytes_per_token = kv_bytes_per_token
        self._thresholds = thresholds or Thresholds()
        self._speeds: dict[str, ReplicaSpeed] = {}
        self._sent: dict[str, SentPrefixes] = {}
        self._links: dict[tuple[str, str], LinkSpeed] = {}

    def speed(self, replica: str) -> ReplicaSpeed:
        """Returns what is known of a replica's speed."""
        return self._speeds.get(replica, _UNKNOWN)

    def link(self, prefill: str, replica: str) -> LinkSpeed:
        """Returns what is known of transfers from one replica to another."""
        return self._links.get((prefill, replica), LinkSpeed())

    def restarted(self, replica: str) -> None:
        """Notes that a replica has started anew: it has no keys and values, and is as fast as before until measured."""
        self._sent.pop(replica, None)

    def stepped(self, replica: str, load: StepLoad, duration_s: float, answers: Iterable[int] = ()) -> None:
        """Notes that a replica has run a step.

        Args:
            load: the size of the step, which took ``duration_s``.
            answers: how many tokens each answer has that ended with the step.
        """
        speed = self.speed(replica).after_step(load, duration_s)
        for num_tokens in answers:
            speed = speed.after_answer(num_tokens)
        self._speeds[replica] = speed

    def transferred(self, prefill: str, replica: str, *, num_tokens: int, num_bytes: int, exposed_s: float) -> None:
        """Notes that the keys and values of some tokens came, which delayed the first token by ``exposed_s``."""
        if num_tokens:  # they may travel in fewer bits than they are kept in
            self._kv_bytes_per_token = -(-num_bytes // num_tokens)
        self._links[prefill, replica] = self.link(prefill, replica).after(num_bytes, exposed_s)

    def transfer_failed(self, prefill: str, replica: str) -> None:
        """Notes that keys and values did not come."""
        self._links[prefill, replica] = self.link(prefill, replica).after_failure()

    def balance(self, loads: Iterable[ReplicaLoad], *, waiting_tokens: int = 0, num_waiting: int = 0) -> None:
        """Decides who helps whom, by the queues at the replicas and what waits for any of them.

        Args:
            waiting_tokens: tokens of the prompts that wait.
            num_waiting: sequences that wait.
        """
        if self._mode == "never":
            return
        accepting = candidates(
            loads, max(1, waiting_tokens), limits=self._limits, speeds=self._speeds, cached_tokens={}
        )
        members = [self._member(it, waiting_tokens, num_waiting, of=len(accepting)) for it in accepting]
        self.pools = balanced(self.pools, members, self._thresholds)

    def _member(self, candidate: Candidate, waiting_tokens: int, num_waiting: int, *, of: int) -> Member:
        """Returns how long work would queue at a replica that takes its part of what waits for any of ``of``."""
        load, speed = candidate.load, candidate.speed
        budget = load.token_budget or self._limits.token_budget
        num_tokens = load.prompt_tokens + waiting_tokens // of
        short = places_short(load, 1, self._limits)
        num_ahead = short + num_waiting // of if short else 0
        return Member(
            name=load.name,
            role=load.role,
            prompt_s=speed.prefill_s(num_tokens, num_decodes=load.num_running, token_budget=budget),
            answer_s=speed.place_s(num_ahead, num_running=load.num_running),
        )

    def route(self, loads: Iterable[ReplicaLoad], prompt: Prompt) -> Route | None:
        """Chooses replicas for a prompt, which is then taken to be sent there; None where no replica accepts any."""
        loads = list(loads)
        self.balance(loads)
        route = self.choose(loads, prompt)
        if route is not None:
            self.sent(route, loads, prompt)
        return route

    def choose(self, loads: Sequence[ReplicaLoad], prompt: Prompt) -> Route | None:
        """Chooses replicas for a prompt, as ``route`` does, but changes nothing."""
        num_tokens = len(prompt.token_ids)
        ranked = candidates(
            loads, num_tokens, limits=self._limits, speeds=self._speeds, cached_tokens=self._cached(loads, prompt)
        )
        if not ranked:
            return None
        if self._mode == "never" or len(ranked) == 1:
            return route_alone(ranked, self._limits)
        if not prompt.reuses_prefix or num_tokens < 2:
            return route_alone(self._answering(ranked), self._limits)
        costs = Costs(
            prompt_tokens=num_tokens,
            limits=self._limits,
            kv_bytes_per_token=self._kv_bytes_per_token,
            answer_tokens=self._answer_tokens(prompt),
            links=self._links,
            decode_s=max(it.speed.decode.at(it.load.num_running + 1) for it in ranked),
        )
        return choose(ranked, self.pools, costs, always=self._mode == "always")

    def sent(self, route: Route, loads: Iterable[ReplicaLoad], prompt: Prompt) -> None:
        """Notes that a prompt was sent where a route says."""
        by_name = {load.name: load for load in loads}
        for name in (route.replica, route.prefill):
            if name is not None and self._limits.prefix_cache and len(by_name) > 1:
                hashes = prompt.block_hashes(self._block_size(by_name[name]))
                self._sent.setdefault(name, SentPrefixes()).note(hashes, most=by_name[name].total_blocks)
        if route.prefill is None:
            self._links = {pair: link.passed_over() for pair, link in self._links.items()}

    def _answering(self, ranked: Sequence[Candidate]) -> list[Candidate]:
        """Returns those of the candidates that compute answers."""
        members = [(it.load.name, it.load.role) for it in ranked]
        names = self.pools.answering(members)
        return [it for it in ranked if it.load.name in names]

    def _answer_tokens(self, prompt: Prompt) -> float:
        """Returns how many tokens the answer is expected to have, by those of all replicas."""
        known = [it.answer_tokens for it in self._speeds.values() if it.answer_tokens is not None]
        usual = sum(known) / len(known) if known else _ASSUMED_ANSWER_TOKENS
        return usual if prompt.max_tokens is None else min(usual, prompt.max_tokens)

    def _cached(self, loads: Iterable[ReplicaLoad], prompt: Prompt) -> dict[str, int]:
        """Returns how many leading tokens of the prompt each replica is taken to have."""
        if not prompt.reuses_prefix or not self._limits.prefix_cache:
            return {}
        cached = {}
        for load in loads:
            if load.name in self._sent:
                size = self._block_size(load)
                cached[load.name] = size * self._sent[load.name].num_found(prompt.block_hashes(size))
        return cached

    def _block_size(self, load: ReplicaLoad) -> int:
        return load.block_size or self._limits.block_size
