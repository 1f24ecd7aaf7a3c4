"""Says what a simulation found: the times of each request, what each replica did, and percentiles."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from placement.simulation.replica import Work


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What became of a request; times are seconds since the start.

    Attributes:
        replica: the replica that computed the answer; empty while it waits for one.
        prefill: the one that computed the prompt for it, if another did.
        computed_s: when the other had computed its prompt.
        first_s: when its first token was known.
        last_s: when its newest token was known.
        longest_gap_s: the longest time between two of its tokens.
        refused: why it was not served.
    """

    number: int
    arrived_s: float
    prompt_tokens: int
    answer_tokens: int
    replica: str = ""
    prefill: str = ""
    computed_s: float = -1.0
    first_s: float = -1.0
    last_s: float = -1.0
    num_tokens: int = 0
    longest_gap_s: float = 0.0
    num_preemptions: int = 0
    refused: str = ""

    @property
    def is_served(self) -> bool:
        """Tells whether it was given its whole answer."""
        return self.num_tokens == self.answer_tokens

    @property
    def ttft_s(self) -> float:
        """Returns the seconds from its arrival until its first token."""
        return self.first_s - self.arrived_s

    @property
    def latency_s(self) -> float:
        """Returns the seconds from its arrival until its last token."""
        return self.last_s - self.arrived_s

    @property
    def tpot_s(self) -> float:
        """Returns the seconds of a token after the first, on average; 0 where there is none."""
        return (self.last_s - self.first_s) / (self.num_tokens - 1) if self.num_tokens > 1 else 0.0


_COLUMNS = (
    "number", "arrived_s", "prompt_tokens", "answer_tokens", "replica", "prefill", "computed_s", "first_s", "last_s",
    "num_tokens", "longest_gap_s", "num_preemptions", "refused",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a simulation found.

    Attributes:
        outcomes: of all requests, by number.
        work: what each replica did, by its name.
        gaps_s: the times between tokens, where they are kept.
        num_events: what happened: arrivals, events of cores and their commands, and transfers.
        ended_s: when the last thing happened.
    """

    outcomes: Sequence[Outcome]
    work: Mapping[str, Work]
    gaps_s: Sequence[float]
    num_events: int
    ended_s: float

    @property
    def served(self) -> list[Outcome]:
        """Returns the requests that were given their whole answers."""
        return [outcome for outcome in self.outcomes if outcome.is_served]

    @property
    def extrapolated_share(self) -> float:
        """Returns the share of all steps whose time lies beyond what was measured."""
        steps = sum(work.num_steps for work in self.work.values())
        return sum(work.num_extrapolated_steps for work in self.work.values()) / steps if steps else 0.0

    def text(self) -> str:
        """Writes the result down to the last bit, as a table with a line for each request and each replica."""
        lines = [",".join(_COLUMNS)]
        lines += [",".join(_written(getattr(outcome, name)) for name in _COLUMNS) for outcome in self.outcomes]
        lines.append("replica,num_steps,num_tokens,busy_s,num_extrapolated_steps,extrapolated_s")
        for name, work in self.work.items():
            row = (name, work.num_steps, work.num_tokens, work.busy_s, work.num_extrapolated_steps, work.extrapolated_s)
            lines.append(",".join(_written(value) for value in row))
        lines.append(f"num_events,{self.num_events}")
        lines.append(f"ended_s,{self.ended_s!r}")
        return "\n".join(lines) + "\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """The mean and percentiles of a time, in seconds."""

    mean: float
    p50: float
    p90: float
    p99: float


def summary(values: Iterable[float]) -> Summary:
    """Returns the mean and percentiles of ``values``, of which there is at least one."""
    array = np.fromiter(values, dtype=float)
    p50, p90, p99 = (float(it) for it in np.percentile(array, [50, 90, 99]))
    return Summary(mean=float(array.mean()), p50=p50, p90=p90, p99=p99)


def _written(value: object) -> str:
    return repr(value) if isinstance(value, float) else str(value)
