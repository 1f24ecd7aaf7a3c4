"""What is refused before any process starts, and what the refusal says."""

import json
import os
import re
import socket
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from orchestrator.config.document import load_config
from orchestrator.deployment.known_cluster import measure_machine
from orchestrator.deployment.plan_lines import context_words, plan_events
from orchestrator.deployment.preflight import Checked, preflight
from placement.errors import InvalidConfig, InvalidModel, NotEnoughMemory
from placement.model.specs import DType
from placement.model.weights import num_parameters
from tests.support.deploying.preflight import CONFIG, MACHINE, check, configured, make_model, refused, tensors


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
    hub = "meta-llama/Llama-3.2-1B"
    (tmp_path / "cluster.yaml").write_text(f"model: {{path: {hub}}}")
    error = refused(InvalidConfig, lambda: preflight(load_config(tmp_path / "cluster.yaml", environ={}), listens=False))
    assert error.fix.endswith(f" Nothing is downloaded: `hf download {hub}` prints the directory to give here.")
    assert "hf download" not in refused(InvalidConfig, lambda: check(tmp_path / "none")).fix


def test_a_file_in_place_of_a_directory_is_called_what_it_is(model: Path) -> None:
    gguf = model / "q4.gguf"
    gguf.write_bytes(b"GGUF")
    error = refused(InvalidModel, lambda: check(gguf))
    assert error.problem == f"{gguf} is a single file, not a model directory"
    assert error.fix == "GGUF is not served: download the model's safetensors version."
    error = refused(InvalidConfig, lambda: check(model / "model.safetensors"))
    assert (error.field, error.problem) == ("model.path", "is not a directory")
    assert error.fix == "Give the directory that holds config.json and the safetensors files."


def test_a_slow_tokenizer_alone_is_told_how_to_make_a_fast_one(model: Path) -> None:
    (model / "tokenizer.json").rename(model / "tokenizer.model")
    error = refused(InvalidModel, lambda: check(model))
    assert error.problem == f"{model} has no tokenizer.json (it holds tokenizer.model)"
    assert error.fix.endswith("AutoTokenizer.from_pretrained(path).save_pretrained(path).")


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
    assert error.problem.endswith("and worker worker-0 has 100 MiB")


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


def test_a_gpu_of_a_machine_without_any_is_refused_before_anything_starts(model: Path) -> None:
    machine = replace(MACHINE, has_gpu=False)
    config = configured(model, cluster={"workers": [{}, {"device": "cuda:0"}]})
    error = refused(InvalidConfig, lambda: preflight(config, machine=machine))
    assert str(error) == "cluster.workers.1.device: this machine has no CUDA GPU (got 'cuda:0'). Set device: cpu."
    assert preflight(config, machine=machine, listens=False), "a plan may be for another machine"
    elsewhere = configured(model, cluster={"workers": [{"device": "cuda:0"}], "ray_address": "auto"})
    assert preflight(elsewhere, machine=machine)
    assert preflight(configured(model), machine=machine)


def test_nodes_of_a_cluster_elsewhere_are_placeholders(model: Path) -> None:
    workers = [{"device": "cuda:0", "count": 2}, {"memory": "4GiB", "threads": 3}]
    checked = check(model, cluster={"ray_address": "auto", "workers": workers})
    leaders = [replica.leader for replica in checked.plan.replicas]
    assert [(shard.node, shard.device.name) for shard in leaders] == [
        ("node-0", "cuda:0"), ("node-1", "cuda:0"), ("node-2", "cpu"),
    ]  # fmt: skip
    assert (leaders[2].device.memory_bytes, leaders[2].device.num_threads) == (2**32, 3)


def lines(checked: Checked) -> list[str]:
    return [said.pairs() for said in plan_events(checked)]


def test_by_default_the_kv_cache_holds_all_that_sequences_can_use(model: Path) -> None:
    checked = check(model, serving={"max_num_seqs": 3})
    assert checked.plan.replicas[0].num_kv_tokens == 3 * 64
    assert checked.context_tokens == checked.model_context_tokens == 64
    assert context_words(checked) == ""
    rank, said = lines(checked)
    assert rank.endswith("kv_tokens=192 kv_sized_by=sequences")
    assert said == "event=context context_tokens=64 model_context_tokens=64"


@pytest.mark.parametrize(
    ("serving", "workers", "budget", "step_time_s", "words"),
    [
        ({}, [{}], 512, 0.5, '"auto (at most 512)"'),
        ({"step_time_s": 0.25, "max_num_seqs": 700}, [{}], 700, 0.25, '"auto (at most 700)"'),
        ({}, [{"device": "cuda:0", "memory": "20GiB"}], 2048, 0.5, '"auto (at most 2048)"'),
        ({"token_budget": 64}, [{}], 64, None, "64"),
    ],
)
def test_memory_is_planned_for_the_budget_that_is_set_or_the_most_that_can_be_chosen(
    model: Path, serving: dict[str, Any], workers: list[dict[str, Any]], budget: int, step_time_s: float, words: str
) -> None:
    checked = check(model, serving=serving, cluster={"workers": workers})
    limits = checked.plan.replicas[0].limits
    assert (limits.token_budget, limits.step_time_s) == (budget, step_time_s)
    assert f" token_budget={words} " in lines(checked)[0]


def test_a_context_that_is_less_than_the_models_is_said_with_what_gives_more(model: Path) -> None:
    """A block of 16 tokens takes 1 KiB."""
    checked = check(model, serving={"kv_cache": "2KiB"})
    assert (checked.context_tokens, checked.model_context_tokens) == (32, 64)
    rank, said = lines(checked)
    assert rank.endswith("kv_tokens=32 kv_sized_by=setting")
    fields, _, words = said.partition(" cause=")
    assert fields == "event=context context_tokens=32 model_context_tokens=64"
    assert words == '"serves 32 of the model\'s 64 tokens: raise serving.kv_cache for more"'
    assert check(model, serving={"kv_cache": "4KiB"}).context_tokens == 64
    asked = check(model, serving={"kv_cache": "2KiB"}, model={"path": str(model), "max_context_tokens": 32})
    assert context_words(asked) == "", "it is what was asked for"


def test_of_memory_that_is_not_known_the_plan_says_so(model: Path) -> None:
    change = CONFIG | {"max_position_embeddings": 2**24}
    (model / "config.json").write_text(json.dumps(change))
    rank, said = lines(check(model, cluster={"workers": [{"device": "cuda:0"}]}))
    assert 'kv="256 MiB"' in rank
    assert 'kv_sized_by="256 MiB where memory is not known: set memory for workers"' in rank
    assert "set memory for workers, or serving.kv_cache, for more" in said
    given = check(model, cluster={"workers": [{"device": "cuda:0", "memory": "20GiB"}]})
    assert given.context_tokens > 2 * 2**22 and given.plan.replicas[0].kv_sized_by == "memory"


def test_two_workers_of_too_little_memory_are_told_what_is_enough(model: Path) -> None:
    """They were told 410 MiB, and then, with as much, to lower serving.kv_cache."""
    workers = {"count": 2, "memory": "200MiB"}
    error = refused(NotEnoughMemory, lambda: check(model, cluster={"workers": [workers]}))
    found = re.fullmatch(r"Use a smaller model, or give each worker (\d+ MiB) or more\.", error.fix)
    assert found is not None, error.fix
    assert len(check(model, cluster={"workers": [workers | {"memory": found[1]}]}).plan.replicas) == 2


def test_distribution_that_shadows_ours_is_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: {"kernels": "0.11.0"}[name])
    error = refused(InvalidConfig, lambda: check(model))
    assert (error.field, error.value) == ("Python environment", "kernels 0.11.0")
    assert error.fix == "Run: python -m pip uninstall kernels"


def test_machine_is_measured() -> None:
    machine = measure_machine()
    assert machine.memory_bytes > 2**20
    assert 1 <= machine.num_cores <= (os.cpu_count() or 1)
    assert machine.targets[-1] == "generic" and machine.target in machine.targets


def test_a_cpu_target_that_this_machine_cannot_run_is_refused_where_workers_run_here(model: Path) -> None:
    machine = replace(MACHINE, targets=("avx2", "generic"), named_target="avx512f")
    here = configured(model)
    error = refused(InvalidConfig, lambda: preflight(here, machine=machine))
    assert (error.field, error.value) == ("environment variable HETERODYNE_CPU_TARGET", "avx512f")
    assert error.fix == "Set it to one of avx2, generic, or unset it."
    elsewhere = configured(model, cluster={"ray_address": "auto", "workers": [{"device": "cpu", "threads": 1}]})
    assert preflight(elsewhere, machine=machine).plan.replicas[0].shards[0].device.target == ""


@pytest.mark.parametrize(("named", "target"), [("", "avx2"), ("generic", "generic")])
def test_workers_of_this_machine_have_its_target(model: Path, named: str, target: str) -> None:
    machine = replace(MACHINE, targets=("avx2", "generic"), named_target=named)
    (replica,) = preflight(configured(model), machine=machine).plan.replicas
    assert [shard.device.target for shard in replica.shards] == [target]
