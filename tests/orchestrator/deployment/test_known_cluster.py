"""What is planned for a Ray cluster that was there before: who shares a machine, and what memory the machine has."""

import dataclasses
import shlex
from pathlib import Path
from typing import Any

import pytest

from orchestrator.config.document import Config
from orchestrator.deployment.known_cluster import known_clusters
from orchestrator.deployment.plan_lines import plan_events
from orchestrator.deployment.preflight import Checked, by_speed, on_hosts, preflight
from orchestrator.deployment.seats import rank_labels, worker_needs
from placement.errors import NotEnoughMemory
from placement.measured.speed import DeviceSpeed
from placement.planning.memory import CPU_PROCESS_BYTES
from placement.planning.seating import NODE_ID_LABEL, Host, seat
from tests.support.deploying.deployment import MACHINE, make_config, too_large_for_each


def host(name: str, memory_bytes: int | None = 2**36, num_cpus: float = 8) -> Host:
    return Host(
        host_id=f"id-{name}",
        name=name,
        labels={"at": name},
        num_cpus=num_cpus,
        num_gpus=0,
        memory_bytes=memory_bytes,
        total_cpus=num_cpus,
        total_gpus=0,
    )


def joined(config: Config, **worker: Any) -> Config:
    """The same configuration on a Ray cluster that was there before; ``worker`` changes each entry of the workers."""
    workers = tuple(dataclasses.replace(each, **worker) for each in config.cluster.workers)
    return dataclasses.replace(config, cluster=dataclasses.replace(config.cluster, ray_address="auto", workers=workers))


def check(config: Config, *hosts: Host) -> Checked:
    checked = preflight(config, machine=MACHINE, listens=False)
    return on_hosts(checked, hosts) if hosts else checked


def ranks(checked: Checked) -> list[list[tuple[int, str]]]:
    """Of the one replica, by stage: which worker each rank is, and the node it is planned for."""
    (replica,) = checked.plan.replicas
    return [
        [(checked.workers[replica.name, shard.rank], shard.node) for shard in stage.shards] for stage in replica.stages
    ]


@pytest.fixture
def config(tmp_path: Path, served_checkpoint: Path) -> Config:
    """Three workers of 1, 3 and 2 threads, none of which has the memory for all of a model of two layers."""
    return joined(too_large_for_each(tmp_path, served_checkpoint, 1, 3, 2))


def test_workers_of_one_machine_share_every_layer(config: Config) -> None:
    one = host("big")
    assert ranks(check(config, one, one, one)) == [[(0, "big"), (1, "big"), (2, "big")]]


def test_machines_share_the_layers_whatever_the_order_of_their_workers(config: Config) -> None:
    a, b = host("a"), host("b")
    assert ranks(check(config, a, b, a)) == [[(0, "a"), (2, "a")], [(1, "b")]]


def test_machines_of_one_name_are_told_apart(config: Config) -> None:
    a, other = host("a"), dataclasses.replace(host("a"), host_id="id-other")
    assert ranks(check(config, a, other, a)) == [[(0, "a-id-a"), (2, "a-id-a")], [(1, "a-id-other")]]


def test_measured_speeds_are_those_of_the_workers_whatever_their_ranks(config: Config) -> None:
    a, b = host("a"), host("b")
    measured = [DeviceSpeed(weight_bytes_per_s=rate, flops_per_s=1e9) for rate in (3e9, 7e9, 1e9)]
    checked = by_speed(check(config, a, b, a), measured)
    assert checked.split_by == "speed" and ranks(checked)[0] == [(0, "a"), (2, "a")]
    first, second = checked.plan.replicas[0].stages[0].shards
    assert len(first.part.ffn_columns) == 3 * len(second.part.ffn_columns)


def test_what_is_asked_for_is_for_the_workers_that_are_named(tmp_path: Path, served_checkpoint: Path) -> None:
    workers = [{"name": name, "threads": threads} for name, threads in (("x", 1), ("y", 2), ("z", 3))]
    stages = [{"workers": ["y", "z"]}, {"workers": ["x"]}]
    asked = make_config(
        tmp_path, served_checkpoint, cluster={"workers": workers},
        serving={"parallelism": {"replicas": [{"stages": stages}]}},
    )  # fmt: skip
    a, b = host("a"), host("b")
    checked = check(joined(asked), a, b, a)
    assert ranks(checked) == [[(1, "b"), (2, "a")], [(0, "a")]]
    assert [shard.device.num_threads for shard in checked.plan.replicas[0].shards] == [2, 3, 1]


def test_what_workers_of_one_machine_need_is_added_up(tmp_path: Path, served_checkpoint: Path) -> None:
    workers = {"workers": [{"threads": 1, "count": 2}]}
    asked = joined(make_config(tmp_path, served_checkpoint, cluster=workers))
    leader = check(asked).plan.replicas[0].leader
    each = leader.weight_bytes + leader.kv_bytes + leader.workspace_bytes + CPU_PROCESS_BYTES
    roomy, tight, full = (host("a", memory_bytes=size) for size in (2 * each, 2 * each - 1, CPU_PROCESS_BYTES))
    assert len(check(asked, roomy, roomy).plan.replicas) == 2
    assert ranks(check(asked, tight, tight)) == [[(0, "a"), (1, "a")]], "cut, as on one machine"
    with pytest.raises(NotEnoughMemory, match=r"node a has|worker worker-\d has"):
        check(asked, full, full)


def test_a_machine_that_does_not_say_its_memory_is_checked_by_its_workers(
    tmp_path: Path, served_checkpoint: Path
) -> None:
    workers = {"workers": [{"threads": 1, "count": 2}]}
    asked = joined(make_config(tmp_path, served_checkpoint, cluster=workers))
    silent = host("a", memory_bytes=None)
    assert len(check(asked, silent, silent).plan.replicas) == 2


def test_a_stated_memory_counts_beside_a_worker_of_the_machine_that_states_none(
    tmp_path: Path, served_checkpoint: Path
) -> None:
    workers = [{"name": "silent", "threads": 1}, {"name": "small", "threads": 1, "memory": "100MiB"}]
    asked = joined(make_config(tmp_path, served_checkpoint, cluster={"workers": workers}))
    silent = host("a", memory_bytes=None)
    for hosts in ((), (silent, silent)):
        with pytest.raises(NotEnoughMemory, match="worker small has 100 MiB"):
            check(asked, *hosts)


def test_a_gpu_has_not_the_memory_of_its_machine(tmp_path: Path, served_checkpoint: Path) -> None:
    workers = [{"device": "cuda:0"}, {"device": "cuda:1", "memory": "24GiB"}, {"threads": 1}]
    asked = make_config(tmp_path, served_checkpoint, cluster={"workers": workers})
    (cluster,) = known_clusters(asked, MACHINE)
    assert [device.memory_bytes for device in cluster.spec.nodes[0].devices] == [None, 24 * 2**30, MACHINE.memory_bytes]


def test_before_the_cluster_is_joined_only_labels_say_who_shares_a_machine(
    tmp_path: Path, served_checkpoint: Path
) -> None:
    apart = joined(too_large_for_each(tmp_path, served_checkpoint, 1, 3))
    assert ranks(check(apart)) == [[(0, "node-0")], [(1, "node-1")]]
    pinned = joined(apart, node_labels={NODE_ID_LABEL: "abc"})
    assert ranks(check(pinned)) == [[(0, "node-0"), (1, "node-0")]]
    alike = joined(apart, node_labels={"kind": "big"})
    assert ranks(check(alike)) == [[(0, "node-0")], [(1, "node-1")]], "two machines may carry one label"


def test_a_cut_that_only_one_machine_allows_is_not_refused_before_machines_are_known(config: Config) -> None:
    """Two layers cannot be shared by three machines, but by three workers of one."""
    assert ranks(check(config)) == [[(0, "node-0"), (1, "node-0"), (2, "node-0")]]


def test_a_plan_names_the_machine_and_the_worker_of_each_rank_as_far_as_they_are_known(config: Config) -> None:
    def said(checked: Checked) -> list[tuple[str, str]]:
        lines = [
            dict(pair.split("=", 1) for pair in shlex.split(said.pairs()))
            for said in plan_events(checked)
            if said.event == "plan"
        ]
        return [(line["worker"], line["node"]) for line in lines]

    assert said(check(config)) == [(f"w{at}", "any") for at in range(3)]
    assert said(check(joined(config, node="big"))) == [(f"w{at}", "big") for at in range(3)]
    a, b = host("a"), host("b")
    assert said(check(config, a, b, a)) == [("w0", "a"), ("w2", "a"), ("w1", "b")]


def test_each_rank_is_started_on_the_machine_that_it_was_planned_for(config: Config) -> None:
    config = joined(config, node_labels={"at": "in(a, b)"})
    checked = check(config)
    assert rank_labels(checked, worker_needs(checked)) == {("replica-0", rank): {"at": "in(a, b)"} for rank in range(3)}
    hosts = seat(worker_needs(checked), [host("b", num_cpus=3), host("a", num_cpus=3), host("c", num_cpus=64)])
    assert hosts is not None and [each.name for each in hosts] == ["a", "b", "a"]
    checked = on_hosts(checked, hosts)
    assert [labels[NODE_ID_LABEL] for labels in rank_labels(checked, worker_needs(checked)).values()] == [
        "id-a",
        "id-a",
        "id-b",
    ]
    assert all(labels["at"] == "in(a, b)" for labels in rank_labels(checked, worker_needs(checked)).values())
