"""Turns outcomes into the points of curves. Pure."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from orchestrator.cli.replay.figures import gaps_s
from orchestrator.cli.replay.outcome import Outcome

# More points than a picture has columns show nothing more.
_MOST_POINTS = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """One curve of steps: ``ys[i]`` from ``xs[i]`` on."""

    title: str
    x_label: str
    y_label: str
    xs: tuple[float, ...]
    ys: tuple[float, ...]


def curves(outcomes: Sequence[Outcome]) -> tuple[Curve, ...]:
    """Returns the distributions of the latencies of completed requests, and how many requests ran at each time."""
    completed = [outcome for outcome in outcomes if outcome.is_completed]
    samples = {
        "time to first token": [outcome.ttft_s for outcome in completed],
        "time between tokens": gaps_s(completed),
        "end to end": [outcome.e2e_s for outcome in completed],
    }
    return (*(_distribution(name, of) for name, of in samples.items()), _running(outcomes))


def _distribution(name: str, samples: Iterable[float]) -> Curve:
    """Returns the share of samples that are at most as great as each."""
    ordered = sorted(samples)
    places = _thinned(len(ordered))
    return Curve(
        title=name,
        x_label="ms",
        y_label="share of requests" if name != "time between tokens" else "share of tokens",
        xs=tuple(ordered[place] * 1e3 for place in places),
        ys=tuple((place + 1) / len(ordered) for place in places),
    )


def _running(outcomes: Iterable[Outcome]) -> Curve:
    """Returns how many requests had been sent and had not ended, at each time that this changed."""
    changes = sorted(change for outcome in outcomes for change in ((outcome.sent_s, 1), (outcome.ended_s, -1)))
    num_running, counts = 0, []
    for _, change in changes:
        num_running += change
        counts.append(num_running)
    places = _thinned(len(changes))
    return Curve(
        title="requests in flight",
        x_label="seconds after the start",
        y_label="requests",
        xs=tuple(changes[place][0] for place in places),
        ys=tuple(float(counts[place]) for place in places),
    )


def _thinned(count: int) -> list[int]:
    """Returns places of ``count`` points, evenly spread, the last among them."""
    step = max(1, -(-count // _MOST_POINTS))
    places = list(range(0, count, step))
    return places if not count or places[-1] == count - 1 else [*places, count - 1]
