"""Seconds that a device takes, and the two ceilings that figures are shares of: copying memory, and multiplying."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch

from tests.benchmarks.report import Metric
from tests.support.triton.triton_cases import DEVICE, HAS_GPU

WARM_UP = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceilings:
    """What the device reaches in this run. Bytes are counted when read and when written."""

    bytes_per_s: list[float]
    flops_per_s: list[float]


def seconds(call: Callable[[], object], repeats: int) -> list[float]:
    """Seconds of each of ``repeats`` calls, after a few that do not count where there is a GPU."""
    if not HAS_GPU:  # only to try the benchmark out
        return [_wall_seconds(call) for _ in range(repeats)]
    for _ in range(WARM_UP):
        call()
    edges = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    edges[0].record()
    for edge in edges[1:]:
        call()
        edge.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) / 1e3 for before, after in pairwise(edges)]


def measure_ceilings(copied_bytes: int, size: int, repeats: int) -> Ceilings:
    """A copy of so many bytes, and a product of two square bfloat16 matrices of random numbers."""
    source, target = torch.zeros(2, copied_bytes, dtype=torch.uint8, device=DEVICE)
    copies = seconds(partial(target.copy_, source), repeats)
    left, right = (torch.randn(size, size, device=DEVICE).bfloat16() for _ in range(2))
    products = seconds(lambda: left @ right, repeats)
    return Ceilings(
        bytes_per_s=[2 * copied_bytes / taken for taken in copies],
        flops_per_s=[2 * size**3 / taken for taken in products],
    )


def share(amount: float, taken: list[float], ceiling: list[float]) -> Metric:
    """``amount`` of bytes or operations in each of the times ``taken``, in percent of the ceiling's median."""
    return spread([100 * amount / one / statistics.median(ceiling) for one in taken], "%")


def spread(samples: list[float], unit: str) -> Metric:
    """The median; the spread is the middle half."""
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Metric(value=middle, unit=unit, samples=len(samples), spread=(low, high))


def _wall_seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started
