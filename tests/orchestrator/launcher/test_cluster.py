"""The launcher on a Ray of its own, whose GPUs are numbers only."""

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import ray

from orchestrator.launcher import hosts
from orchestrator.launcher.cluster import (
    LaunchSettings,
    RankKey,
    RayLauncher,
    beside_driver,
    check_resources,
    disconnect,
)
from orchestrator.launcher.hosts import find_hosts
from orchestrator.launcher.no_room import NodeResources
from orchestrator.launcher.process import HowEnded, WorkerFailed
from placement.errors import InvalidConfig
from placement.model.part import Part, Span
from placement.model.specs import DeviceSpec
from placement.planning.plan import Shard
from placement.planning.seating import NODE_ID_LABEL
from tests.support.clocks import PATIENCE_S, until

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    ray.init(address="local", num_cpus=2, num_gpus=2, include_dashboard=False, log_to_driver=False)
    yield
    disconnect()


def shard(rank: int, device: DeviceSpec, weight_bytes: int = 1) -> Shard:
    return Shard(
        rank=rank,
        node="local",
        device=device,
        part=Part(layers=Span(0, 1), kv_heads=Span(0, 1), ffn_columns=Span(0, 1), vocab_rows=Span(0, 1)),
        num_blocks=1,
        weight_bytes=weight_bytes,
        kv_bytes=1,
        workspace_bytes=1,
    )


def launcher(start_timeout_s: float = PATIENCE_S, labels: Mapping[RankKey, Mapping[str, str]] = {}) -> RayLauncher:
    settings = LaunchSettings(bind_host="127.0.0.1", start_timeout_s=start_timeout_s, labels=labels)
    return RayLauncher(settings, lambda shard: shard.weight_bytes + shard.kv_bytes)


async def visible_gpus(agent: Any) -> str | None:
    gpus: str | None = await agent.__ray_call__.remote(lambda self: os.environ.get("CUDA_VISIBLE_DEVICES"))
    return gpus


async def test_each_cuda_rank_sees_one_gpu_of_its_own(cluster: None) -> None:
    under_test = launcher()
    shards = {("a", i): shard(i, DeviceSpec(kind="cuda", index=i, memory_bytes=0)) for i in range(2)}
    await under_test.reserve(shards)
    agents = [under_test._agent(key, shard) for key, shard in shards.items()]
    assert sorted([await visible_gpus(agent) for agent in agents], key=str) == ["0", "1"]
    await under_test.close()


async def test_a_rank_that_needs_more_memory_than_is_free_is_not_started(cluster: None) -> None:
    under_test = launcher()
    big = shard(0, DeviceSpec(kind="cpu", memory_bytes=0), weight_bytes=2**60)
    await under_test.reserve({("a", 0): big})
    with pytest.raises(WorkerFailed, match=r"not enough memory on .*set serving.kv_cache to less"):
        await under_test.start(("a", 0), epoch=1, shard=big)
    await under_test.close()


async def test_a_lost_agent_is_a_cause_in_one_line(cluster: None) -> None:
    under_test = launcher()
    small = shard(0, DeviceSpec(kind="cpu", memory_bytes=0))
    await under_test.reserve({("a", 0): small})
    ray.kill(under_test._agent(("a", 0), small))
    end = await under_test.wait(("a", 0))
    assert end.how is HowEnded.FAILED
    assert end.cause.startswith("its node or its Ray actor was lost (Actor") and "\n" not in end.cause
    await under_test.stop(("a", 0))  # an actor that is gone already is no error
    assert (await under_test.wait(("a", 0))).how is HowEnded.STOPPED
    await under_test.close()


async def test_a_clusters_machine_is_found_with_what_is_free_and_can_be_asked_for(cluster: None) -> None:
    await until(lambda: [(host.num_cpus, host.num_gpus) for host in find_hosts(threading.Event())] == [(2, 2)])
    (host,) = find_hosts(threading.Event())
    assert host.name == socket.gethostname()
    assert host.labels[NODE_ID_LABEL] == host.host_id and (host.memory_bytes or 0) > 2**20
    device = DeviceSpec(kind="cuda", memory_bytes=0)
    for place, found in ((host.host_id, True), ("f" * len(host.host_id), False)):
        under_test = launcher(PATIENCE_S if found else 2.0, {("a", 0): {NODE_ID_LABEL: place}})
        with (
            contextlib.nullcontext()
            if found
            else pytest.raises(WorkerFailed, match="the node that it was to run on has left the cluster")
        ):
            await under_test.reserve({("a", 0): shard(0, device)})
        await under_test.close()


async def test_cpus_that_others_have_are_said_to_be_reserved(cluster: None) -> None:
    first, second = launcher(), launcher(start_timeout_s=2.0)
    worker = shard(0, DeviceSpec(kind="cpu", memory_bytes=0, num_threads=2))
    await first.reserve({("a", 0): worker})
    with pytest.raises(WorkerFailed) as caught:
        await second.reserve({("b", 0): worker})
    assert str(caught.value) == (
        "no node has 2 free CPUs: 2 of 2 are reserved by other jobs. Stop another job, lower threads, or add a node"
    )
    await second.close()
    await first.close()


def test_who_is_asked_to_stop_does_not_wait_for_machines_to_answer(
    cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hosts, "node_facts", lambda: time.sleep(600))
    monkeypatch.setattr(hosts, "_ANSWER_S", 10 * PATIENCE_S)
    stop = threading.Event()
    asking = threading.Timer(0.5, stop.set)
    asking.start()
    started_s = time.monotonic()
    (host,) = find_hosts(stop)
    assert host.memory_bytes is None and time.monotonic() < started_s + PATIENCE_S
    asking.join()


def test_more_cpus_than_any_node_has_are_refused_before_the_launch(
    cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_resources(num_cpus=2, num_gpus=2, most_cpus=2)
    with pytest.raises(InvalidConfig, match=r"asks for more than the 2 CPU of the Ray cluster"):
        check_resources(num_cpus=3, num_gpus=0, most_cpus=1)
    halves = [NodeResources(name=name, labels={}, total={"CPU": 1.0}, free={}) for name in "ab"]
    monkeypatch.setattr("orchestrator.launcher.cluster.node_resources", lambda: halves)
    with pytest.raises(InvalidConfig) as caught:
        check_resources(num_cpus=2, num_gpus=0, most_cpus=2)
    assert (caught.value.field, caught.value.value) == ("cluster.workers: threads", 2)
    assert caught.value.fix == "Set it to 1 or less, or add a node that has as many."


class Somewhere:
    """An actor that says where it is."""

    def node_id(self) -> str:
        return str(ray.get_runtime_context().get_node_id())


def test_what_belongs_beside_the_driver_is_placed_on_its_node_or_nowhere(cluster: None) -> None:
    strategy = beside_driver()
    actor: Any = ray.remote(num_cpus=0)(Somewhere).options(scheduling_strategy=strategy).remote()
    assert ray.get(actor.node_id.remote(), timeout=PATIENCE_S) == ray.get_runtime_context().get_node_id()
    assert not strategy.soft
    ray.kill(actor)
