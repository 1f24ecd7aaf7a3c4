"""Mistakes through the command line: each ends at once, in one line with field, value and fix, and starts nothing."""

import json
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.support.clocks import PATIENCE_S
from tests.support.deploying.service import REPOSITORY, Command, orchestrator

DEMO = REPOSITORY / "deploy" / "demo"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the demo model to damage."""
    directory = tmp_path / "model"
    directory.mkdir()
    for name in ("config.json", "generation_config.json", "tokenizer.json", "model.safetensors"):
        shutil.copy(DEMO / name, directory / name)
    return directory


def watched(command: Command) -> int:
    """Wait for its end, noting every process that it starts."""
    deadline = time.monotonic() + 2 * PATIENCE_S
    while command.process.poll() is None:
        command.family.look()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return command.process.returncode


@pytest.fixture
def refused(tmp_path: Path, model: Path) -> Callable[..., str]:
    """``refused(**sections)``: serve must refuse that configuration; returns the one line that says why."""

    def run(**sections: dict[str, object]) -> str:
        content: dict[str, dict[str, object]] = {"model": {"path": str(model)}, "gateway": {"address": "127.0.0.1:0"}}
        for section, values in sections.items():
            content.setdefault(section, {}).update(values)
        path = tmp_path / "cluster.yaml"
        path.write_text(yaml.safe_dump(content))
        with orchestrator("serve", str(path)) as command:
            code = watched(command)
            lines = command.output().strip().splitlines()
            # Its own process is all that there ever was: no Ray, no gateway, no worker.
            assert {process.pid for process in command.family.seen} == {command.process.pid}
        assert code == 1, lines
        assert len(lines) == 1 and lines[0].startswith("error: "), lines
        return lines[0]

    return run


def test_an_unknown_key_is_told_the_nearest_known_one(refused: Callable[..., str]) -> None:
    line = refused(serving={"blok_size": 16})
    assert "serving.blok_size" in line and "block_size" in line


def test_a_missing_model_file_is_named(refused: Callable[..., str], model: Path) -> None:
    (model / "tokenizer.json").unlink()
    assert "tokenizer.json" in refused()


def test_a_missing_model_directory_is_named(refused: Callable[..., str], tmp_path: Path) -> None:
    line = refused(model={"path": str(tmp_path / "nowhere")})
    assert "model.path" in line and "does not exist" in line


def test_a_tokenizer_that_cannot_be_read_is_refused(refused: Callable[..., str], model: Path) -> None:
    (model / "tokenizer.json").write_text('{"model": {"type": "Nothing", "vocab": {}}}')
    assert "tokenizer.json" in refused()


def test_a_cpu_worker_of_a_cluster_elsewhere_without_threads_is_refused(refused: Callable[..., str]) -> None:
    assert "cluster.workers.0.threads: is required with cluster.ray_address" in refused(cluster={"ray_address": "auto"})


def test_truncated_weights_are_refused(refused: Callable[..., str], model: Path) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert "model.safetensors" in refused()


def test_a_crafted_header_is_refused(refused: Callable[..., str], model: Path) -> None:
    header = json.dumps({"x": {"dtype": "BF16", "shape": [2**40, 2**40], "data_offsets": [0, 8]}}).encode()
    (model / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    assert "model.safetensors" in refused()


def test_pickled_weights_are_refused_and_safetensors_named(refused: Callable[..., str], model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    assert "safetensors" in refused()


def test_a_port_in_use_is_refused(refused: Callable[..., str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        line = refused(gateway={"address": address})
    assert "gateway.address" in line and address in line and "in use" in line


def test_a_host_that_is_not_ours_is_refused(refused: Callable[..., str]) -> None:
    assert "cluster.bind_host" in refused(cluster={"bind_host": "192.0.2.77", "ray_address": "local"})


def test_too_little_memory_is_refused_with_what_would_fit(refused: Callable[..., str]) -> None:
    line = refused(serving={"kv_cache": "900GiB"})
    assert "serving.kv_cache" in line and "900 GiB" in line


def test_generate_against_nothing_says_so_in_one_line() -> None:
    with orchestrator("generate", "hello", "--address", "127.0.0.1:1", "--timeout", "3") as command:
        assert command.process.wait(timeout=2 * PATIENCE_S) == 1
        (line,) = command.output().strip().splitlines()
    assert line.startswith("error: ") and "127.0.0.1:1" in line


def test_schema_prints_the_committed_schema() -> None:
    with orchestrator("schema") as command:
        assert command.process.wait(timeout=2 * PATIENCE_S) == 0
        assert command.output() == (REPOSITORY / "deploy" / "heterodyne.schema.json").read_text()


@pytest.mark.integration
def test_more_gpus_than_the_cluster_has_are_refused_before_anything_is_launched() -> None:
    sets = (
        "gateway.address=127.0.0.1:0",
        "gateway.http_address=null",
        "telemetry.prometheus_address=null",
        "cluster.workers=[{device: cuda:7}]",
    )
    with orchestrator("serve", "deploy/local.yaml", *(f"--set={item}" for item in sets)) as command:
        assert command.process.wait(timeout=2 * PATIENCE_S) == 1
        last = command.output().strip().splitlines()[-1]
    of_any, of_more = "cluster.workers.0.device: this machine has no CUDA GPU", "cluster.workers: device: asks for more"
    assert last.startswith((f"error: {of_any} ", f"error: {of_more} ")) and "device: cpu" in last


def test_an_address_without_a_port_is_refused() -> None:
    with orchestrator("generate", "hello", "--address", "localhost") as command:
        assert command.process.wait(timeout=2 * PATIENCE_S) == 1
        assert "--address: is not host:port (got 'localhost')" in command.output()
