"""Whole plans are judged: attention workers pay with long contexts and wide heads, and are refused with numbers."""

import pytest

from placement.measured.speed import DeviceSpeed
from placement.model.specs import ClusterSpec, DeviceSpec, DType, ModelSpec, NodeSpec
from placement.planning.attention import AttentionSetup
from placement.planning.layout import ReplicaLayout, StageLayout
from placement.planning.limits import ReplicaLimits
from placement.planning.plan import Plan
from placement.planning.planner import plan_replicas
from placement.planning.residency import Partition
from placement.serving.offload.planned import Rates, judge_plan, suitable_partition, tenants, typical_context
from placement.serving.offload.verdict import Refusal, Verdict
from tests.placement.serving.offload.paper_models import LLAMA3_70B, LLAMA_65B

H100 = DeviceSpeed(weight_bytes_per_s=3.35e12, flops_per_s=989e12)
H20 = DeviceSpeed(weight_bytes_per_s=4.0e12, flops_per_s=148e12)
LINK = 50e9
LIMITS = ReplicaLimits(block_size=16, token_budget=4096, max_num_seqs=2048)


def gpu(worker: str, memory_gb: int) -> DeviceSpec:
    return DeviceSpec(kind="cuda", memory_bytes=memory_gb * 10**9, worker=worker)


def rates(link: float = LINK) -> Rates:
    return Rates(
        speed_of=lambda device: H100 if device.worker.startswith("h100") else H20,
        link_bytes_per_s=link,
        round_trip_s=40e-6,
    )


def plans(model: ModelSpec, *, num_model: int, num_attention: int) -> tuple[Plan, Plan | None]:
    """A replica over so many H100, with so many H20 and without them."""
    devices = tuple(gpu(f"h100-{index}", 80) for index in range(num_model))
    cluster = ClusterSpec(nodes=(NodeSpec(name="model", memory_bytes=None, devices=devices),))
    memory = [
        NodeSpec(name=f"m{at}", memory_bytes=None, devices=(gpu(f"h20-{at}", 96),)) for at in range(num_attention)
    ]
    stage = StageLayout(devices=tuple(range(num_model)), weights=(1.0,) * num_model)

    def plan(asked: AttentionSetup | None) -> Plan:
        return plan_replicas(
            model,
            cluster,
            dtype=DType.BFLOAT16,
            kv_cache_bytes=None,
            max_context_tokens=16_384,
            limits=LIMITS,
            layouts=(ReplicaLayout(stages=(stage,)),),
            attention=asked,
        )

    asked = AttentionSetup(places=tuple((each, each.devices[0]) for each in memory), weights=(1.0,) * num_attention)
    return plan(asked), plan(None)


def verdict(
    model: ModelSpec, context: int, *, num_model: int = 4, num_attention: int = 4, link: float = LINK
) -> Verdict:
    offloaded, alone = plans(model, num_model=num_model, num_attention=num_attention)
    return judge_plan(offloaded, alone, rates(link), partition=Partition.KV_HEADS, context=context)


def test_llama3_70b_with_short_contexts_is_refused_with_numbers() -> None:
    found = verdict(LLAMA3_70B, 256)
    assert not found.is_accepted and found.refusal in (Refusal.LINKS, Refusal.LOSES)
    assert "attention is not offloaded" in found.reason and "tokens/s" in found.reason and "GB/s" in found.reason
    for number in (found.context, found.alone.num_sequences, found.offloaded.num_sequences):
        assert str(number) in found.reason


@pytest.mark.parametrize("model", [LLAMA_65B, LLAMA3_70B])
def test_long_contexts_are_accepted(model: ModelSpec) -> None:
    found = verdict(model, 12_206)
    assert found.is_accepted and found.gain > 0.1, found.reason
    assert max(found.needed_bytes_per_s) <= LINK


def test_slow_links_are_refused_whatever_the_context() -> None:
    found = verdict(LLAMA_65B, 12_206, link=1e8)
    assert found.refusal is Refusal.LINKS and "of its 0.1 GB/s" in found.reason


def test_a_model_that_fits_only_with_attention_workers_is_accepted() -> None:
    offloaded, _ = plans(LLAMA3_70B, num_model=4, num_attention=4)
    found = judge_plan(offloaded, None, rates(), partition=Partition.KV_HEADS, context=12_206)
    assert found.is_accepted and found.alone.num_sequences == 0
    assert "without it not one sequence" in found.reason


def test_what_plans_say_is_what_is_judged() -> None:
    offloaded, alone = plans(LLAMA3_70B, num_model=4, num_attention=4)
    assert [replica.name for replica in tenants(offloaded)] == ["replica-0"] and alone is not None
    assert not tenants(alone)
    held = sum(shard.kv_bytes for shard in offloaded.attention)
    found = verdict(LLAMA3_70B, 12_206)
    token_bytes = 2 * 80 * 8 * 128 * 2
    assert found.num_fitting == pytest.approx(held / token_bytes / 12_206, abs=1)


@pytest.mark.parametrize(
    ("most", "asked", "expected"), [(4096, None, 2048), (4096, 100, 100), (64, 100, 64), (1, None, 1)]
)
def test_a_typical_context_is_half_of_what_is_served_or_as_asked_for(
    most: int, asked: int | None, expected: int
) -> None:
    assert typical_context(most, asked) == expected


def test_the_partition_is_the_one_asked_for_or_the_fastest() -> None:
    devices = [gpu(f"h20-{index}", 96) for index in range(3)]
    attention, contexts = LLAMA3_70B.layers[0].attention, [4096] * 30

    def partition(asked: Partition | None) -> Partition:
        return suitable_partition(
            devices, rates(), attention, DType.BFLOAT16, contexts, block_size=16, asked=asked
        ).partition

    assert partition(Partition.TOKEN_RANGES) is Partition.TOKEN_RANGES
    assert partition(None) is Partition.REQUESTS  # 8 heads do not divide among 3 equal workers
