"""What is refused before any process starts, and what the refusal says."""

import json
import os
import socket
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from orchestrator.deployment.known_cluster import measure_machine
from placement.errors import InvalidConfig, InvalidModel, NotEnoughMemory
from placement.model.specs import DType
from placement.model.weights import num_parameters
from tests.support.deploying.preflight import CONFIG, check, make_model, refused, tensors


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_model(tmp_path)


def test_sound_model_is_planned(model: Path) -> None:
    checked = check(model, cluster={"workers": [{"count": 2}]})
    assert checked.num_parameters == num_parameters(checked.model)
    assert checked.checkpoint_bytes == (model / "model.safetensors").stat().st_size
    assert checked.plan.dtype is DType.BFLOAT16
    leaders = [replica.leader for replica in checked.plan.replicas]
    assert [(shard.node, shard.device.name, shard.device.num_threads) for shard in leaders] == [
        ("local", "cpu", 4), ("local", "cpu", 4),
    ]  # fmt: skip


def test_dtype_of_the_configuration_wins_over_the_models(model: Path) -> None:
    assert check(model, model={"path": str(model), "dtype": "float32"}).plan.dtype is DType.FLOAT32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_float16_weights_are_served_as_the_dtype_asked_for_and_only_so(model: Path, dtype: str) -> None:
    (model / "config.json").write_text(json.dumps(CONFIG | {"dtype": "float16"}))
    save_file({name: value.astype(np.float16) for name, value in tensors().items()}, model / "model.safetensors")
    assert check(model, model={"path": str(model), "dtype": dtype}).plan.dtype is DType(dtype)
    error = refused(InvalidModel, lambda: check(model))
    assert (error.field, error.value) == ("config.json: dtype", "float16")
    assert error.fix.startswith("Set model.dtype to bfloat16 or float32 in the cluster file")


def test_directory_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    error = refused(InvalidConfig, lambda: check(tmp_path / "none"))
    assert (error.field, error.value) == ("model.path", str(tmp_path / "none"))
    assert error.problem == "does not exist"
    assert error.fix == "Give the directory that holds config.json and the safetensors files."


def test_sampling_defaults_that_no_sampler_could_use_are_refused(model: Path) -> None:
    (model / "generation_config.json").write_text('{"do_sample": true, "top_p": 1.5}')
    assert refused(InvalidModel, lambda: check(model)).field == "generation_config.json: top_p"


@pytest.mark.parametrize(("section", "key"), [("gateway", "address"), ("telemetry", "prometheus_address")])
def test_port_in_use_is_refused_with_a_free_one(model: Path, section: str, key: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        error = refused(InvalidConfig, lambda: check(model, **{section: {key: f"127.0.0.1:{port}"}}))
        assert (error.field, error.value) == (f"{section}.{key}", f"127.0.0.1:{port}")
        assert error.problem == "is in use by another process"
        start = f"Stop that process, or set {section}.{key} to another port, such as 127.0.0.1:"
        assert error.fix.startswith(start)
        free = int(error.fix.removeprefix(start).rstrip("."))
        socket.create_server(("127.0.0.1", free)).close()
    assert check(model, **{section: {key: f"127.0.0.1:{port}"}})


def test_port_whose_last_connection_still_lingers_counts_as_free(model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
        with socket.create_connection(address) as client:
            accepted, _ = server.accept()
            accepted.close()  # closed here first: the server's end stays in TIME_WAIT
            assert client.recv(1) == b""
    assert check(model, gateway={"address": f"127.0.0.1:{address[1]}"})


def test_address_of_another_machine_is_refused(model: Path) -> None:
    error = refused(InvalidConfig, lambda: check(model, gateway={"address": "192.0.2.1:6000"}))
    assert (error.field, error.value) == ("gateway.address", "192.0.2.1:6000")
    assert error.problem == "is not an address of this machine"
    assert error.fix == "Set gateway.address to 127.0.0.1:6000, or to 0.0.0.0:6000 for all interfaces."


def test_workers_that_do_not_fit_in_memory_are_refused(model: Path) -> None:
    error = refused(NotEnoughMemory, lambda: check(model, cluster={"workers": [{"memory": "100MiB"}]}))
    assert error.field == "model.path"
    assert error.problem.endswith("and cpu of node local has 100 MiB")


def test_a_worker_of_more_threads_than_cores_is_refused_on_this_machine_only(model: Path) -> None:
    workers = [{"device": "cuda:0", "threads": 64}, {"threads": 64}]
    error = refused(InvalidConfig, lambda: check(model, cluster={"workers": workers}))
    assert (error.field, error.value) == ("cluster.workers.1.threads", 64)
    assert error.problem == "is more than the 8 cores that this machine, or the limit of its container, gives"
    assert error.fix == "Set it to 8 or less, or leave it out."
    assert check(model, cluster={"workers": [{"threads": 8}]})
    assert check(model, cluster={"workers": workers, "ray_address": "auto"})


def test_gpu_of_unknown_memory_is_left_to_its_worker(model: Path) -> None:
    checked = check(model, cluster={"workers": [{"device": "cuda:3"}]})
    assert checked.plan.replicas[0].leader.device.name == "cuda:3"


def test_nodes_of_a_cluster_elsewhere_are_placeholders(model: Path) -> None:
    workers = [{"device": "cuda:0", "count": 2}, {"memory": "4GiB", "threads": 3}]
    checked = check(model, cluster={"ray_address": "auto", "workers": workers})
    leaders = [replica.leader for replica in checked.plan.replicas]
    assert [(shard.node, shard.device.name) for shard in leaders] == [
        ("node-0", "cuda:0"), ("node-1", "cuda:0"), ("node-2", "cpu"),
    ]  # fmt: skip
    assert (leaders[2].device.memory_bytes, leaders[2].device.num_threads) == (2**32, 3)


def test_distribution_that_shadows_ours_is_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: {"kernels": "0.11.0"}[name])
    error = refused(InvalidConfig, lambda: check(model))
    assert (error.field, error.value) == ("Python environment", "kernels 0.11.0")
    assert error.fix == "Run: python -m pip uninstall kernels"


def test_machine_is_measured() -> None:
    machine = measure_machine()
    assert machine.memory_bytes > 2**20
    assert 1 <= machine.num_cores <= (os.cpu_count() or 1)
