"""Holds the simulator to measured runs of vLLM, to the published simulator of Splitwise, and to its aim of speed."""

import argparse
import gc
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tests.benchmarks.report import RESULTS, Metric, Report, Rows, publish, shown
from tests.benchmarks.simulator import speed, splitwise_designs, vllm_runs
from tests.benchmarks.simulator.splitwise_designs import ISO_POWER, QUANTILES, Machine, Trace

DATA = Path(__file__).parent / "data"
OUTPUT = RESULTS / "simulator.json"
PARTS = ("speed", "vllm", "splitwise", "capacity")
_HOUR_RATE = 5.53  # requests a second of the Azure conversation trace
_LOWEST_RATE = {"BA": 20.0, "AA": 60.0, "BH": 40.0, "HA": 60.0}
_RATIOS = {"splitwise_aa_ratio": ("AA", "BA", 2.15), "splitwise_ha_ratio": ("HA", "BH", 1.18)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What one part found: figures by their keys, and a table."""

    metrics: Mapping[str, Metric]
    table: Rows


def find_speed(trace: Trace, num_requests: int) -> Found:
    """Measures an hour's rhythm on 100 replicas, and 4 replicas that are full."""
    sizes = [(prompt, answer) for _, prompt, answer in trace]
    repeats = -(-num_requests // len(sizes))
    spread = speed.measure((sizes * repeats)[:num_requests], num_replicas=100, rate=_HOUR_RATE)
    full = speed.measure(sizes[: num_requests // 2], num_replicas=4, rate=12.0)
    rows = [
        [name, f"{len(it.result.outcomes)}", f"{it.result.ended_s:.0f}", f"{it.cpu_s:.1f}", f"{it.events_per_s:.0f}",
         f"{it.tokens_per_s:.0f}"]
        for name, it in (("100 replicas, 5.53 requests/s", spread), ("4 replicas, 12 requests/s", full))
    ]  # fmt: skip
    columns = ("fleet", "requests", "simulated s", "CPU s", "events/s", "tokens/s")
    each = (spread.events_per_s, full.events_per_s)
    metric = Metric(value=max(each), unit="events/s", samples=2, spread=(min(each), max(each)))
    hour_s = spread.cpu_s * 3600 * _HOUR_RATE / num_requests
    metrics = {"events_per_s": metric, "hour_on_100_replicas_s": Metric(value=hour_s, unit="s")}
    return Found(metrics=metrics, table=Rows(title="Speed, one thread", columns=columns, rows=rows))


def find_vllm(num_requests: int | None) -> Found:
    """Fits the time of a step beyond its layers to one run, and predicts the other."""
    runs = [vllm_runs.read_run(folder) for folder in sorted((DATA / "vllm").iterdir())]
    if num_requests is not None:
        runs = [replace(run, requests=run.requests[:num_requests]) for run in runs]
    rows, found = [], []
    for fitted, judged in (runs, runs[::-1]):
        step_s = vllm_runs.fit(fitted)
        errors = vllm_runs.errors(judged, vllm_runs.simulate(judged, step_s))
        found.append(errors)
        rows.append([judged.name, fitted.name, f"{step_s * 1e3:.2f} ms", *(f"{it:+.2%}" for it in errors.values())])
    columns = ("judged", "fitted to", "step", *found[0])
    worst = {name: max(abs(errors[name]) for errors in found) for name in found[0]}
    keys = {
        "vllm_ttft_mean_error": "ttft_mean",
        "vllm_ttft_p99_error": "ttft_p99",
        "vllm_tpot_mean_error": "tpot_mean",
        "vllm_tpot_p99_error": "tpot_p99",
        "vllm_latency_mean_error": "latency_mean",
        "vllm_latency_p99_error": "latency_p99",
    }
    metrics = {key: Metric(value=100 * worst[name], unit="%", samples=len(found)) for key, name in keys.items()}
    return Found(metrics=metrics, table=Rows(title="Measured runs of vLLM", columns=columns, rows=rows))


def find_splitwise(machines: Mapping[str, Machine], trace: Trace, designs: Sequence[str]) -> Found:
    """Compares the quantiles of each design with those of the published simulator."""
    reference = splitwise_designs.read_reference(DATA / "splitwise" / "reference.csv")
    rows, worst, num_same = [], 0.0, 0
    for name in designs:
        served, result = splitwise_designs.serve(ISO_POWER[name], machines, trace)
        found = splitwise_designs.figures(served, machines[splitwise_designs.A100])
        errors = {key: found[key] / reference[name][key] - 1.0 for key in QUANTILES}
        worst = max(worst, *(abs(it) for it in errors.values()))
        is_kept = splitwise_designs.meets_all(found)
        num_same += is_kept == bool(reference[name]["all9"])
        rows.append([name, *(f"{it:+.2%}" for it in errors.values()), "yes" if is_kept else "no",
                     f"{result.extrapolated_share:.0%}"])  # fmt: skip
    columns = ("design", *QUANTILES, "keeps all", "extrapolated steps")
    metrics = {
        "splitwise_quantile_error": Metric(value=100 * worst, unit="%", samples=len(designs) * len(QUANTILES)),
        "splitwise_same_verdicts": Metric(value=num_same, unit="designs", samples=len(designs)),
    }
    title = "Six designs of equal power against the published simulator, with its shortcuts"
    return Found(metrics=metrics, table=Rows(title=title, columns=columns, rows=rows))


def find_capacity(machines: Mapping[str, Machine], trace: Trace, step: float) -> Found:
    """Finds the most requests a second that designs keep the nine limits at, and their ratios."""
    most = {
        name: splitwise_designs.capacity(ISO_POWER[name], machines, trace, low=low, step=step)
        for name, low in _LOWEST_RATE.items()
    }
    ratios = {key: most[one] / most[other] if most[other] else 0.0 for key, (one, other, _) in _RATIOS.items()}
    metrics = {key: Metric(value=ratio, unit="x") for key, ratio in ratios.items()}
    metrics |= {f"splitwise_{name.lower()}_rate": Metric(value=rate, unit="requests/s") for name, rate in most.items()}
    rows = [[f"{one} over {other}", f"{most[one]:g} / {most[other]:g}", f"{ratios[key]:.2f}x", f"{published}x"]
            for key, (one, other, published) in _RATIOS.items()]  # fmt: skip
    columns = ("designs", "requests/s within all limits", "ratio", "published")
    return Found(metrics=metrics, table=Rows(title="Capacity at equal power", columns=columns, rows=rows))


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas")
    parser.add_argument("--requests", type=int, default=None, help="only the first so many of each trace")
    parser.add_argument("--designs", default=",".join(ISO_POWER), help="of Splitwise, separated by commas")
    parser.add_argument("--rate-step", type=float, default=2.5, help="requests a second between two rates")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    return parser.parse_args(argv)


def find(args: argparse.Namespace) -> list[Found]:
    """Runs the parts that are asked for."""
    parts = args.only.split(",")
    splitwise = DATA / "splitwise"
    machines = splitwise_designs.read_machines(splitwise / "perf_model.csv.gz")
    trace = splitwise_designs.read_trace(splitwise / "conversation_70.csv.gz")[: args.requests]
    found = []
    if "speed" in parts:
        found.append(find_speed(trace, min(4000, args.requests or 4000)))
    if "vllm" in parts:
        found.append(find_vllm(args.requests))
    if "splitwise" in parts:
        found.append(find_splitwise(machines, trace, args.designs.split(",")))
    if "capacity" in parts:
        found.append(find_capacity(machines, trace, args.rate_step))
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and reports."""
    args = parse(argv)
    load = os.getloadavg()
    gc.disable()  # nothing here refers to itself in a circle, and looking for that takes a sixth of the time
    found = find(args)
    metrics = {key: metric for it in found for key, metric in it.metrics.items()}
    report = Report(
        name="simulator",
        headline=", ".join(f"{key} {shown(metric)}" for key, metric in metrics.items()),
        metrics=metrics,
        tables=[it.table for it in found],
        settings={"only": args.only, "requests": args.requests, "designs": args.designs, "rate_step": args.rate_step},
    )
    publish(report, load_at_start=load, output=args.output)


if __name__ == "__main__":
    main()
