"""The command ``plan`` with attention workers: who holds what, what was decided and by which numbers."""

from pathlib import Path

import pytest

from orchestrator.cli.plan_picture import plan_svg
from orchestrator.deployment.plan_lines import plan_events
from orchestrator.deployment.preflight import Checked, preflight
from orchestrator.event_log import LogLevel, Said
from placement.errors import NotEnoughMemory
from tests.support.deploying.deployment import MACHINE, make_config

WORKERS = [{"name": "model", "threads": 1}, {"name": "m0", "threads": 2}, {"name": "m1", "threads": 1}]


def checked(directory: Path, model: Path, **attention: object) -> Checked:
    section = {"workers": ["m0", "m1"], "kv_cache": "8MiB"} | attention
    config = make_config(directory, model, cluster={"workers": WORKERS}, serving={"attention": section})
    return preflight(config, machine=MACHINE)


def said(found: Checked, event: str) -> list[Said]:
    return [each for each in plan_events(found) if each.event == event]


def test_each_attention_worker_has_a_line_with_what_it_holds(tmp_path: Path, served_checkpoint: Path) -> None:
    found = checked(tmp_path, served_checkpoint, offload="always", partition="requests")
    first, second = said(found, "plan_attention")
    assert first.sentence.startswith("attention rank 0: worker m0, cpu of this machine, ")
    assert "KV heads 0-" in first.sentence and "tokens of replica-0" in first.sentence
    assert (first.fields["worker"], second.fields["worker"]) == ("m0", "m1")
    (rank,) = said(found, "plan")
    assert "no KV cache, as attention workers have it" in rank.sentence
    assert rank.fields["kv_sized_by"] == "attention workers"
    assert found.workers == {("replica-0", 0): 0, ("attention", 0): 1, ("attention", 1): 2}


def test_slots_and_local_blocks_are_said(tmp_path: Path, served_checkpoint: Path) -> None:
    found = checked(tmp_path, served_checkpoint, offload="always", partition="token_ranges", local_kv_cache="64KiB")
    first, second = said(found, "plan_attention")
    assert "slots 0-10 of 16 of each block" in first.sentence and "slots 11-15 of 16 of each block" in second.sentence
    (rank,) = said(found, "plan")
    assert "as attention workers have the rest" in rank.sentence


def test_a_refusal_says_its_numbers_and_who_stays_idle(tmp_path: Path, served_checkpoint: Path) -> None:
    found = checked(tmp_path, served_checkpoint, link_speed=1000)
    (decision,) = said(found, "attention_offload")
    assert decision.sentence.startswith("Attention is not offloaded: ")
    assert "GB/s" in decision.sentence and "serving.attention.link_speed" in decision.sentence
    assert decision.fields["offloaded"] == "false" and decision.fields["refusal"] == "links"
    assert decision.level is LogLevel.WARNING
    (idle,) = said(found, "attention_idle")
    assert idle.sentence == "Idle: m0, m1. Attention workers with nothing to hold do not run."
    assert not found.plan.attention and all(replica.residency is None for replica in found.plan.replicas)
    assert not said(found, "plan_attention")


def test_what_is_asked_for_is_done_against_the_prediction_which_is_said(
    tmp_path: Path, served_checkpoint: Path
) -> None:
    found = checked(tmp_path, served_checkpoint, link_speed=1000, offload="always")
    (decision,) = said(found, "attention_offload")
    assert "as serving.attention.offload says, though" in decision.sentence and decision.level is LogLevel.WARNING
    assert decision.fields["offloaded"] == "true" and len(found.plan.attention) == 2
    assert not said(found, "attention_idle")


def test_an_accepted_plan_says_minimum_bandwidth_gain_and_partition(tmp_path: Path, served_checkpoint: Path) -> None:
    found = checked(tmp_path, served_checkpoint, link_speed="100GB")
    (decision,) = said(found, "attention_offload")
    assert decision.sentence.startswith("Attention is offloaded: with ") and "more tokens/s than" in decision.sentence
    assert "of its 100 GB/s; attention is divided by " in decision.sentence
    assert "speeds of devices are assumed by kind and threads" in decision.sentence
    assert float(str(decision.fields["gain"])) > 0 and len(str(decision.fields["min_gb_per_s"]).split(",")) == 3


def test_too_small_a_memory_leaves_attention_where_it_is_unless_it_must_not(
    tmp_path: Path, served_checkpoint: Path
) -> None:
    found = checked(tmp_path, served_checkpoint, kv_cache="1KiB")
    (decision,) = said(found, "attention_offload")
    assert "serving.attention.kv_cache: holds 0 tokens" in decision.sentence and not found.plan.attention
    with pytest.raises(NotEnoughMemory) as caught:
        checked(tmp_path, served_checkpoint, kv_cache="1KiB", offload="always")
    assert caught.value.field == "serving.attention.kv_cache"


def test_the_picture_shows_attention_workers_and_what_they_hold(tmp_path: Path, served_checkpoint: Path) -> None:
    plan = checked(tmp_path, served_checkpoint, offload="always", partition="requests").plan
    drawn = plan_svg(plan)
    assert "attention workers: 2" in drawn and "attention 0: worker m0" in drawn and "attention 1: worker m1" in drawn
    assert "KV at attention workers" in drawn and drawn.count("tokens of replica-0") >= 2
