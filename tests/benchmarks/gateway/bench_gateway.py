"""``make bench-gateway``: what the gateway and the engine's loop cost when the model costs nothing.

A real gateway process, a worker with the real engine around a null model, and client processes, all on this machine.
``latency``: steps of a set length; how long after the end of its step a client holds a token. ``tokens``: tokens per
second that reach clients, the most over a few lengths of the step: with none at all the engine takes the cores that
the gateway needs. ``requests``: steps that take no time and answers of one token; answers per second.
"""

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.benchmarks.gateway.gateway_setup import Seen, Setup, measure, running, settle
from tests.benchmarks.report import RESULTS, Curve, Metric, Report, Rows, median, publish, shown

STREAMS = (1, 8, 64, 256, 512)
KINDS = ("latency", "tokens", "requests")


def percentile(ordered: Sequence[int], share: float) -> float:
    """The value that ``share`` of ``ordered`` does not exceed (nearest rank)."""
    return float(ordered[min(len(ordered) - 1, int(share * len(ordered)))])


def metrics_of(kind: str, streams: int, seen: Sequence[Seen]) -> dict[str, Metric]:
    """The metrics of one kind and number of streams, over its repeats."""
    if kind == "requests":
        return {f"requests_per_s_{streams}": median([one.requests_per_s for one in seen], "requests/s")}
    if kind == "latency":
        return {
            f"added_ms_{name}_{streams}": median([percentile(one.added_us, share) / 1000 for one in seen], "ms")
            for name, share in (("p50", 0.5), ("p99", 0.99))
        }
    return {
        f"tokens_per_s_{streams}": median([one.tokens_per_s for one in seen], "tokens/s"),
        # What one gateway process would pass on with a core to itself.
        f"tokens_per_gateway_cpu_s_{streams}": median(
            [one.tokens_per_s / one.gateway_cores for one in seen], "tokens/s"
        ),
        f"tokens_per_message_{streams}": median([one.tokens_per_s / one.messages_per_s for one in seen], "tokens"),
    }


def table(streams: Sequence[int], metrics: Mapping[str, Metric], cores: Mapping[tuple[str, int], str]) -> Rows:
    """A row a number of streams."""
    keys = (
        ("added p50 ms", "added_ms_p50_{}", 2),
        ("p99 ms", "added_ms_p99_{}", 2),
        ("tokens/s", "tokens_per_s_{}", 0),
        ("per gateway CPU s", "tokens_per_gateway_cpu_s_{}", 0),
        ("tokens a message", "tokens_per_message_{}", 1),
        ("requests/s", "requests_per_s_{}", 0),
    )
    rows = []
    for n in streams:
        found = [(metrics.get(key.format(n)), digits) for _, key, digits in keys]
        cells = [f"{metric.value:.{digits}f}" if metric else "-" for metric, digits in found]
        rows.append([str(n), *cells, cores.get(("tokens", n), "-")])
    columns = ["streams", *(title for title, _, _ in keys), "cores: gateway+worker+clients"]
    return Rows(title="gateway: medians over the repeats", columns=columns, rows=rows)


def curves(streams: Sequence[int], metrics: Mapping[str, Metric]) -> list[Curve]:
    """Latency and rates over the number of streams."""

    def line(key: str) -> list[tuple[float, float]]:
        return [(float(n), metrics[key.format(n)].value) for n in streams if key.format(n) in metrics]

    latency = {name: line(f"added_ms_{name}_{{}}") for name in ("p50", "p99")}
    rates = {"tokens/s": line("tokens_per_s_{}"), "requests/s": line("requests_per_s_{}")}
    return [
        Curve(
            title=title,
            x_label="streams",
            y_label=unit,
            lines={name: points for name, points in lines.items() if points},
        )
        for title, unit, lines in (("added to each token", "ms", latency), ("throughput", "per s", rates))
        if any(lines.values())
    ]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--streams", type=int, nargs="+", default=list(STREAMS))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--seconds", type=float, default=5.0, help="length of one measurement")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--step-ms", type=float, default=20.0, help="of the latency measurement")
    parser.add_argument(
        "--token-steps-ms", type=float, nargs="+", default=[0.0, 2.0, 5.0], help="of the throughput measurement"
    )
    parser.add_argument("--max-tokens", type=int, default=4096, help="of one answer, where answers are long")
    parser.add_argument("--clients", type=int, default=1, help="client processes")
    parser.add_argument("--output", type=Path, default=RESULTS / "gateway.json")
    return parser.parse_args(argv)


def measure_all(setup: Setup, options: argparse.Namespace) -> dict[tuple[str, int], list[Seen]]:
    """Every kind at every number of streams, in turn, ``repeats`` times."""
    taken: dict[tuple[str, int], list[Seen]] = {}
    steps_ms = {"latency": [options.step_ms], "tokens": options.token_steps_ms, "requests": [0.0]}
    for repeat in range(options.repeats):
        for streams in options.streams:
            for kind in options.kinds:
                tried = [_measure(setup, options, kind, streams, step_ms) for step_ms in steps_ms[kind]]
                seen = max(tried, key=lambda one: one.tokens_per_s)
                taken.setdefault((kind, streams), []).append(seen)
                what = metrics_of(kind, streams, [seen])
                words = ", ".join(f"{key} {metric.value:.2f}" for key, metric in what.items())
                print(f"{repeat + 1}/{options.repeats} {kind:>8} {streams:4d}: {words}", flush=True)
    return taken


def _measure(setup: Setup, options: argparse.Namespace, kind: str, streams: int, step_ms: float) -> Seen:
    seen = measure(
        setup,
        streams=streams,
        step_ns=int(step_ms * 1e6),
        max_tokens=1 if kind == "requests" else options.max_tokens,
        seconds=options.seconds,
        clients=options.clients,
    )
    settle(setup)
    return seen


def cores_of(taken: Mapping[tuple[str, int], Sequence[Seen]]) -> dict[tuple[str, int], str]:
    """Cores that gateway, worker and clients kept busy."""
    names = ("gateway_cores", "worker_cores", "client_cores")
    return {
        key: "+".join(f"{statistics.median(getattr(one, name) for one in seen):.2f}" for name in names)
        for key, seen in taken.items()
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure everything that was asked for and report it."""
    options = parse(argv)
    load_at_start = os.getloadavg()
    most = max(options.streams)
    with tempfile.TemporaryDirectory() as directory, running(Path(directory), most_streams=most) as setup:
        taken = measure_all(setup, options)
    metrics: dict[str, Metric] = {}
    for (kind, streams), seen in taken.items():
        metrics |= metrics_of(kind, streams, seen)
    fastest = [metrics[f"tokens_per_s_{n}"] for n in options.streams if f"tokens_per_s_{n}" in metrics]
    if fastest:
        metrics["tokens_per_s_max"] = max(fastest, key=lambda metric: metric.value)
    keys = [key for key in ("added_ms_p50_64", "tokens_per_s_max") if key in metrics]
    figures = ", ".join(f"{key} {shown(metrics[key])}" for key in keys)
    report = Report(
        name="gateway",
        headline=f"gateway: {figures or f'{len(metrics)} figures'}",
        metrics=metrics,
        tables=[table(options.streams, metrics, cores_of(taken))],
        curves=curves(options.streams, metrics),
        settings={key: str(value) for key, value in vars(options).items()},
    )
    publish(report, load_at_start=load_at_start, output=options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
