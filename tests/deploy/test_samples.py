"""The cluster files in deploy: each is a plan, and those with pools give replicas their roles."""

from pathlib import Path

import pytest

from orchestrator.config.document import load_config
from orchestrator.deployment.plan_lines import plan_events
from orchestrator.deployment.preflight import Checked, preflight
from tests.support.deploying.deployment import MACHINE

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
SAMPLES = sorted(path.name for path in DEPLOY.glob("*.yaml"))


def planned(sample: str) -> Checked:
    return preflight(load_config(DEPLOY / sample, environ={}), machine=MACHINE, listens=False)


@pytest.mark.parametrize("sample", SAMPLES)
def test_every_sample_is_a_plan_and_names_the_schema(sample: str) -> None:
    assert planned(sample).plan.replicas
    schema = "# yaml-language-server: $schema=./heterodyne.schema.json\n"
    assert (DEPLOY / sample).read_text().startswith(schema)


@pytest.mark.parametrize(
    ("sample", "roles", "sentence"),
    [
        ("disaggregated.yaml", ["prefill", "decode"],
         "replica-0 computes prompts, replica-1 answers them; keys and values go over the network as bfloat16."),
        ("disaggregated-two-machines.yaml", ["prefill", "decode"],
         "replica-0 computes prompts, replica-1 answers them; keys and values go over the network as bfloat16, where "
         "that is expected to be faster."),
        ("disaggregated-fleet.yaml", ["prefill", "decode", "mixed"],
         "replica-0 computes prompts, replica-1 answers them, replica-2 does both; keys and values go over the network "
         "as 8-bit integers, where that is expected to be faster."),
        ("fleet.yaml", ["prefill", "decode"],
         "replica-0 computes prompts, replica-1 answers them; keys and values go over the network as bfloat16."),
    ],
)  # fmt: skip
def test_replicas_of_the_samples_with_pools_have_roles(sample: str, roles: list[str], sentence: str) -> None:
    checked = planned(sample)
    assert [replica.role.value for replica in checked.plan.replicas] == roles
    (said,) = (each for each in plan_events(checked) if each.event == "roles")
    assert said.sentence == sentence


def test_the_fleet_is_cut_in_every_way_and_has_blocks_of_two_sizes() -> None:
    prefill, decode, mixed = planned("disaggregated-fleet.yaml").plan.replicas
    first, second = prefill.shards
    assert len(first.part.kv_heads) == 3 * len(second.part.kv_heads)
    assert len(decode.stages) == 2 and len(mixed.shards) == 1
    assert [each.limits.block_size for each in (prefill, decode, mixed)] == [32, 16, 16]


def test_the_fleet_of_the_demo_shares_prompts_by_tokens_and_answers_by_heads_unequally() -> None:
    prompts, answers = planned("fleet.yaml").plan.replicas
    stripes = [shard.part.stripe for shard in prompts.shards]
    assert [stripe.width for stripe in stripes if stripe is not None] == [11, 5]
    assert [len(shard.part.kv_heads) for shard in answers.shards] == [3, 1]


def test_each_role_of_two_machines_has_a_machine_of_its_own() -> None:
    prefill, decode = planned("disaggregated-two-machines.yaml").plan.replicas
    assert (prefill.leader.node, decode.leader.node) == ("big", "small")


def test_the_attention_sample_has_one_worker_for_the_model_and_one_for_all_keys_and_values() -> None:
    checked = planned("attention-offload.yaml")
    ((rank,),) = [replica.shards for replica in checked.plan.replicas]
    (worker,) = checked.plan.attention
    assert (rank.device.worker, rank.num_blocks) == ("model", 0)
    assert (worker.device.worker, worker.kv_bytes, worker.weight_bytes) == ("memory", 64 * 2**20, 0)
    (residency,) = [replica.residency for replica in checked.plan.replicas]
    assert residency is not None and residency.num_local_blocks == 0 and residency.workers == (0,)
