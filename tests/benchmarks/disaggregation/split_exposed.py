"""How much of a transfer of keys and values delays the first token: one worker computes prompts, another answers.

Each is a process of one thread on an emulated host of one core, with a link of 1 Gbit/s and 0.2 ms between them. The
relay that carries the packets takes time of the same cores; how much is among the settings.
"""

import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

import psutil

from orchestrator.launcher.process import WorkerArgs
from protos.codec.child_process import Listening
from tests.benchmarks.disaggregation.split_driver import AT, Arm, Sample, Seat, Setup
from tests.benchmarks.disaggregation.split_sizes import DELAY_S, RATE_BITS_PER_S, Sizes
from tests.benchmarks.engine.engine_models import checkpoint
from tests.benchmarks.parallel.parallel_figures import Findings
from tests.benchmarks.report import REPOSITORY, Curve, Metric, Rows, median, shown
from tests.netlab.lab import Host, Lab, lab
from tests.netlab.specs import HostSpec, LinkConditions
from tests.support.deploying.service import Command

BY_LAYER, IN_ONE_PIECE, INT8 = "by layer", "in one piece", "int8 by layer"
_RUN_S = 3000.0
_START_S = 120.0
_TIMES = ("prefill_s", "exposed_s", "first_token_s")

# A worker that sends layer by layer, or not, as a file says. If not, then nothing leaves before all of it is computed.
_PREFILL_WORKER = """
import sys
from pathlib import Path
from workers import __main__ as worker
from workers.service import prefill

prefill.streams_by_layer = lambda num_tokens: Path({way!r}).read_text() == "by layer"
sys.exit(worker.main())
"""

Samples = Mapping[tuple[str, str, int], Sequence[Sample]]


def arms(sizes: Sizes) -> list[Arm]:
    """Returns what is measured in each repeat: every length at a budget of 512, those of the headline at auto too."""
    found = []
    for num_tokens in sizes.lengths:
        is_headline = num_tokens in sizes.headline_lengths
        for budget in ("512", "auto") if is_headline else ("512",):
            ways = (BY_LAYER, IN_ONE_PIECE, INT8) if is_headline else (BY_LAYER, IN_ONE_PIECE)
            found += [Arm(way=way, budget=budget, num_tokens=num_tokens) for way in ways]
    return found


@contextmanager
def _worker(host: Host, epoch: int, way: Path | None) -> Iterator[Seat]:
    """A worker process on a host, for the length of the block. ``way``: the file that a sender goes by."""
    args = WorkerArgs(bind_host=host.address, device="cpu", num_threads=1, epoch=epoch)
    argv = args.argv()
    if way is not None:
        argv = [sys.executable, "-c", _PREFILL_WORKER.format(way=str(way)), *argv[3:]]
    with Command(host.command(argv), env=args.environment()) as command:
        line = command.wait_for(r'\{"event": "listening".*\}', _START_S)[0]
        listening = Listening.read(line)
        assert listening is not None, line
        yield Seat(address=listening.address, host=host.address, ranks_port=listening.ranks_port, epoch=epoch)


def measure(net: Lab, sizes: Sizes) -> tuple[list[Sample], float]:
    """Returns all samples, and what share of a core the relay took meanwhile."""
    with tempfile.TemporaryDirectory(prefix="exposed-") as directory, ExitStack() as stack:
        way = Path(directory) / "way"
        way.write_text(BY_LAYER)
        seats = {
            name: stack.enter_context(_worker(net[host], epoch, file))
            for epoch, (name, host, file) in enumerate(
                [("512", "one", way), ("auto", "one", way), ("native", "two", None), ("int8", "two", None)], start=41
            )
        }
        setup = Setup(
            model=str(checkpoint(sizes.shape).absolute()),
            way=str(way),
            seats=seats,
            arms=arms(sizes),
            repeats=sizes.repeats,
            most_tokens=max(sizes.lengths) + 16,
        )
        relay = psutil.Process(net.relay_pid)
        before, start_s = sum(relay.cpu_times()[:2]), time.monotonic()
        argv = [sys.executable, "-m", AT, json.dumps(asdict(setup))]
        done = net["two"].run(argv, timeout_s=_RUN_S, cwd=REPOSITORY, stderr=None)
        share = (sum(relay.cpu_times()[:2]) - before) / (time.monotonic() - start_s)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return [Sample.read(json.loads(line)) for line in lines], share


def measure_exposed(sizes: Sizes) -> Findings:
    """Measures on two emulated hosts. Needs root."""
    conditions = LinkConditions(delay_s=DELAY_S, rate_bits_per_s=RATE_BITS_PER_S)
    with lab(HostSpec(name="one", core=0), HostSpec(name="two", core=1), conditions=conditions) as net:
        samples, relay_share = measure(net, sizes)
    by_arm: dict[tuple[str, str, int], list[Sample]] = defaultdict(list)
    for sample in samples:
        by_arm[sample.arm.way, sample.arm.budget, sample.arm.num_tokens].append(sample)
    return findings(by_arm, sizes, relay_share)


def findings(samples: Samples, sizes: Sizes, relay_share: float) -> Findings:
    """Returns the figures of samples by arm: way, token budget, tokens."""
    metrics: dict[str, Metric] = {}
    for (way, budget, num_tokens), found in samples.items():
        key = "exposed_share" + {BY_LAYER: "", IN_ONE_PIECE: "_one_piece", INT8: "_int8"}[way]
        ending = f"_{num_tokens}" if budget == "512" else f"_{num_tokens}_{budget}"
        metrics[key + ending] = share_of(found)
    for num_tokens in sizes.lengths:
        layers, piece = samples[BY_LAYER, "512", num_tokens], samples[IN_ONE_PIECE, "512", num_tokens]
        ratios = [two.first_token_s / one.first_token_s for one, two in zip(layers, piece, strict=True)]
        metrics[f"one_piece_over_by_layer_{num_tokens}"] = median(ratios, "x")
    settings = {
        "link": f"{RATE_BITS_PER_S:g} bit/s, {1e3 * DELAY_S:g} ms one way, by a relay in user space",
        "relay_core_share": round(relay_share, 3),
    }
    return Findings(metrics=metrics, tables=[_table(samples)], curves=[_curve(samples, sizes)], settings=settings)


def share_of(samples: Sequence[Sample]) -> Metric:
    """Returns the time after the computation over that of the computation."""
    return median([sample.exposed_s / sample.prefill_s for sample in samples], "share")


def line_rate_s(num_bytes: int) -> float:
    """Returns how long bytes take over the link where nothing hides them: its delay, and its rate."""
    return DELAY_S + 8 * num_bytes / RATE_BITS_PER_S


def _ms(seconds: Sequence[float]) -> float:
    return 1e3 * statistics.median(seconds)


def _table(samples: Samples) -> Rows:
    rows = []
    for (way, budget, num_tokens), found in sorted(samples.items(), key=lambda item: (item[0][2], item[0])):
        prefill, exposed, first = (_ms([getattr(it, name) for it in found]) for name in _TIMES)
        num_bytes = found[0].num_bytes
        what = f"{num_tokens}, budget {budget}, {way}"
        line_ms = 1e3 * line_rate_s(num_bytes)
        times = (f"{first:.1f}", f"{prefill:.1f}", f"{exposed:.2f}", shown(share_of(found), 3))
        rows.append([what, *times, f"{num_bytes / 2**20:.2f}", f"{line_ms:.2f}"])
    columns = [
        "tokens", "first token ms", "computed in ms", "exposed ms", "exposed over computed", "MiB", "ms at line rate",
    ]  # fmt: skip
    return Rows(title="What a transfer adds to the first token", columns=columns, rows=rows)


def _curve(samples: Samples, sizes: Sizes) -> Curve:
    lines = {
        way: [
            (num_tokens, _ms([sample.first_token_s for sample in samples[way, "512", num_tokens]]))
            for num_tokens in sizes.lengths
        ]
        for way in (BY_LAYER, IN_ONE_PIECE)
    }
    return Curve(title="first token of a prompt computed elsewhere", x_label="tokens", y_label="ms", lines=lines)
