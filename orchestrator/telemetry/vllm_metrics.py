"""Reports our replicas under the names, labels and buckets of vLLM's Prometheus endpoint.

They are for dashboards, autoscalers and inference gateways that know those names. ``engine`` is the name of a replica;
what waits in the gateway for a replica counts as waiting at the engine ``gateway``. A request is counted when it has
ended, its first token included; the gap between two tokens is the one that the gateway sees.
"""

import time
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from orchestrator.telemetry.requests import RequestRecord
from protos.heterodyne.worker.v1 import worker_pb2

_FIRST_TOKEN_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
)  # fmt: skip
_PER_TOKEN_S = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
_REQUEST_S = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
)  # fmt: skip
_STEP_TOKENS = tuple(float(n) for n in (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384))
_CHOICES = (1.0, 2.0, 5.0, 10.0, 20.0)
_TIMES: Mapping[str, tuple[str, tuple[float, ...]]] = {
    "vllm:time_to_first_token_seconds": ("From arrival to the first token.", _FIRST_TOKEN_S),
    "vllm:inter_token_latency_seconds": ("Between two tokens of a sequence.", _PER_TOKEN_S),
    "vllm:request_time_per_output_token_seconds": ("Mean of a request's later tokens.", _PER_TOKEN_S),
    "vllm:e2e_request_latency_seconds": ("From arrival to the end.", _REQUEST_S),
    "vllm:request_queue_time_seconds": ("From arrival to the first step.", _REQUEST_S),
    "vllm:request_prefill_time_seconds": ("From the first step to the first token.", _REQUEST_S),
    "vllm:request_decode_time_seconds": ("From the first token to the end.", _REQUEST_S),
    "vllm:request_inference_time_seconds": ("From the first step to the end.", _REQUEST_S),
    "vllm:iteration_tokens_total": ("Tokens computed in a step.", _STEP_TOKENS),
    "vllm:request_params_n": ("Choices that a request asked for.", _CHOICES),
}
_SIZES: Mapping[str, str] = {
    "vllm:request_prompt_tokens": "Tokens of a request's prompt.",
    "vllm:request_generation_tokens": "Tokens that were generated for a request.",
    "vllm:request_params_max_tokens": "The most tokens that a request asked for.",
}
# A load report counts since its replica started; Prometheus knows what to do when a counter begins anew.
_COUNTERS: Mapping[str, tuple[str, str]] = {
    "vllm:num_preemptions": ("Sequences put back for lack of KV blocks.", "num_preemptions"),
    "vllm:prompt_tokens": ("Tokens of prompts that were prefilled.", "prompt_tokens"),
    "vllm:generation_tokens": ("Tokens that were generated.", "output_tokens"),
    "vllm:prefix_cache_queries": ("Tokens looked up in the prefix cache.", "prefix_queries"),
    "vllm:prefix_cache_hits": ("Tokens found in the prefix cache.", "prefix_hits"),
}
_REASONS = ("stop", "length", "abort", "error")
_ABORTED = ("CANCELLED", "DEADLINE_EXCEEDED")
_GATEWAY = "gateway"
_MAX_GAPS = 65536

# The last load report of each replica that lives, by name.
Reports = Callable[[], Iterable[tuple[str, worker_pb2.LoadReport]]]


class VllmMetrics(Collector):
    """A collector for the registry that Prometheus scrapes. It hears of requests and steps on the gateway's event loop.

    Args:
        block_size: a function that gives the tokens of a KV block of a replica, by its name.
        num_queued: requests that wait in the gateway.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        *,
        model: str,
        max_context_tokens: int,
        block_size: Callable[[str], int],
        reports: Reports,
        num_queued: Callable[[], int],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._model = model
        self._block_size = block_size
        self._reports = reports
        self._num_queued = num_queued
        self._clock = clock
        sizes = _one_two_five(max_context_tokens)
        tables = {**_TIMES, **{name: (text, sizes) for name, text in _SIZES.items()}}
        self._histograms = {name: _Histogram(name, text, buckets) for name, (text, buckets) in tables.items()}
        self._ended: defaultdict[str, Counter[str]] = defaultdict(Counter)
        # When each running sequence had its last token; the one that waits longest for its next is first.
        self._last_token_s: dict[tuple[str, int], float] = {}

    def finished(self, record: RequestRecord) -> None:
        """Counts an accepted request that has ended."""
        self._ended[record.replica][_reason(record)] += 1
        for name, value in _figures(record):
            self._histograms[name].add(record.replica, value)

    def stepped(self, replica: str, step: worker_pb2.StepOutput) -> None:
        """Counts a step that a replica has finished."""
        now_s = self._clock()
        self._histograms["vllm:iteration_tokens_total"].add(replica, step.num_tokens)
        # Most had their last token in the same step as each other: they are counted together.
        gaps: defaultdict[float, int] = defaultdict(int)
        last_token_s = self._last_token_s
        for output in step.sequences:
            key = (replica, output.sequence_id)
            before_s = last_token_s.pop(key, None)
            if not output.HasField("index"):
                continue
            if before_s is not None:
                gaps[before_s] += 1
            if not output.HasField("end"):
                last_token_s[key] = now_s
        for before_s, times in gaps.items():
            self._histograms["vllm:inter_token_latency_seconds"].add(replica, now_s - before_s, times)
        # Nothing says that a cancelled sequence has ended.
        while len(last_token_s) > _MAX_GAPS:
            del last_token_s[next(iter(last_token_s))]

    def collect(self) -> Iterator[Metric]:
        """Yields all metrics as they are now. The thread that answers Prometheus calls it."""
        reports = list(self._reports())
        yield from self._gauges(reports)
        yield from self._counters(reports)
        for histogram in self._histograms.values():
            yield histogram.family(self._model)

    def _gauges(self, reports: list[tuple[str, worker_pb2.LoadReport]]) -> Iterator[Metric]:
        labels = ("model_name", "engine")
        running = GaugeMetricFamily("vllm:num_requests_running", "Sequences in the batch.", labels=labels)
        waiting = GaugeMetricFamily("vllm:num_requests_waiting", "Sequences that wait for a batch.", labels=labels)
        usage = GaugeMetricFamily("vllm:kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1.", labels=labels)
        blocks = ("engine", "block_size", "num_gpu_blocks")
        cache = GaugeMetricFamily("vllm:cache_config_info", "The KV blocks of an engine.", labels=blocks)
        for replica, load in reports:
            running.add_metric((self._model, replica), load.num_running)
            waiting.add_metric((self._model, replica), load.num_waiting)
            cache.add_metric((replica, str(self._block_size(replica)), str(load.total_blocks)), 1)
            if load.total_blocks:
                usage.add_metric((self._model, replica), 1 - load.free_blocks / load.total_blocks)
        waiting.add_metric((self._model, _GATEWAY), self._num_queued())
        yield from (running, waiting, usage, cache)

    def _counters(self, reports: list[tuple[str, worker_pb2.LoadReport]]) -> Iterator[Metric]:
        for name, (text, field) in _COUNTERS.items():
            family = CounterMetricFamily(name, text, labels=("model_name", "engine"))
            for replica, load in reports:
                family.add_metric((self._model, replica), getattr(load, field))
            yield family
        labels = ("model_name", "engine", "finished_reason")
        ended = CounterMetricFamily("vllm:request_success", "Requests that ended, by reason.", labels=labels)
        for replica, counts in list(self._ended.items()):
            for reason in _REASONS:
                ended.add_metric((self._model, replica, reason), counts[reason])
        yield ended


class _Histogram:
    """Counts values by engine and bucket. One thread adds and another reads, which may miss the latest value."""

    def __init__(self, name: str, text: str, buckets: Sequence[float]) -> None:
        self._name = name
        self._text = text
        self._buckets = buckets
        self._counts: dict[str, list[int]] = {}
        self._sums: dict[str, float] = {}

    def add(self, engine: str, value: float, times: int = 1) -> None:
        counts = self._counts.setdefault(engine, [0] * (len(self._buckets) + 1))
        counts[bisect_left(self._buckets, value)] += times
        self._sums[engine] = self._sums.get(engine, 0.0) + value * times

    def family(self, model: str) -> HistogramMetricFamily:
        """Returns the metric as Prometheus has it: the count of a bucket holds those of all smaller ones."""
        family = HistogramMetricFamily(self._name, self._text, labels=("model_name", "engine"))
        edges = [*map(str, self._buckets), "+Inf"]
        for engine, total in list(self._sums.items()):
            buckets = list(zip(edges, accumulate(self._counts[engine]), strict=True))
            family.add_metric((model, engine), buckets, total)
        return family


def _figures(record: RequestRecord) -> Iterator[tuple[str, float]]:
    """Yields what the histograms are told of a request, without phases that were not reached."""
    queue_s, first_s, total_s = record.queue_s, record.first_token_s, record.total_s
    yield "vllm:e2e_request_latency_seconds", total_s
    yield "vllm:request_prompt_tokens", record.prompt_tokens
    yield "vllm:request_generation_tokens", record.completion_tokens
    yield "vllm:request_params_n", record.num_choices
    if record.max_tokens is not None:
        yield "vllm:request_params_max_tokens", record.max_tokens
    if record.per_token_s is not None:
        yield "vllm:request_time_per_output_token_seconds", record.per_token_s
    if queue_s is not None:
        yield "vllm:request_queue_time_seconds", queue_s
        yield "vllm:request_inference_time_seconds", total_s - queue_s
    if first_s is not None:
        yield "vllm:time_to_first_token_seconds", first_s
        yield "vllm:request_decode_time_seconds", total_s - first_s
    if queue_s is not None and first_s is not None:
        yield "vllm:request_prefill_time_seconds", first_s - queue_s


def _reason(record: RequestRecord) -> str:
    """Returns vLLM's word for how a request ended."""
    if not record.failed:
        return record.outcome
    return "abort" if record.outcome in _ABORTED else "error"


def _one_two_five(largest: int) -> tuple[float, ...]:
    """Returns 1, 2, 5, 10, 20, ... up to ``largest``."""
    steps = (float(first * 10**exponent) for exponent in range(len(str(largest))) for first in (1, 2, 5))
    return tuple(step for step in steps if step <= largest)
