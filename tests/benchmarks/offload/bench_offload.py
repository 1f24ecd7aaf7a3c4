"""``make bench-offload``: attention at a worker that holds keys and values, against one process that does everything.

``gain``: tokens a second of a model worker whose memory holds few sequences, with and without an attention worker, at
equal total cores; then by context and delay of the link, beside what the gate predicts. ``overlap``: queries sent ahead
of keys and values, and two micro-batches in turn, on and off. All over an emulated link of 1 Gbit/s; needs root.
"""

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.benchmarks.items import among, report_items
from tests.benchmarks.offload.offload_run import measure_gain, measure_overlap
from tests.benchmarks.offload.offload_sizes import Sizes, quick
from tests.benchmarks.parallel.parallel_figures import Findings, merged
from tests.benchmarks.report import RESULTS
from tests.netlab.requirements import missing

HEADLINE = (
    "gain_2048", "q_first_gain_g1", "q_first_gain_g8", "staggered_gain", "prediction_error_max",
    "wire_bytes_over_formula",
)  # fmt: skip
ITEMS: dict[str, Callable[[Sizes], Findings]] = {"gain": measure_gain, "overlap": measure_overlap}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--items", type=among(ITEMS), default=list(ITEMS), help="some of " + ",".join(ITEMS))
    parser.add_argument("--repeats", type=int, help="of each measurement")
    parser.add_argument("--quick", action="store_true", help="a tiny model and few steps, to see that it runs")
    parser.add_argument("--contexts", type=int, nargs="+", help="tokens of a sequence, for the plot")
    parser.add_argument("--delays-ms", type=float, nargs="+", help="of the link one way, for the plot")
    parser.add_argument("--capped", type=int, help="sequences of the context that fit without an attention worker")
    parser.add_argument("--held", type=int, help="sequences of the context that fit into the attention worker")
    parser.add_argument("--output", type=Path, default=RESULTS / "offload.json")
    return parser.parse_args(argv)


def sizes_of(options: argparse.Namespace) -> Sizes:
    """Returns what is measured."""
    asked = {
        "repeats": options.repeats,
        "contexts": options.contexts and tuple(options.contexts),
        "delays_s": options.delays_ms and tuple(delay / 1e3 for delay in options.delays_ms),
        "capped": options.capped,
        "held": options.held,
    }
    base = quick() if options.quick else Sizes()
    return dataclasses.replace(base, **{name: value for name, value in asked.items() if value is not None})


def measure_all(items: Sequence[str], sizes: Sizes) -> Findings:
    """Measures what is asked for and can be."""
    reason = missing()
    if reason is not None:
        return Findings(left_out=dict.fromkeys(items, reason))
    found = []
    for name in items:
        print(f"measuring: {name}", flush=True)
        found.append(ITEMS[name](sizes))
    return merged(found)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures everything that was asked for and reports it."""
    options = parse(argv)
    load_at_start = os.getloadavg()
    sizes = sizes_of(options)
    found = measure_all(options.items, sizes)
    report_items(
        "offload",
        found,
        headline=HEADLINE,
        sizes=sizes,
        items=options.items,
        load_at_start=load_at_start,
        output=options.output,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
