"""``make bench-disaggregation``: prompts and answers on different replicas, of the shape of SmolLM-135M in bfloat16.

``exposed``: what sending keys and values adds to the first token, over an emulated link, as root. ``gaps``: what a long
prompt does to answers that run. ``goodput``: a trace, split against mixed, on equal and unequal hosts. ``routing``:
prompts routed by time against by tokens. All but the first go through ``serve``. Arms take turns in each repeat.
"""

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.benchmarks.disaggregation.split_exposed import measure_exposed
from tests.benchmarks.disaggregation.split_gaps import measure_gaps
from tests.benchmarks.disaggregation.split_goodput import measure_goodput
from tests.benchmarks.disaggregation.split_routing import measure_routing
from tests.benchmarks.disaggregation.split_sizes import Sizes, quick
from tests.benchmarks.items import among, report_items
from tests.benchmarks.parallel.parallel_figures import Findings, merged
from tests.benchmarks.report import RESULTS
from tests.netlab.requirements import missing

HEADLINE = (
    "exposed_share_512", "exposed_share_2048", "gap_p99_vs_unchunked", "gap_p99_vs_chunked",
    "goodput_split_over_mixed_equal", "goodput_split_over_mixed_unequal", "routing_by_time_gain",
)  # fmt: skip
ITEMS: dict[str, Callable[[Sizes], Findings]] = {
    "exposed": measure_exposed, "gaps": measure_gaps, "goodput": measure_goodput, "routing": measure_routing,
}  # fmt: skip


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--items", type=among(ITEMS), default=list(ITEMS), help="some of " + ",".join(ITEMS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a tiny model and few requests, to see that it runs")
    parser.add_argument("--shape", default="smollm-135m", help="of the random checkpoint")
    parser.add_argument("--trace", type=Path, help="replayed for the goodput; default: drawn from deploy/traces")
    parser.add_argument("--rates", type=float, nargs="+", help="how many times as fast as recorded")
    parser.add_argument("--scale", type=float, help="factor on the lengths of the trace's prompts and answers")
    parser.add_argument("--requests", type=int, help="how many of the trace are sent at each rate")
    parser.add_argument("--slo-percent", type=int, choices=(50, 90, 99), help="the column of Splitwise's limits")
    parser.add_argument("--slow-target", help="kind of CPU of the slow host, where hosts are unequal: such as generic")
    parser.add_argument("--load", type=float, help="of both replicas, for the routing")
    parser.add_argument("--output", type=Path, default=RESULTS / "disaggregation.json")
    return parser.parse_args(argv)


def sizes_of(options: argparse.Namespace) -> Sizes:
    """Returns what is measured."""
    asked = {
        "trace": options.trace, "rates": options.rates and tuple(options.rates), "scale": options.scale,
        "num_requests": options.requests, "slow_target": options.slow_target, "slo_percent": options.slo_percent,
        "load": options.load,
    }  # fmt: skip
    base = quick() if options.quick else Sizes(shape=options.shape, repeats=options.repeats)
    return dataclasses.replace(base, **{name: value for name, value in asked.items() if value is not None})


def measure_all(items: Sequence[str], sizes: Sizes) -> Findings:
    """Measures what is asked for and can be."""
    found = []
    for name in items:
        reason = missing() if name == "exposed" else None
        if reason is not None:
            found.append(Findings(left_out={name: reason}))
            continue
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
        "disaggregation",
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
