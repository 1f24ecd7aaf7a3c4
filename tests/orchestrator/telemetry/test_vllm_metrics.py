"""vLLM's metrics as Prometheus scrapes them: the names, labels and buckets of vLLM, the figures of our replicas."""

import asyncio
import shutil
import subprocess
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from orchestrator.config.document import load_config
from orchestrator.telemetry.requests import RequestRecord
from orchestrator.telemetry.vllm_metrics import VllmMetrics
from placement.errors import InvalidConfig
from protos.heterodyne.v1 import inference_pb2, inference_pb2_grpc
from protos.heterodyne.worker.v1 import worker_pb2
from tests.support.clocks import until
from tests.support.deploying.deployment import Deployment, deploy, make_config
from tests.support.deploying.service import free_port

# As vLLM's /metrics has them (0.11 to 0.32), by type. What it measures that we do not have is left out.
GAUGES = {"vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"}
COUNTERS = {
    "vllm:num_preemptions", "vllm:prompt_tokens", "vllm:generation_tokens", "vllm:prefix_cache_queries",
    "vllm:prefix_cache_hits", "vllm:request_success",
}  # fmt: skip
LATENCY_S = "0.3 0.5 0.8 1.0 1.5 2.0 2.5 5.0 10.0 15.0 20.0 30.0 40.0 50.0 60.0 120.0 240.0 480.0 960.0 1920.0 7680.0"
TOKEN_S = "0.01 0.025 0.05 0.075 0.1 0.15 0.2 0.3 0.4 0.5 0.75 1.0 2.5 5.0 7.5 10.0 20.0 40.0 80.0"
FIRST_S = (
    "0.001 0.005 0.01 0.02 0.04 0.06 0.08 0.1 0.25 0.5 0.75 1.0 2.5 5.0 7.5 10.0 20.0 40.0 80.0 160.0 640.0 2560.0"
)
SIZES_OF_512 = "1.0 2.0 5.0 10.0 20.0 50.0 100.0 200.0 500.0"
HISTOGRAMS = {
    "vllm:time_to_first_token_seconds": FIRST_S,
    "vllm:inter_token_latency_seconds": TOKEN_S,
    "vllm:request_time_per_output_token_seconds": TOKEN_S,
    "vllm:e2e_request_latency_seconds": LATENCY_S,
    "vllm:request_queue_time_seconds": LATENCY_S,
    "vllm:request_prefill_time_seconds": LATENCY_S,
    "vllm:request_decode_time_seconds": LATENCY_S,
    "vllm:request_inference_time_seconds": LATENCY_S,
    "vllm:iteration_tokens_total": "1.0 8.0 16.0 32.0 64.0 128.0 256.0 512.0 1024.0 2048.0 4096.0 8192.0 16384.0",
    "vllm:request_prompt_tokens": SIZES_OF_512,
    "vllm:request_generation_tokens": SIZES_OF_512,
    "vllm:request_params_max_tokens": SIZES_OF_512,
    "vllm:request_params_n": "1.0 2.0 5.0 10.0 20.0",
}
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


class Scene:
    """Metrics of a model ``m`` on replicas that say what they are told to, under a clock that is set."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.reports: dict[str, worker_pb2.LoadReport] = {}
        self.num_queued = 0
        self.metrics = VllmMetrics(
            model="m",
            max_context_tokens=512,
            block_size=lambda replica: {"replica-1": 32}.get(replica, 16),
            reports=lambda: self.reports.items(),
            num_queued=lambda: self.num_queued,
            clock=lambda: self.now_s,
        )
        self._registry = CollectorRegistry()
        self._registry.register(self.metrics)

    def step(self, *outputs: dict[str, Any], replica: str = "replica-0", num_tokens: int = 1) -> None:
        sequences = [worker_pb2.SequenceOutput(**output) for output in outputs]
        self.metrics.stepped(replica, worker_pb2.StepOutput(sequences=sequences, num_tokens=num_tokens))

    def scrape(self) -> dict[str, Metric]:
        return families(generate_latest(self._registry).decode())

    def value(self, name: str, engine: str = "replica-0", **labels: str) -> float | None:
        return samples(self.scrape()).get((name, frozenset({"model_name": "m", "engine": engine, **labels}.items())))


def families(text: str) -> dict[str, Metric]:
    return {family.name: family for family in text_string_to_metric_families(text)}


def samples(found: Mapping[str, Metric]) -> Samples:
    return {(s.name, frozenset(s.labels.items())): s.value for family in found.values() for s in family.samples}


def record(**fields: Any) -> RequestRecord:
    base: dict[str, Any] = {
        "request_id": "r", "model": "m", "replica": "replica-0", "prompt_tokens": 3, "completion_tokens": 5,
        "arrived_ns": 0, "total_s": 3.0, "queue_s": 0.25, "first_token_s": 1.0, "per_token_s": 0.5,
        "outcome": "stop", "failed": False, "parent": {}, "num_choices": 2, "max_tokens": 64,
    }  # fmt: skip
    return RequestRecord(**base | fields)


def test_a_request_is_in_every_histogram_of_its_times_and_sizes() -> None:
    scene = Scene()
    scene.metrics.finished(record())
    sums = {name: scene.value(f"{name}_sum") for name in HISTOGRAMS}
    assert sums == {
        "vllm:time_to_first_token_seconds": 1.0,
        "vllm:inter_token_latency_seconds": None,
        "vllm:request_time_per_output_token_seconds": 0.5,
        "vllm:e2e_request_latency_seconds": 3.0,
        "vllm:request_queue_time_seconds": 0.25,
        "vllm:request_prefill_time_seconds": 0.75,
        "vllm:request_decode_time_seconds": 2.0,
        "vllm:request_inference_time_seconds": 2.75,
        "vllm:iteration_tokens_total": None,
        "vllm:request_prompt_tokens": 3.0,
        "vllm:request_generation_tokens": 5.0,
        "vllm:request_params_max_tokens": 64.0,
        "vllm:request_params_n": 2.0,
    }
    assert scene.value("vllm:request_decode_time_seconds_bucket", le="1.5") == 0
    assert scene.value("vllm:request_decode_time_seconds_bucket", le="2.0") == 1


def test_a_request_that_never_ran_is_in_those_that_it_reached() -> None:
    scene = Scene()
    none = {"queue_s": None, "first_token_s": None, "per_token_s": None, "max_tokens": None}
    scene.metrics.finished(record(outcome="UNAVAILABLE", failed=True, completion_tokens=0, **none))
    counted = {name for name in HISTOGRAMS if scene.value(f"{name}_count") == 1}
    assert counted == {
        "vllm:e2e_request_latency_seconds", "vllm:request_prompt_tokens", "vllm:request_generation_tokens",
        "vllm:request_params_n",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("outcome", "failed", "reason"),
    [
        ("stop", False, "stop"), ("length", False, "length"), ("CANCELLED", True, "abort"),
        ("DEADLINE_EXCEEDED", True, "abort"), ("UNAVAILABLE", True, "error"), ("INTERNAL", True, "error"),
    ],
)  # fmt: skip
def test_ends_are_counted_by_vllms_reasons(outcome: str, failed: bool, reason: str) -> None:
    scene = Scene()
    scene.metrics.finished(record(outcome=outcome, failed=failed))
    counts = {
        each: scene.value("vllm:request_success_total", finished_reason=each)
        for each in ("stop", "length", "abort", "error")
    }
    assert counts == {**dict.fromkeys(counts, 0.0), reason: 1.0}


def test_gaps_are_those_between_the_tokens_of_one_sequence() -> None:
    scene = Scene()
    scene.step({"sequence_id": 1, "prompt": {"first_index": 1}})
    scene.now_s += 10
    scene.step({"sequence_id": 1, "index": 0}, {"sequence_id": 2, "index": 0})
    scene.now_s += 0.03
    scene.step({"sequence_id": 1, "index": 1}, num_tokens=40)
    scene.now_s += 0.06
    scene.step({"sequence_id": 1, "index": 2, "end": {}}, {"sequence_id": 2, "index": 1})
    scene.now_s += 5
    scene.step({"sequence_id": 2, "end": {}}, {"sequence_id": 2, "index": 9}, replica="replica-1")
    assert scene.value("vllm:inter_token_latency_seconds_count") == 3
    assert scene.value("vllm:inter_token_latency_seconds_sum") == pytest.approx(0.03 + 0.06 + 0.09)
    assert scene.value("vllm:inter_token_latency_seconds_bucket", le="0.05") == 1
    assert scene.value("vllm:inter_token_latency_seconds_count", "replica-1") is None
    assert scene.value("vllm:iteration_tokens_total_sum") == 43


def test_sequences_that_never_end_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.telemetry.vllm_metrics._MAX_GAPS", 2)
    scene = Scene()
    scene.step(*({"sequence_id": i, "index": 0} for i in range(3)))
    scene.now_s += 1
    scene.step(*({"sequence_id": i, "index": 1} for i in range(3)))
    assert scene.value("vllm:inter_token_latency_seconds_count") == 2, "the oldest one was forgotten"


def test_replicas_are_engines_and_the_gateways_queue_is_one_that_waits() -> None:
    scene = Scene()
    assert scene.value("vllm:num_requests_waiting", "gateway") == 0
    scene.num_queued = 7
    scene.reports["replica-1"] = worker_pb2.LoadReport(
        num_running=3, num_waiting=2, free_blocks=30, total_blocks=40, num_preemptions=4, prompt_tokens=50,
        output_tokens=60, prefix_queries=70, prefix_hits=8,
    )  # fmt: skip
    values = {name: scene.value(name, "replica-1") for name in GAUGES}
    assert values == {
        "vllm:num_requests_running": 3, "vllm:num_requests_waiting": 2, "vllm:kv_cache_usage_perc": 0.25,
    }  # fmt: skip
    totals = {name: scene.value(f"{name}_total", "replica-1") for name in COUNTERS - {"vllm:request_success"}}
    assert totals == {
        "vllm:num_preemptions": 4, "vllm:prompt_tokens": 50, "vllm:generation_tokens": 60,
        "vllm:prefix_cache_queries": 70, "vllm:prefix_cache_hits": 8,
    }  # fmt: skip
    assert scene.value("vllm:num_requests_waiting", "gateway") == 7
    info = frozenset({"engine": "replica-1", "block_size": "32", "num_gpu_blocks": "40"}.items())
    assert samples(scene.scrape())["vllm:cache_config_info", info] == 1
    scene.reports.clear()
    assert scene.value("vllm:num_requests_running", "replica-1") is None, "a replica that is gone has no figures"


def test_the_switch_alone_is_a_contradiction(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("model: {path: m}\ntelemetry: {vllm_metrics: true}\n")
    with pytest.raises(InvalidConfig) as caught:
        load_config(tmp_path / "c.yaml", environ={})
    assert caught.value.field == "telemetry.vllm_metrics"
    assert "telemetry.prometheus_address is not" in caught.value.problem


async def scraped(served_checkpoint: Path, directory: Path, **telemetry: object) -> str:
    """What Prometheus sees of a service on which two requests with a long prompt in common were answered."""
    port = free_port()
    config = make_config(
        directory, served_checkpoint, telemetry={"prometheus_address": f"127.0.0.1:{port}", **telemetry}
    )
    async with deploy(config) as running, grpc.aio.insecure_channel(running.address) as channel:
        stub: Any = inference_pb2_grpc.InferenceStub(channel)
        for index in range(2):
            message = inference_pb2.GenerateRequest(
                prompt="In the beginning of the waters " * 8, max_tokens=6, ignore_eos=True, request_id=str(index)
            )
            assert [response async for response in stub.Generate(message)]
        await until(lambda: reported(running))
        return await asyncio.to_thread(
            lambda: urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
        )


def reported(running: Deployment) -> bool:
    """Whether the replica has told of both answers, and of their end."""
    replica = running.gateway.fleet.deployment.replicas[0]
    leader = running.gateway.fleet.leader(replica.name, replica.epoch)
    load = None if leader is None else leader.load
    return load is not None and load.output_tokens == 12 and not (load.num_running or load.num_waiting)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def scrape(served_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return await scraped(served_checkpoint, tmp_path_factory.mktemp("scrape"), vllm_metrics=True)


def test_a_service_is_scraped_with_every_name_type_label_and_bucket(scrape: str, served_checkpoint: Path) -> None:
    found = families(scrape)
    kinds = {name: found[name].type for name in GAUGES | COUNTERS | set(HISTOGRAMS)}
    assert kinds == dict.fromkeys(GAUGES, "gauge") | dict.fromkeys(COUNTERS, "counter") | dict.fromkeys(
        HISTOGRAMS, "histogram"
    )
    for family in (found[name] for name in kinds):
        assert family.documentation and family.samples
        for sample in family.samples:
            assert sample.labels["model_name"] == served_checkpoint.name
            assert sample.labels["engine"] in ("replica-0", "gateway")
    for histogram, buckets in HISTOGRAMS.items():
        edges = [s.labels["le"] for s in found[histogram].samples if s.name.endswith("_bucket")]
        assert edges == [*buckets.split(), "+Inf"]


def test_its_figures_are_those_of_what_it_did(scrape: str, served_checkpoint: Path) -> None:
    figures, model = samples(families(scrape)), served_checkpoint.name

    def value(name: str, **labels: str) -> float:
        return figures[name, frozenset({"model_name": model, "engine": "replica-0", **labels}.items())]

    assert value("vllm:request_success_total", finished_reason="length") == 2
    assert value("vllm:generation_tokens_total") == value("vllm:request_generation_tokens_sum") == 12
    assert value("vllm:prompt_tokens_total") == value("vllm:request_prompt_tokens_sum") > 2 * 16
    assert value("vllm:inter_token_latency_seconds_count") == 10
    assert value("vllm:time_to_first_token_seconds_count") == 2
    assert value("vllm:iteration_tokens_total_count") >= 12
    assert value("vllm:num_requests_running") == value("vllm:num_requests_waiting") == 0
    assert value("vllm:prefix_cache_queries_total") >= value("vllm:prompt_tokens_total") / 2
    assert value("vllm:prefix_cache_hits_total") >= 16, "the second request found the first one's prompt"
    native = {name: value for (name, labels), value in figures.items() if ("replica", "replica-0") in labels}
    for ours, theirs in (
        ("prefix_cache_queries", "prefix_cache_queries"), ("prefix_cache_hits", "prefix_cache_hits"),
        ("preemptions", "num_preemptions"), ("output_tokens", "generation_tokens"), ("prompt_tokens", "prompt_tokens"),
    ):  # fmt: skip
        assert native[f"heterodyne_replica_{ours}_total"] == value(f"vllm:{theirs}_total")
    assert native["heterodyne_replica_steps_total"] > 0


def test_promtool_has_nothing_against_names_of_our_own(scrape: str) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian: apt-get install prometheus)")
    command = [promtool, "check", "metrics"]
    result = subprocess.run(command, input=scrape, capture_output=True, text=True, check=False)
    # 3: it can be read and has names against the style, as all of vLLM's are with their colon.
    assert result.returncode in (0, 3), result.stderr
    ours = [line for line in result.stderr.splitlines() if line and not line.startswith("vllm:")]
    assert not ours, ours


async def test_without_the_switch_vllms_names_are_not_there(served_checkpoint: Path, tmp_path: Path) -> None:
    found = families(await scraped(served_checkpoint, tmp_path))
    assert not [name for name in found if name.startswith("vllm")]
    assert found["heterodyne_replica_kv_cache_usage"].samples
    assert found["gen_ai_server_request_duration_seconds"].samples
    assert found["process_resident_memory_bytes"].samples
