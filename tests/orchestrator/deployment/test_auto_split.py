"""How a model that was cut unasked is cut anew once its workers were measured."""

import dataclasses
from pathlib import Path

import pytest

from orchestrator.deployment.auto_split import settle
from orchestrator.deployment.preflight import Checked, preflight
from placement.measured.speed import DeviceSpeed, NotMeasured
from placement.planning.plan import Role
from tests.support.deploying.deployment import MACHINE, make_config, too_large_for_each


def speed(gb_per_s: float) -> DeviceSpeed:
    return DeviceSpeed(weight_bytes_per_s=gb_per_s * 1e9, flops_per_s=4 * gb_per_s * 1e9)


def columns(checked: Checked) -> list[int]:
    return [len(shard.part.ffn_columns) for shard in checked.plan.replicas[0].shards]


@pytest.fixture
def provisional(tmp_path: Path, served_checkpoint: Path) -> Checked:
    """96 FFN columns over workers of 1 and 3 threads."""
    return preflight(too_large_for_each(tmp_path, served_checkpoint, 1, 3), machine=MACHINE, listens=False)


def test_shares_are_those_of_the_measured_speeds_and_the_line_says_them(provisional: Checked) -> None:
    settled = settle(provisional, [speed(20.04), speed(10)])
    assert columns(provisional) == [24, 72] and columns(settled.checked) == [64, 32]
    assert settled.checked.split_by == "speed"
    assert settled.said.pairs() == (
        'event=auto_split by=speed weights_gb_per_s="w0 20, w1 10" prefill_gflop_per_s="w0 80.2, w1 40"'
    )


def test_where_one_is_unknown_nothing_is_made_up(provisional: Checked) -> None:
    settled = settle(provisional, [speed(20), NotMeasured(cause="was not measured within 20 s")])
    assert settled.checked is provisional
    assert settled.said.pairs() == 'event=auto_split by=threads cause="w1 was not measured within 20 s"'


def test_a_cut_that_leaves_a_worker_nothing_is_not_made_by_speed(provisional: Checked) -> None:
    settled = settle(provisional, [speed(1000), speed(0.1)])
    assert settled.checked.split_by == "threads"
    assert 'cause="the model cannot be cut by what was measured"' in settled.said.pairs()


def test_what_is_not_cut_is_not_split(tmp_path: Path, served_checkpoint: Path) -> None:
    workers = {"workers": [{"device": "cpu", "threads": 1, "count": 2}]}
    checked = preflight(make_config(tmp_path, served_checkpoint, cluster=workers), machine=MACHINE, listens=False)
    assert checked.split_by is None and len(checked.plan.replicas) == 2


def test_each_pool_is_cut_by_the_speeds_of_its_own_workers(tmp_path: Path, served_checkpoint: Path) -> None:
    pools = {"prefill": {"workers": ["w1", "w3"]}, "decode": {"workers": ["w0", "w2"]}}
    config = too_large_for_each(tmp_path, served_checkpoint, 1, 3, 3, 1, pools=pools)
    provisional = preflight(config, machine=MACHINE, listens=False)
    decode, prefill = provisional.plan.replicas
    assert (decode.role, prefill.role) == (Role.DECODE, Role.PREFILL)
    assert [provisional.workers[rank] for rank in sorted(provisional.workers)] == [0, 2, 1, 3]
    settled = settle(provisional, [speed(20), speed(10), speed(5), speed(10)])
    found = [[len(shard.part.ffn_columns) for shard in replica.shards] for replica in settled.checked.plan.replicas]
    assert found == [[64, 32], [32, 64]]
    assert 'weights_gb_per_s="w0 20, w1 5, w2 10, w3 10"' in settled.said.pairs()
    assert settled.said.sentence.startswith("No worker has memory for the whole model: it is cut by speed.")


def test_workers_that_run_stay_in_their_replica_whatever_was_measured(
    provisional: Checked, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = dataclasses.replace(provisional, workers={("replica-0", 0): 1, ("replica-0", 1): 0})
    monkeypatch.setattr("orchestrator.deployment.auto_split.by_speed", lambda checked, speeds: other)
    settled = settle(provisional, [speed(20), speed(10)])
    assert settled.checked is provisional
    assert "would put workers into other replicas" in settled.said.pairs()


def with_attention(directory: Path, model: Path, **attention: object) -> Checked:
    """A worker for the model and two of unequal threads for attention, as far as speeds are assumed."""
    workers = [{"name": "model", "threads": 1}, {"name": "m0", "threads": 4}, {"name": "m1", "threads": 1}]
    section = {"workers": ["m0", "m1"], "kv_cache": "8MiB", "partition": "token_ranges"} | attention
    config = make_config(directory, model, cluster={"workers": workers}, serving={"attention": section})
    return preflight(config, machine=MACHINE, listens=False)


def slots(checked: Checked) -> list[int]:
    (residency,) = [replica.residency for replica in checked.plan.replicas]
    return [] if residency is None else [holder.slots_per_block(16) for holder in residency.regions[0].holders]


def test_attention_workers_hold_by_their_measured_speed(tmp_path: Path, served_checkpoint: Path) -> None:
    provisional = with_attention(tmp_path, served_checkpoint, offload="always")
    trial = provisional.trial
    assert trial is not None and trial.workers == provisional.workers and len(trial.workers) == 3
    settled = settle(provisional, [speed(10), speed(10), speed(30)])
    assert slots(provisional) == [13, 3] and slots(settled.checked) == [4, 12]
    assert settled.said.sentence == "The workers read weights at GB/s: model 10, m0 10, m1 30."
    assert settled.checked.trial is None
    assert settled.checked.offloading is not None and "are measured" in settled.checked.offloading.basis


@pytest.mark.parametrize("link_speed", [100_000, 100_000_000_000])
def test_what_is_measured_decides_whether_attention_is_offloaded(
    tmp_path: Path, served_checkpoint: Path, link_speed: int
) -> None:
    provisional = with_attention(tmp_path, served_checkpoint, link_speed=link_speed)
    assert provisional.trial is not None and len(provisional.trial.plan.attention) == 2
    checked = settle(provisional, [speed(10), speed(10), speed(30)]).checked
    assert len(checked.plan.attention) == (2 if link_speed > 1e9 else 0)
    assert checked.workers.items() <= provisional.trial.workers.items()


def test_an_attention_worker_that_cannot_be_measured_leaves_what_was_assumed(
    tmp_path: Path, served_checkpoint: Path
) -> None:
    provisional = with_attention(tmp_path, served_checkpoint, offload="always")
    settled = settle(provisional, [speed(10), speed(10), NotMeasured(cause="was not measured within 20 s")])
    assert settled.checked is provisional
    assert settled.said.sentence == "What was measured is not used: m1 was not measured within 20 s."
