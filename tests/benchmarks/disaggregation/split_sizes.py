"""How much the benchmark of split serving measures, and what it measures with."""

from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks.report import RESULTS

RATE_BITS_PER_S = 1e9
DELAY_S = 2e-4
DIRECTORY = RESULTS / "disaggregation"
"""Where files are kept that a run makes for itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What is measured, and how often.

    Attributes:
        shape: of the random checkpoint, by its name in ``engine_models``.
        lengths: tokens of the prompts whose transfers are measured.
        headline_lengths: those of them that have a figure of their own.
        long_prompt: tokens of a prompt that comes while answers run.
        num_long: how many of them come in one measurement.
        num_streams: answers that run meanwhile.
        trace: the file that is replayed; None: one drawn from the excerpt in ``deploy/traces``.
        rates: how many times as fast as recorded.
        scale: the factor on the lengths of its prompts and answers.
        num_requests: how many of the trace's are sent at each rate.
        slow_target: the kind of CPU that the code of the host for answers is compiled for where hosts are unequal.
        slo_percent: the column of Splitwise's table that each request of the headline is judged by.
        routed_prompt: tokens of the prompts that are routed.
        num_routed: how many of them.
        routed_share: of a core, that the slow one of two mixed replicas has.
        load: the share of what both replicas can compute together, that is sent.
        kv_cache: of each replica.
    """

    shape: str
    repeats: int
    lengths: tuple[int, ...] = (16, 32, 64, 128, 256, 512, 1024, 2048)
    headline_lengths: tuple[int, ...] = (512, 2048)
    long_prompt: int = 2048
    num_long: int = 6
    num_streams: int = 4
    trace: Path | None = None
    rates: tuple[float, ...] = (2.0, 3.0, 4.0)
    scale: float = 0.25
    num_requests: int = 240
    slow_target: str = "avx2"
    slo_percent: int = 99
    routed_prompt: int = 256
    num_routed: int = 100
    routed_share: float = 0.25
    load: float = 0.6
    kv_cache: str = "1GiB"


def quick(shape: str = "tiny") -> Sizes:
    """Returns sizes that are only large enough to see that all of it runs."""
    return Sizes(
        shape=shape, repeats=1, lengths=(16, 64, 128), headline_lengths=(64, 128), long_prompt=256, num_long=2,
        num_streams=2, rates=(4.0,), scale=0.05, num_requests=8, routed_prompt=32, num_routed=10, kv_cache="16MiB",
    )  # fmt: skip
