"""What the parallel benchmark makes of its measurements. Pure.

Samples are seconds, one for each repeat; those of the same repeat stand close in time, so ratios are of these.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.benchmarks.report import Curve, Metric, Rows, median

Samples = Sequence[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """What one item found, as :class:`tests.benchmarks.report.Report` has it."""

    metrics: Mapping[str, Metric] = field(default_factory=dict)
    tables: Sequence[Rows] = ()
    curves: Sequence[Curve] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)


def merged(findings: Sequence[Findings]) -> Findings:
    """All of them together."""
    return Findings(
        metrics={key: metric for one in findings for key, metric in one.metrics.items()},
        tables=[table for one in findings for table in one.tables],
        curves=[curve for one in findings for curve in one.curves],
        left_out={key: reason for one in findings for key, reason in one.left_out.items()},
        settings={key: value for one in findings for key, value in one.settings.items()},
    )


def delay_name(delay_s: float) -> str:
    """``0.05ms``, ``1ms``: as keys end."""
    return f"{1e3 * delay_s:g}ms"


def milliseconds(samples: Samples) -> Metric:
    """Of seconds."""
    return median([1e3 * sample for sample in samples], "ms")


def cell(samples: Samples) -> str:
    """Median and range in milliseconds, for a table."""
    ordered = [1e3 * sample for sample in sorted(samples)]
    return f"{statistics.median(ordered):.2f} ({ordered[0]:.2f}-{ordered[-1]:.2f})"


def ratio(above: Samples, below: Samples) -> Metric:
    """Of the same repeats."""
    return median([a / b for a, b in zip(above, below, strict=True)], "x")


def hidden_share(alone: Samples, woven: Samples, silent: Samples) -> Metric | None:
    """Of the time that sums take in one lane, how much two lanes save; None where sums took no time that was seen.

    Args:
        alone, woven: seconds of the same step in one lane, and in two.
        silent: in one lane, without sums.
    """
    rounds = zip(alone, woven, silent, strict=True)
    shares = [(one - two) / (one - none) for one, two, none in rounds if one > none]
    return median(shares, "share") if shares else None


def worst(ratios: Mapping[int, Metric]) -> tuple[int, Metric]:
    """The greatest median, and what it is of."""
    at = max(ratios, key=lambda key: ratios[key].value)
    return at, ratios[at]


def fastest(samples: Mapping[str, Samples]) -> str:
    """The name with the least median."""
    return min(samples, key=lambda name: statistics.median(samples[name]))


def loss(samples: Mapping[str, Samples], picked: str) -> Metric:
    """How much longer than the fastest what was picked took, as a share of the fastest: 0 where it is that.

    The spread is that of the repeats, each against the same fastest.
    """
    best = fastest(samples)
    if picked == best:
        return Metric(value=0.0, unit="share", samples=len(samples[picked]))
    medians = [statistics.median(samples[name]) for name in (picked, best)]
    losses = [mine / least - 1 for mine, least in zip(samples[picked], samples[best], strict=True)]
    spread = (min(losses), max(losses)) if len(losses) > 1 else None
    return Metric(value=medians[0] / medians[1] - 1, unit="share", samples=len(losses), spread=spread)


def share_splits(speeds: tuple[float, float]) -> dict[str, tuple[float, float]]:
    """Shares to try, by name: even, as the hosts' speeds, and with the slower one given less than that.

    What a sum costs a host is the same for both, and more of what the slower one has.
    """
    fast, slow = max(speeds), min(speeds)
    of_slow = slow / (fast + slow)
    places = {"as speeds": of_slow, "slower has 7/8 of that": 0.875 * of_slow, "slower has 3/4 of that": 0.75 * of_slow}
    is_first_faster = speeds[0] >= speeds[1]

    def shares(slow_share: float) -> tuple[float, float]:
        return (1 - slow_share, slow_share) if is_first_faster else (slow_share, 1 - slow_share)

    return {"even": (0.5, 0.5)} | {name: shares(share) for name, share in places.items()}


def lines_over_delay(samples: Mapping[tuple[str, float], Samples]) -> dict[str, list[tuple[float, float]]]:
    """For a curve: by arm, (delay in ms, median in ms), from samples by arm and delay."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for (arm, delay_s), taken in sorted(samples.items(), key=lambda item: item[0][1]):
        lines.setdefault(arm, []).append((1e3 * delay_s, 1e3 * statistics.median(taken)))
    return lines


def over_delay(title: str, samples: Mapping[tuple[str, float], Samples]) -> Curve:
    """The picture of samples by arm and delay."""
    return Curve(title=title, x_label="one-way delay, ms", y_label="ms", lines=lines_over_delay(samples))
