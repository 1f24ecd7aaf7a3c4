"""Routes requests to replicas by what it has learnt of each: its speed, and which prompts it was sent."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from placement.planning.limits import ReplicaLimits
from placement.serving.prefix import chain_hashes
from placement.serving.routing.choice import ReplicaLoad, Route, shortest_queue
from placement.serving.routing.prefixes import SentPrefixes
from placement.serving.routing.speed import ReplicaSpeed
from placement.serving.step_plan import StepLoad


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A prompt to be routed.

    Attributes:
        token_ids: at least one.
        cache_salt: keys and values are shared among prompts of equal salt.
        reuses_prefix: whether it may take keys and values that others computed.
    """

    token_ids: Sequence[int]
    cache_salt: bytes = b""
    reuses_prefix: bool = True


class Router:
    """Keeps what is known of each replica, by its name, and chooses among them. It takes no time of any clock."""

    def __init__(self, limits: ReplicaLimits) -> None:
        """``limits`` are the sizes that all replicas serve within."""
        self._limits = limits
        self._speeds: dict[str, ReplicaSpeed] = {}
        self._sent: dict[str, SentPrefixes] = {}

    def speed(self, replica: str) -> ReplicaSpeed:
        """Returns what is known of a replica's speed."""
        return self._speeds.get(replica, ReplicaSpeed())

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

    def route(self, loads: Iterable[ReplicaLoad], prompt: Prompt) -> Route | None:
        """Chooses a replica for a prompt, which is then taken to be sent there; None where no replica accepts any."""
        accepting = {load.name: load for load in loads if load.accepting}
        hashes = self._hashes(prompt) if len(accepting) > 1 else []
        cached = {}
        if prompt.reuses_prefix:
            size = self._limits.block_size
            cached = {name: size * self._sent[name].num_found(hashes) for name in accepting if name in self._sent}
        route = shortest_queue(
            accepting.values(),
            len(prompt.token_ids),
            limits=self._limits,
            speeds=self._speeds,
            cached_tokens=cached,
        )
        if route is not None:
            sent = self._sent.setdefault(route.replica, SentPrefixes())
            sent.note(hashes, most=accepting[route.replica].total_blocks)
        return route

    def _hashes(self, prompt: Prompt) -> list[bytes]:
        """Returns the hashes of the prompt's full blocks, as the replicas name them; none where they keep none."""
        if not self._limits.prefix_cache:
            return []
        return chain_hashes(prompt.token_ids, self._limits.block_size, prompt.cache_salt)
