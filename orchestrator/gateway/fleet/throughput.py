"""Reckons how many tokens replicas computed of late, from the counters of their load reports. Pure."""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

from protos.heterodyne.worker.v1 import worker_pb2

WINDOW_S = 10.0
"""The time that rates are averaged over."""

# A replica that was started again counts from 0, so what is known of another incarnation is of no use.
ReplicaKey = tuple[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Holds what a replica, or several, did in the last seconds.

    Attributes:
        prefix_queries: prompt tokens that were looked up in the prefix cache in a second.
        prefix_hits: how many of those were found.
    """

    prompt_tokens_per_s: float
    generated_tokens_per_s: float
    prefix_queries: float
    prefix_hits: float

    @property
    def prefix_cache_hit_rate(self) -> float | None:
        """Returns the share of looked-up tokens that were found; None where none were looked up."""
        return self.prefix_hits / self.prefix_queries if self.prefix_queries else None

    def __add__(self, other: "Rates") -> "Rates":
        return Rates(
            prompt_tokens_per_s=self.prompt_tokens_per_s + other.prompt_tokens_per_s,
            generated_tokens_per_s=self.generated_tokens_per_s + other.generated_tokens_per_s,
            prefix_queries=self.prefix_queries + other.prefix_queries,
            prefix_hits=self.prefix_hits + other.prefix_hits,
        )


NOTHING = Rates(prompt_tokens_per_s=0.0, generated_tokens_per_s=0.0, prefix_queries=0.0, prefix_hits=0.0)


class Throughput:
    """Keeps the counters of the last seconds of each replica."""

    def __init__(self, window_s: float = WINDOW_S) -> None:
        self._window_s = window_s
        self._samples: dict[ReplicaKey, deque[tuple[float, worker_pb2.LoadReport]]] = {}

    def sample(self, now_s: float, reports: Mapping[ReplicaKey, worker_pb2.LoadReport]) -> None:
        """Takes in the last reports of all replicas that live; what is known of others is forgotten."""
        for gone in self._samples.keys() - reports.keys():
            del self._samples[gone]
        for key, report in reports.items():
            samples = self._samples.setdefault(key, deque())
            samples.append((now_s, report))
            while len(samples) > 2 and now_s - samples[1][0] >= self._window_s:
                samples.popleft()

    def rates(self, key: ReplicaKey) -> Rates | None:
        """Returns the rates of a replica; None where it was not seen for the length of the window."""
        samples = self._samples.get(key)
        if not samples or samples[-1][0] - samples[0][0] < self._window_s:
            return None
        (first_s, first), (last_s, last) = samples[0], samples[-1]
        per_s = 1.0 / (last_s - first_s)
        return Rates(
            prompt_tokens_per_s=(last.prompt_tokens - first.prompt_tokens) * per_s,
            generated_tokens_per_s=(last.output_tokens - first.output_tokens) * per_s,
            prefix_queries=(last.prefix_queries - first.prefix_queries) * per_s,
            prefix_hits=(last.prefix_hits - first.prefix_hits) * per_s,
        )

    @property
    def was_busy(self) -> bool:
        """Returns whether any replica computed, or had anything to, in the window."""
        for samples in self._samples.values():
            if any(report.num_running or report.num_waiting for _, report in samples):
                return True
            if any(before.steps != after.steps for (_, before), (_, after) in pairwise(samples)):
                return True
        return False
