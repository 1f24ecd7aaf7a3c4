"""Reports requests as traces and metrics, under the names of OpenTelemetry's GenAI conventions.

Never reports the text of a prompt or an answer.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.metrics import CallbackOptions, Histogram, Observation
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import MetricReader, PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector, start_http_server
from prometheus_client.registry import Collector

from orchestrator.config.document import TelemetryConfig
from orchestrator.config.types import Address
from orchestrator.telemetry.transfers import KvTransfer, TransferMetrics
from placement.errors import InvalidConfig
from protos.codec.log_record import said

logger = logging.getLogger(__name__)

_SYSTEM = "heterodyne"
_OPERATION = "text_completion"
# Bucket boundaries that the GenAI conventions advise.
_DURATION_S = [0.01 * 2**i for i in range(14)]
_FIRST_TOKEN_S = [
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
]  # fmt: skip
_PER_TOKEN_S = [0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5]
_TOKENS = [float(4**i) for i in range(14)]
_NS = 1_000_000_000

# Reads (value, attributes) pairs when metrics are collected, in whatever thread collects them.
Figures = Callable[[], Iterable[tuple[float, Mapping[str, str]]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRecord:
    """A request that has ended, as far as it is reported.

    Attributes:
        completion_tokens: the tokens of all choices together.
        arrived_ns: wall clock, ns since 1970. Durations count from there.
        outcome: a finish reason (``stop``, ``length``), or the name of the gRPC status that ended it.
        failed: whether ``outcome`` is a status.
        parent: the client's trace headers.
        cached_prompt_tokens: found in the prefix cache; None where the prompt was not computed.
        max_tokens: the most tokens of each choice: what was asked for, else the room that was left in the context.
        route_reason: why the replica was chosen, in a sentence; None where it is not known.
        bound_s: until it was bound to a replica.
        route_prefill: the replica that was to compute the prompt for the other; None: it computes it itself.
        transfer: what became of the keys and values that were to be sent; None where that was not reached.
    """

    request_id: str
    model: str
    replica: str
    prompt_tokens: int
    completion_tokens: int
    arrived_ns: int
    total_s: float
    queue_s: float | None
    first_token_s: float | None
    per_token_s: float | None
    outcome: str
    failed: bool
    parent: Mapping[str, str]
    num_choices: int = 1
    cached_prompt_tokens: int | None = None
    max_tokens: int | None = None
    route_reason: str | None = None
    bound_s: float | None = None
    route_prefill: str | None = None
    transfer: KvTransfer | None = None

    @property
    def prefill_replica(self) -> str:
        """Returns the replica that computed the prompt."""
        transfer = self.transfer
        return self.replica if transfer is None or transfer.problem else transfer.prefill


class Telemetry:
    """Owns the service's instruments. Where nothing is configured they cost nothing and report nowhere.

    Args:
        observers: are told of every request that ends, beside the instruments.
        collectors: are scraped by Prometheus, beside the instruments.
    """

    def __init__(
        self,
        config: TelemetryConfig,
        *,
        span_exporter: SpanExporter | None = None,
        observers: Sequence[Callable[[RequestRecord], None]] = (),
        collectors: Sequence[Collector] = (),
    ) -> None:
        self._observers = observers
        resource = Resource.create({"service.name": config.service_name})
        self._closing: list[Callable[[], object]] = []
        readers: list[MetricReader] = []
        exporters = [span_exporter] if span_exporter else []
        if config.prometheus_address is not None:
            registry = _registry(collectors)
            readers.append(PrometheusMetricReader(registry=registry))
            self._serve_prometheus(registry, config.prometheus_address)
        if config.otlp_endpoint is not None:
            insecure = config.otlp_endpoint.startswith("http://")
            readers.append(
                PeriodicExportingMetricReader(OTLPMetricExporter(endpoint=config.otlp_endpoint, insecure=insecure))
            )
            exporters.append(OTLPSpanExporter(endpoint=config.otlp_endpoint, insecure=insecure))
        self._meters = MeterProvider(metric_readers=readers, resource=resource, shutdown_on_exit=False)
        self._traces = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._traced = bool(exporters)  # spans that nobody takes would cost more than the rest of a request's end
        for exporter in exporters:
            self._traces.add_span_processor(BatchSpanProcessor(exporter))
        self._closing += [self._traces.shutdown, self._meters.shutdown]
        self._tracer = self._traces.get_tracer("heterodyne.gateway")
        self._make_instruments()

    def _serve_prometheus(self, registry: CollectorRegistry, address: Address) -> None:
        try:
            server, thread = start_http_server(address.port, addr=address.host, registry=registry)
        except OSError as error:
            raise InvalidConfig(
                field="telemetry.prometheus_address",
                value=str(address),
                problem="cannot be listened on",
                fix="Choose a free port of this host, or null.",
            ) from error

        def close() -> None:
            server.shutdown()
            server.server_close()
            thread.join()

        self._closing.append(close)

    def _make_instruments(self) -> None:
        meter = self._meter = self._meters.get_meter("heterodyne.gateway")

        def histogram(name: str, unit: str, boundaries: list[float], description: str) -> Histogram:
            return meter.create_histogram(
                name, unit=unit, description=description, explicit_bucket_boundaries_advisory=boundaries
            )

        self._duration = histogram(
            "gen_ai.server.request.duration", "s", _DURATION_S, "From the arrival of an accepted request to its end."
        )
        self._first_token = histogram(
            "gen_ai.server.time_to_first_token",
            "s",
            _FIRST_TOKEN_S,
            "From a request's arrival to its first token.",
        )
        self._per_token = histogram(
            "gen_ai.server.time_per_output_token", "s", _PER_TOKEN_S, "Mean time between a request's later tokens."
        )
        self._usage = histogram("gen_ai.client.token.usage", "{token}", _TOKENS, "Tokens of a request, by type.")
        self._refused = meter.create_counter(
            "heterodyne.requests.refused", unit="{request}", description="Requests refused before they were accepted."
        )
        self._transfers = TransferMetrics(meter)

    def gauge(self, name: str, unit: str, description: str, read: Figures) -> None:
        """Adds a figure that is read whenever metrics are collected."""
        self._meter.create_observable_gauge(name, [_observing(read)], unit, description)

    def counter(self, name: str, unit: str, description: str, read: Figures) -> None:
        """Adds a sum that is read whenever metrics are collected, and only grows until it begins anew."""
        self._meter.create_observable_counter(name, [_observing(read)], unit, description)

    def refused(self, code: str) -> None:
        """Counts a request that ended before it was accepted."""
        self._refused.add(1, {"error.type": code})

    def finished(self, record: RequestRecord) -> None:
        """Reports the metrics and spans of an accepted request that has ended."""
        attributes = {
            "gen_ai.operation.name": _OPERATION,
            "gen_ai.provider.name": _SYSTEM,
            "gen_ai.request.model": record.model,
        }
        ended = attributes | ({"error.type": record.outcome} if record.failed else {})
        self._duration.record(record.total_s, ended)
        self._usage.record(record.prompt_tokens, attributes | {"gen_ai.token.type": "input"})
        self._usage.record(record.completion_tokens, attributes | {"gen_ai.token.type": "output"})
        if record.first_token_s is not None:
            self._first_token.record(record.first_token_s, attributes)
        if record.per_token_s is not None:
            self._per_token.record(record.per_token_s, attributes)
        if record.transfer is not None:
            self._transfers.ended(record.transfer, record.replica)
        if self._traced:
            self._trace(record, ended)
        for observer in self._observers:
            observer(record)

    def _trace(self, record: RequestRecord, attributes: dict[str, str]) -> None:
        """Writes the span of a request, and in it those of its phases, as far as these were reached."""
        start, stop = record.arrived_ns, record.arrived_ns + int(record.total_s * _NS)
        request = self._tracer.start_span(
            f"{_OPERATION} {record.model}",
            context=TraceContextTextMapPropagator().extract(record.parent),
            kind=SpanKind.SERVER,
            start_time=start,
            attributes=attributes
            | {
                "gen_ai.usage.input_tokens": record.prompt_tokens,
                "gen_ai.usage.output_tokens": record.completion_tokens,
                "heterodyne.request.id": record.request_id,
                "heterodyne.replica": record.replica,
                "heterodyne.outcome": record.outcome,
            },
        )
        if record.route_reason is not None:
            request.set_attribute("heterodyne.route.reason", record.route_reason)
        if record.route_prefill is not None:
            request.set_attribute("heterodyne.route.prefill", record.route_prefill)
        if record.failed:
            request.set_status(Status(StatusCode.ERROR, record.outcome))
        self._trace_phases(record, request, start, stop)
        request.end(stop)

    def _trace_phases(self, record: RequestRecord, request: Span, start: int, stop: int) -> None:
        """Writes the spans of queue, prefill, the transfer where there was one, and decode, one after the other."""
        queued = stop if record.queue_s is None else start + int(record.queue_s * _NS)
        first = stop if record.first_token_s is None else start + int(record.first_token_s * _NS)
        in_gateway = {} if record.bound_s is None else {"heterodyne.queue.gateway_s": record.bound_s}
        self._phase("queue", request, start, queued, in_gateway)
        transfer, prefilled = record.transfer, first
        if transfer is not None and not transfer.problem:
            prefilled = min(first, queued + int(transfer.prefill_s * _NS))
        if record.queue_s is not None:
            self._phase("prefill", request, queued, prefilled, {"heterodyne.replica": record.prefill_replica})
        if transfer is not None:
            # One that failed has no place of its own: the prompt was computed again, which is the prefill.
            self._phase("kv_transfer", request, prefilled, first, transfer.attributes(), failed=bool(transfer.problem))
        if record.first_token_s is not None:
            self._phase("decode", request, first, stop, {"heterodyne.replica": record.replica})

    def _phase(
        self,
        name: str,
        request: Span,
        start: int,
        stop: int,
        attributes: Mapping[str, str | int | float | bool],
        *,
        failed: bool = False,
    ) -> None:
        context = set_span_in_context(request)
        span = self._tracer.start_span(name, context=context, start_time=start, attributes=attributes)
        if failed:
            span.set_status(Status(StatusCode.ERROR))
        span.end(max(start, stop))

    def close(self, timeout_s: float = 3.0) -> None:
        """Sends what is still held and stops listening, within ``timeout_s``. Blocks, so it is not for an event loop.

        What a receiver has not taken by then is lost.
        """
        deadline = time.monotonic() + timeout_s
        # The exporters retry for longer than a drained service may take to end; nothing waits for these threads.
        closers = [threading.Thread(target=close, daemon=True) for close in self._closing]
        for closer in closers:
            closer.start()
        for closer in closers:
            closer.join(max(0.0, deadline - time.monotonic()))
        if any(closer.is_alive() for closer in closers):
            words = "The last telemetry was not taken within %g s, and is lost."
            logger.warning(words, timeout_s, extra=said("telemetry_not_sent", timeout_s=timeout_s))


def _registry(collectors: Sequence[Collector]) -> CollectorRegistry:
    """Returns a registry of our own, so that two services in one process do not share their figures."""
    registry = CollectorRegistry()
    for collect in (ProcessCollector, PlatformCollector, GCCollector):
        collect(registry=registry)
    for collector in collectors:
        registry.register(collector)
    return registry


def _observing(read: Figures) -> Callable[[CallbackOptions], Iterable[Observation]]:
    return lambda _: [Observation(value, dict(attributes)) for value, attributes in read()]
