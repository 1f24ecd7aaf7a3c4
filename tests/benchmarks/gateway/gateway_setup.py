"""What ``make bench-gateway`` measures on: a null worker, a gateway process, client processes."""

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import psutil
import yaml
from rich.console import Console

from orchestrator.config.document import load_config
from orchestrator.deployment.gateway_process import gateway_process
from orchestrator.deployment.preflight import preflight
from orchestrator.deployment.stop_request import StopRequest
from orchestrator.event_log import EventLog
from orchestrator.launcher.process import environment
from protos.heterodyne.v1 import inference_pb2 as pb
from protos.heterodyne.v1 import inference_pb2_grpc as pb_grpc
from tests.benchmarks.engine.engine_models import checkpoint
from tests.benchmarks.gateway.gateway_board import Board

_HERE = Path(__file__).resolve().parent
_OPENING_NS = 2_000_000
_STOP_S = 10.0
_PROBE_S = 60.0
_QUICK_PROBES, _QUICK_S = 3, 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What runs while measurements are taken."""

    address: str
    board: Board
    board_path: Path
    gateway: psutil.Process
    worker: psutil.Process


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """One measurement, all clients together. ``*_cores`` are cores kept busy."""

    tokens_per_s: float
    messages_per_s: float
    requests_per_s: float
    added_us: Sequence[int]
    gateway_cores: float
    worker_cores: float
    client_cores: float


@contextlib.contextmanager
def running(directory: Path, *, most_streams: int) -> Iterator[Setup]:
    """A worker with a null model and a gateway before it."""
    model = checkpoint("null")
    board_path, config_path = directory / "board", directory / "cluster.yaml"
    board = Board.create(board_path)
    gateway_section = {"address": "127.0.0.1:0", "max_in_flight": 2 * most_streams, "drain_grace_s": 0.0}
    config_path.write_text(yaml.safe_dump({"model": {"path": str(model.absolute())}, "gateway": gateway_section}))
    checked = preflight(load_config(config_path, environ={}))
    with (
        _worker(model, board_path, most_streams) as (worker, control),
        gateway_process(config_path, (), checked, control, StopRequest(), EventLog(Console())) as gateway,
    ):
        setup = Setup(
            address=gateway.address,
            board=board,
            board_path=board_path,
            gateway=psutil.Process(gateway.process.pid),
            worker=psutil.Process(worker.pid),
        )
        settle(setup)
        yield setup


@contextlib.contextmanager
def _worker(model: Path, board: Path, most_streams: int) -> "Iterator[tuple[subprocess.Popen[bytes], str]]":
    """The null worker and the address of the controller that it plays."""
    sizes = ["--model", str(model), "--board", str(board), "--sequences", str(most_streams)]
    script = [sys.executable, str(_HERE / "null_worker.py"), *sizes]
    worker = subprocess.Popen(script, env=environment(), stdout=subprocess.PIPE)
    try:
        yield worker, json.loads(_line(worker))["address"]
    finally:
        worker.terminate()
        try:
            worker.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            worker.kill()
        worker.communicate()


def settle(setup: Setup) -> None:
    """Wait until requests pass through at once: nothing of the last measurement is left on its way."""
    setup.board.step_ns = _OPENING_NS
    deadline, quick = time.monotonic() + _PROBE_S, 0
    with grpc.insecure_channel(setup.address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        stub = pb_grpc.InferenceStub(channel)
        while quick < _QUICK_PROBES:
            if time.monotonic() > deadline:
                raise RuntimeError(f"the gateway did not come to rest within {_PROBE_S:g} s")
            began = time.monotonic()
            served = _probe(stub)
            quick = quick + 1 if served and time.monotonic() - began < _QUICK_S else 0


def _probe(stub: pb_grpc.InferenceStub) -> bool:
    """Whether a request of one token was served; no replica is ready for a moment after the start."""
    request = pb.GenerateRequest(prompt_ids=pb.TokenIds(ids=[1000]), max_tokens=1, ignore_eos=True)
    try:
        return bool(list(stub.Generate(request, timeout=_PROBE_S, wait_for_ready=True)))
    except grpc.RpcError as error:
        if error.code() is not grpc.StatusCode.UNAVAILABLE:
            raise
        time.sleep(0.1)
        return False


def measure(setup: Setup, *, streams: int, step_ns: int, max_tokens: int, seconds: float, clients: int) -> Seen:
    """Open the streams over ``clients`` processes, let them flow, count for ``seconds``."""
    clients = min(clients, streams)
    shares = [streams // clients + (index < streams % clients) for index in range(clients)]
    processes = [_client(setup, share, max_tokens, seconds) for share in shares]
    try:
        for process in processes:
            _line(process)
        setup.board.step_ns = step_ns
        # Until the change has passed through.
        time.sleep(min(0.5, seconds / 4))
        return _count(setup, processes, seconds)
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def _count(setup: Setup, processes: "Sequence[subprocess.Popen[bytes]]", seconds: float) -> Seen:
    before, began = [_cpu_s(process) for process in (setup.gateway, setup.worker)], time.monotonic()
    for process in processes:
        assert process.stdin is not None
        process.stdin.write(b"go\n")
        process.stdin.flush()
    time.sleep(seconds)
    after, took_s = [_cpu_s(process) for process in (setup.gateway, setup.worker)], time.monotonic() - began
    setup.board.step_ns = _OPENING_NS
    answers = [json.loads(_line(process)) for process in processes]
    gateway_cores, worker_cores = ((b - a) / took_s for a, b in zip(before, after, strict=True))
    return _together(answers, gateway_cores, worker_cores)


def _client(setup: Setup, streams: int, max_tokens: int, seconds: float) -> "subprocess.Popen[bytes]":
    counts = {"streams": streams, "max-tokens": max_tokens, "seconds": seconds}
    where = ["--address", setup.address, "--board", str(setup.board_path)]
    return subprocess.Popen(
        [sys.executable, str(_HERE / "gateway_client.py"), *where, *(f"--{k}={v}" for k, v in counts.items())],
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )


def _line(process: "subprocess.Popen[bytes]") -> bytes:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"a process of the benchmark ended with exit code {process.wait()}; its words are above")
    return line


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _together(answers: Sequence[Mapping[str, Any]], gateway_cores: float, worker_cores: float) -> Seen:
    def rate(key: str) -> float:
        return sum(float(answer[key]) / float(answer["seconds"]) for answer in answers)

    return Seen(
        tokens_per_s=rate("tokens"),
        messages_per_s=rate("messages"),
        requests_per_s=rate("requests"),
        added_us=sorted(value for answer in answers for value in answer["added_us"]),
        gateway_cores=gateway_cores,
        worker_cores=worker_cores,
        client_cores=rate("cpu_s"),
    )
