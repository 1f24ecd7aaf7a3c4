"""The same service through ``ray job submit`` on a Ray cluster that was there before."""

import os
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from orchestrator.cli.client import fetch_status, stream_generate
from orchestrator.errors import ServiceError
from protos.heterodyne.v1 import inference_pb2 as pb
from tests.support.clocks import PATIENCE_S
from tests.support.deploying.service import REPOSITORY, Command, free_port

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

BIN = Path(sys.executable).parent
# The entrypoint of a job is run by a shell of the cluster: `python` must be ours there.
ENV = {"PATH": f"{BIN}:{os.environ['PATH']}", "RAY_AUTH_MODE": "disabled", "RAY_DISABLE_IMPORT_WARNING": "1"}


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """A Ray head of our own, with its dashboard; yields the address for jobs."""
    port, dashboard = free_port(), free_port()
    head = Command(
        [
            str(BIN / "ray"), "start", "--head", "--block", "--disable-usage-stats", f"--port={port}",
            "--node-ip-address=127.0.0.1", f"--dashboard-port={dashboard}", "--num-cpus=2",
            "--object-store-memory=100000000",
        ],
        # A job that is stopped gets this long to drain; Ray's own 3 s is less than a drain may take.
        env=ENV | {"RAY_JOB_STOP_WAIT_TIME_S": "60"},
    )  # fmt: skip
    with head:
        head.wait_for("Ray runtime started", 2 * PATIENCE_S)
        yield f"http://127.0.0.1:{dashboard}"


def submit(cluster: str, *args: str) -> Command:
    """The README's command, with this cluster's address and ``args`` for what follows ``orchestrator``."""
    (line,) = re.findall(r"^ray job submit .*$", (REPOSITORY / "README.md").read_text(), re.MULTILINE)
    command, _, _ = line.replace("http://127.0.0.1:8265", cluster).partition(" serve ")
    return Command([*shlex.split(command), *args], env=ENV)


def stop(cluster: str, name: str, job: Command) -> None:
    """Stop a job as the README says, and wait until its logs have ended."""
    with Command([str(BIN / "ray"), "job", "stop", "--address", cluster, name], env=ENV) as command:
        assert command.process.wait(timeout=2 * PATIENCE_S) == 0, command.output()
    job.process.wait(timeout=2 * PATIENCE_S)


def test_a_job_serves_streams_its_logs_and_stops_when_told(cluster: str) -> None:
    address = f"127.0.0.1:{free_port()}"
    job = submit(
        cluster, "serve", "deploy/local.yaml", f"--set=gateway.address={address}", "--set=gateway.http_address=null",
        "--set=telemetry.prometheus_address=null", "--set=cluster.workers=[{threads: 1}]",
    )  # fmt: skip
    with job:
        name = job.wait_for(r"Job '(raysubmit_\w+)' submitted")[1]
        job.wait_for(r"event=ray_without_authentication .*fix=.*RAY_AUTH_MODE=token")
        job.wait_for(rf"event=serving model=demo address={address}")
        result = stream_generate(
            address, pb.GenerateRequest(prompt="And it came to pass", max_tokens=16), timeout_s=PATIENCE_S
        )
        assert result.finished.usage.completion_tokens == 16
        worker = psutil.Process(fetch_status(address).replicas[0].ranks[0].pid)
        stop(cluster, name, job)
        assert re.search("event=drained", job.output()), job.output()
        psutil.wait_procs([worker], timeout=PATIENCE_S)
        assert not worker.is_running()
        with pytest.raises(ServiceError, match="UNAVAILABLE"):
            fetch_status(address)


def test_a_job_that_cannot_start_exits_with_1_and_says_why(cluster: str) -> None:
    with submit(cluster, "serve", "deploy/local.yaml", "--set=serving.blok_size=16") as job:
        assert job.process.wait(timeout=2 * PATIENCE_S) == 1
        assert "serving.blok_size" in job.output() and "block_size" in job.output()


def test_workers_of_one_machine_share_every_layer_of_a_model_that_is_too_large_for_each(cluster: str) -> None:
    address = f"127.0.0.1:{free_port()}"
    workers = "[{threads: 1, memory: 411MiB}, {threads: 1, memory: 411MiB}]"
    job = submit(
        cluster, "serve", "deploy/local.yaml", f"--set=gateway.address={address}", "--set=gateway.http_address=null",
        "--set=telemetry.prometheus_address=null", f"--set=cluster.workers={workers}",
        "--set=model.max_context_tokens=1024", "--set=serving.kv_cache=4MiB", "--set=serving.token_budget=64",
        "--set=serving.max_num_seqs=4",
    )  # fmt: skip
    with job:
        name = job.wait_for(r"Job '(raysubmit_\w+)' submitted")[1]
        job.wait_for(rf"event=serving model=demo address={address}")
        plan = re.findall(r"event=plan replica=replica-0 stage=(\d+) rank=(\d+)", job.output())
        assert plan == [("0", "0"), ("0", "1")], job.output()
        result = stream_generate(address, pb.GenerateRequest(prompt="And", max_tokens=4), timeout_s=PATIENCE_S)
        assert result.finished.usage.completion_tokens == 4
        stop(cluster, name, job)


def test_the_repository_travels_without_its_virtual_environment() -> None:
    ignored = (REPOSITORY / ".gitignore").read_text()
    assert ".venv/" in ignored, "ray leaves out of --working-dir what git ignores"
