"""What ``make bench-engine`` measures, and what it makes of the measurements. Pure."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from tests.benchmarks.report import Metric, median

OURS = "heterodyne"
BEFORE = "before"
"""Ours, of another checkout."""
LINEARS = "linears"
PEERS = ("transformers", "vllm", "vllm-mp", "llamacpp")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One measurement.

    Attributes:
        phase: ``prefill``: from the prompts' arrival until the last of them has its first token; counts prompt tokens.
            ``decode``: from the moment the last sequence has its first token, for ``num_steps`` tokens of each;
            counts the tokens that arrive in that time.
        num_tokens: of each prompt.
    """

    phase: Literal["prefill", "decode"]
    num_tokens: int
    num_sequences: int
    num_steps: int = 1

    @property
    def name(self) -> str:
        """``prefill_128x16``, ``decode_b8``: also how the command line names it."""
        if self.phase == "prefill":
            return f"prefill_{self.num_tokens}x{self.num_sequences}"
        return f"decode_b{self.num_sequences}"

    def message(self, seed: int) -> dict[str, Any]:
        """What a peer is told; prompts are drawn from ``seed``."""
        return asdict(self) | {"seed": seed}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One engine's measurement of a case."""

    seconds: float
    tokens: int

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds


Samples = Mapping[tuple[str, str], Sequence[Sample]]  # by engine and name of the case; index is the repeat


def cases(*, context: int, steps: int) -> tuple[Case, ...]:
    """The cases of the benchmark: decodes run around ``context`` tokens deep."""
    prefills = [(128, 1), (128, 16), (2048, 1)]
    prompt = max(1, context - steps // 2)
    return (
        *(Case(phase="prefill", num_tokens=tokens, num_sequences=n) for tokens, n in prefills),
        *(Case(phase="decode", num_tokens=prompt, num_sequences=n, num_steps=steps) for n in (1, 8, 16, 64)),
    )


def asked_for() -> tuple[Case, ...]:
    """Cases that are measured where somebody asks for them by name."""
    return (Case(phase="prefill", num_tokens=512, num_sequences=1),)


def rates(samples: Samples) -> dict[str, Metric]:
    """``{engine}_{case}``: tokens per second."""
    return {f"{e}_{case}": median([s.rate for s in taken], "tokens/s") for (e, case), taken in samples.items()}


def best_peer(samples: Samples, case: str) -> str | None:
    """The peer with the highest median rate in ``case``; None where no peer was measured."""
    found = {peer: taken for peer in PEERS if (taken := samples.get((peer, case)))}
    return max(found, key=lambda peer: statistics.median(s.rate for s in found[peer])) if found else None


def ratio(samples: Samples, case: str) -> Metric | None:
    """Ours over the best peer."""
    peer = best_peer(samples, case)
    return None if peer is None else over(samples, peer, case)


def over(samples: Samples, other: str, case: str) -> Metric | None:
    """Ours over ``other``: median of the repeats' ratios, each of two measurements that stand close in time."""
    ours, theirs = samples.get((OURS, case)), samples.get((other, case))
    if not ours or not theirs:
        return None
    return median([mine.rate / other_sample.rate for mine, other_sample in zip(ours, theirs, strict=True)], "x")


def before_ratios(samples: Samples, chosen: Sequence[Case]) -> dict[str, Metric]:
    """``before_ratio_{case}``: ours over ours of another checkout."""
    found = {case.name: over(samples, BEFORE, case.name) for case in chosen}
    return {f"before_ratio_{name}": metric for name, metric in found.items() if metric is not None}


def headline_metrics(samples: Samples, chosen: Sequence[Case]) -> dict[str, Metric]:
    """The ratios that the project is judged by, as far as there are measurements for them."""
    found = {case.name: ratio(samples, case.name) for case in chosen}
    metrics = {f"ratio_{name}": metric for name, metric in found.items() if metric is not None}
    metrics |= before_ratios(samples, chosen)
    for case in chosen:
        if case.phase == "decode" and (metric := found[case.name]) is not None:
            metrics[f"decode_ratio_b{case.num_sequences}"] = metric
    prefills = [metric for case in chosen if case.phase == "prefill" and (metric := found[case.name]) is not None]
    if prefills:
        metrics["prefill_ratio"] = geometric_mean(prefills)
    return metrics | roofline_shares(samples, chosen)


def geometric_mean(ratios: Sequence[Metric]) -> Metric:
    """Of the medians; the spread is that of the least and of the most of each."""
    spreads = [metric.spread or (metric.value, metric.value) for metric in ratios]
    low, high = (math.prod(spread[end] for spread in spreads) ** (1 / len(spreads)) for end in (0, 1))
    return Metric(
        value=math.prod(metric.value for metric in ratios) ** (1 / len(ratios)),
        unit="x",
        samples=min(metric.samples for metric in ratios),
        spread=(low, high) if any(metric.spread for metric in ratios) else None,
    )


def roofline_shares(samples: Samples, chosen: Sequence[Case]) -> dict[str, Metric]:
    """``roofline_share_b{n}``: time of the model's linear layers alone over our time for a token of each sequence."""
    metrics = {}
    for case in chosen:
        alone, ours = (samples.get((engine, case.name)) for engine in (LINEARS, OURS))
        if case.phase == "decode" and alone and ours:
            shares = [mine.rate / bound.rate for mine, bound in zip(ours, alone, strict=True)]
            metrics[f"roofline_share_b{case.num_sequences}"] = median([100 * share for share in shares], "%")
    return metrics
