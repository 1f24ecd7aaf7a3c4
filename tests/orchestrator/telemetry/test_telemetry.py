"""Traces and metrics as they leave: over OTLP to a real receiver, and never with text in them."""

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from concurrent import futures
from dataclasses import dataclass, field, replace
from functools import partialmethod
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2, metrics_service_pb2_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from orchestrator.config.document import TelemetryConfig
from orchestrator.telemetry.requests import RequestRecord, Telemetry
from orchestrator.telemetry.transfers import KvTransfer
from protos.heterodyne.v1 import inference_pb2, inference_pb2_grpc
from tests.support.clocks import PATIENCE_S
from tests.support.deploying.deployment import deploy, make_config

SECRET = "In the beginning of the waters"


@dataclass
class Receiver(trace_service_pb2_grpc.TraceServiceServicer, metrics_service_pb2_grpc.MetricsServiceServicer):
    """An OTLP collector that keeps what it is sent."""

    spans: list[Any] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)
    raw: bytes = b""

    def Export(self, request: Any, context: Any) -> Any:
        self.raw += request.SerializeToString()
        if isinstance(request, trace_service_pb2.ExportTraceServiceRequest):
            self.spans += [s for r in request.resource_spans for scope in r.scope_spans for s in scope.spans]
            return trace_service_pb2.ExportTraceServiceResponse()
        for resource in request.resource_metrics:
            for scope in resource.scope_metrics:
                self.metrics |= {metric.name: metric for metric in scope.metrics}
        return metrics_service_pb2.ExportMetricsServiceResponse()


@pytest_asyncio.fixture
async def receiver() -> AsyncIterator[tuple[Receiver, str]]:
    kept = Receiver()
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(kept, server)
    metrics_service_pb2_grpc.add_MetricsServiceServicer_to_server(kept, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield kept, f"http://127.0.0.1:{port}"
    server.stop(0).wait()


def attributes(span: Any) -> dict[str, Any]:
    return {item.key: getattr(item.value, item.value.WhichOneof("value")) for item in span.attributes}


async def test_a_request_is_traced_as_queue_prefill_and_decode_without_its_text(
    receiver: tuple[Receiver, str], served_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, endpoint = receiver
    # What was not taken within the usual 3 s is lost, which is no concern of this test.
    monkeypatch.setattr(Telemetry, "close", partialmethod(Telemetry.close, PATIENCE_S))
    config = make_config(tmp_path, served_checkpoint, telemetry={"otlp_endpoint": endpoint})
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    async with deploy(config) as running, grpc.aio.insecure_channel(running.address) as channel:
        message = inference_pb2.GenerateRequest(prompt=SECRET, max_tokens=6, ignore_eos=True, request_id="mine")
        call = inference_pb2_grpc.InferenceStub(channel).Generate(message, metadata=(("traceparent", parent),))
        answer = "".join([response.chunk.text async for response in call])
    # Leaving the deployment closes the exporters, which sends what they held.
    await asyncio.sleep(0)
    spans = {span.name: span for span in kept.spans}
    assert set(spans) == {f"text_completion {served_checkpoint.name}", "queue", "prefill", "decode"}
    request = spans[f"text_completion {served_checkpoint.name}"]
    assert request.trace_id.hex() == "0af7651916cd43dd8448eb211c80319c"
    assert request.parent_span_id.hex() == "b7ad6b7169203331"
    known = attributes(request)
    assert known["heterodyne.request.id"] == "mine"
    assert known["gen_ai.usage.output_tokens"] == 6
    assert known["heterodyne.outcome"] == "length"
    assert known["heterodyne.route.reason"].startswith("the first token is expected from replica-0 in ")
    phases = [spans[name] for name in ("queue", "prefill", "decode")]
    assert all(phase.parent_span_id == request.span_id for phase in phases)
    edges = [request.start_time_unix_nano, *(phase.end_time_unix_nano for phase in phases)]
    assert edges == sorted(edges)
    assert [phase.start_time_unix_nano for phase in phases] == edges[:3], "the phases follow each other with no gap"
    assert edges[3] == request.end_time_unix_nano
    assert {
        "gen_ai.server.request.duration",
        "gen_ai.server.time_to_first_token",
        "gen_ai.server.time_per_output_token",
        "gen_ai.client.token.usage",
    } <= set(kept.metrics)
    assert SECRET.encode() not in kept.raw
    assert len(answer) > 3 and answer.encode() not in kept.raw


def test_close_returns_in_time_when_no_receiver_answers() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))  # takes the port, and never answers
        telemetry = Telemetry(TelemetryConfig(otlp_endpoint=f"http://127.0.0.1:{silent.getsockname()[1]}"))
        telemetry.finished(record())
        started = time.monotonic()
        telemetry.close(0.3)
        assert time.monotonic() - started < 8.0, "the exporters' own limits begin at 10 s"


def record(**fields: Any) -> RequestRecord:
    base: dict[str, Any] = {
        "request_id": "r",
        "model": "m",
        "replica": "replica-0",
        "prompt_tokens": 3,
        "completion_tokens": 0,
        "arrived_ns": 1_000_000_000,
        "total_s": 2.0,
        "queue_s": None,
        "first_token_s": None,
        "per_token_s": None,
        "outcome": "UNAVAILABLE",
        "failed": True,
        "parent": {},
    }
    return RequestRecord(**base | fields)


@pytest.mark.parametrize(
    ("fields", "phases"),
    [
        ({}, ["queue"]),
        ({"queue_s": 0.5}, ["queue", "prefill"]),
        ({"queue_s": 0.5, "first_token_s": 1.0}, ["queue", "prefill", "decode"]),
    ],
)
def test_a_request_that_failed_has_the_phases_it_reached(fields: dict[str, float], phases: list[str]) -> None:
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter = InMemorySpanExporter()
    telemetry = Telemetry(TelemetryConfig(), span_exporter=exporter)
    telemetry.finished(record(**fields))
    telemetry.close()
    *children, request = sorted(exporter.get_finished_spans(), key=lambda span: span.name.startswith("text"))
    assert [span.name for span in children] == phases
    assert children[-1].end_time == request.end_time == 3_000_000_000
    assert request.status.is_ok is False
    assert request.attributes is not None and request.attributes["error.type"] == "UNAVAILABLE"


TRANSFER = KvTransfer(
    prefill="replica-1", num_tokens=100, num_bytes=4096, queue_s=0.1, prefill_s=0.3, exposed_s=0.1, by_layer=True
)


@pytest.mark.parametrize("problem", ["", "10.0.0.7 was lost"])
def test_a_request_of_two_replicas_has_a_span_for_its_transfer_and_names_who_did_what(problem: str) -> None:
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter = InMemorySpanExporter()
    telemetry = Telemetry(TelemetryConfig(), span_exporter=exporter)
    transfer = replace(TRANSFER, problem=problem)
    times = {"bound_s": 0.2, "queue_s": 0.5, "first_token_s": 1.0}
    telemetry.finished(
        record(route_prefill="replica-1", route_reason="it is idle", transfer=transfer, **times, failed=False)
    )
    telemetry.close()
    spans = {span.name: span for span in exporter.get_finished_spans()}
    known = {name: dict(span.attributes or {}) for name, span in spans.items()}
    assert known["text_completion m"]["heterodyne.route.prefill"] == "replica-1"
    assert known["text_completion m"]["heterodyne.route.reason"] == "it is idle"
    assert known["queue"]["heterodyne.queue.gateway_s"] == 0.2
    assert known["decode"]["heterodyne.replica"] == "replica-0"
    assert known["prefill"]["heterodyne.replica"] == ("replica-0" if problem else "replica-1")
    sent = {name.removeprefix("heterodyne.kv_transfer."): value for name, value in known["kv_transfer"].items()}
    assert (sent["bytes"], sent["tokens"], sent["exposed_s"], sent["by_layer"]) == (4096, 100, 0.1, True)
    assert sent.get("problem", "") == problem and spans["kv_transfer"].status.is_ok is not bool(problem)
    edges = [spans[name].end_time for name in ("queue", "prefill", "kv_transfer", "decode")]
    starts = [spans[name].start_time for name in ("prefill", "kv_transfer", "decode")]
    assert starts == edges[:3] == ([1.5e9, 2e9, 2e9] if problem else [1.5e9, 1.8e9, 2e9]), "no gap"


async def test_transfers_are_counted_by_pair_and_outcome_with_their_bytes_and_what_was_not_hidden(
    receiver: tuple[Receiver, str],
) -> None:
    kept, endpoint = receiver
    telemetry = Telemetry(TelemetryConfig(otlp_endpoint=endpoint))
    for problem in ("", "", "it broke"):
        telemetry.finished(record(transfer=replace(TRANSFER, problem=problem)))
    await asyncio.to_thread(telemetry.close, PATIENCE_S)
    counts = {
        tuple(sorted(attributes(point).values())): point.as_int
        for point in kept.metrics["heterodyne.kv_transfers"].sum.data_points
    }
    assert counts == {("came", "replica-0", "replica-1"): 2, ("failed", "replica-0", "replica-1"): 1}
    (size,) = kept.metrics["heterodyne.kv_transfer.size"].histogram.data_points
    (exposed,) = kept.metrics["heterodyne.kv_transfer.exposed"].histogram.data_points
    assert (size.count, size.sum, exposed.count, exposed.sum) == (2, 8192, 2, 0.2)
