"""Attention workers in the cluster YAML: what is taken, what is refused, and what the refusal says."""

from pathlib import Path

import pytest

from orchestrator.config.attention_checks import attention_workers, model_workers
from orchestrator.config.document import Config
from orchestrator.errors import InvalidConfigs
from placement.errors import InvalidConfig
from placement.planning.residency import Partition
from tests.support.deploying.configs import MINIMAL, load

WORKERS = (
    "cluster: {ray_address: auto, workers: [{name: fast, count: 2, threads: 1}, {name: big, threads: 1,"
    " node_labels: {memory: large}}, {name: old, threads: 1}]}\n"
)


def serving(text: str) -> str:
    return f"{MINIMAL}{WORKERS}serving: {{{text}}}\n"


def names(config: Config) -> list[str]:
    return attention_workers(config.serving.attention, config.cluster.named_workers)


def refusal(tmp_path: Path, text: str) -> InvalidConfig:
    with pytest.raises(InvalidConfig) as caught:
        load(tmp_path, serving(text))
    assert not isinstance(caught.value, InvalidConfigs), caught.value
    return caught.value


def test_there_are_no_attention_workers_unless_it_is_said(tmp_path: Path) -> None:
    config = load(tmp_path, MINIMAL)
    assert config.serving.attention is None and not names(config)
    assert model_workers(None, config.cluster.named_workers) == list(config.cluster.named_workers)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("workers: [big, old]", ["big", "old"]),
        ("workers: [fast-1]", ["fast-1"]),
        ("workers: [fast]", ["fast-0", "fast-1"]),
        ("node_labels: {memory: large}", ["big"]),
        ("workers: [old], node_labels: {memory: large}", ["big", "old"]),
    ],
)
def test_attention_workers_are_selected_by_name_by_entry_and_by_label(
    tmp_path: Path, text: str, expected: list[str]
) -> None:
    config = load(tmp_path, serving(f"attention: {{{text}}}"))
    assert names(config) == expected
    others = [worker.name for worker in model_workers(config.serving.attention, config.cluster.named_workers)]
    assert sorted([*others, *expected]) == sorted(config.cluster.worker_names)


def test_what_is_not_said_is_decided(tmp_path: Path) -> None:
    attention = load(tmp_path, serving("attention: {workers: [big], kv_cache: auto}")).serving.attention
    assert attention is not None
    assert (attention.offload, attention.asked_partition, attention.kv_cache) == ("auto", None, None)
    assert (attention.local_kv_cache, attention.q_first, attention.staggered) == (0, "auto", True)


def test_what_is_said_is_taken(tmp_path: Path) -> None:
    text = (
        "workers: [big], offload: always, partition: token_ranges, kv_cache: 2GiB, local_kv_cache: 64MiB, "
        "q_first: false, staggered: false, typical_context: 3000, link_speed: 100MB"
    )
    attention = load(tmp_path, serving(f"attention: {{{text}}}")).serving.attention
    assert attention is not None
    assert attention.asked_partition is Partition.TOKEN_RANGES and attention.kv_cache == 2 * 2**30
    assert (attention.local_kv_cache, attention.q_first, attention.staggered) == (64 * 2**20, False, False)
    assert (attention.typical_context, attention.link_speed) == (3000, 10**8)


@pytest.mark.parametrize(
    ("text", "field", "problem", "fix"),
    [
        ("attention: {workers: [bog]}", "serving.attention.workers.0", "not the name of a worker", "fast, fast-0"),
        ("attention: {}", "serving.attention", "selects no worker", "workers: [NAME]"),
        ("attention: {node_labels: {memory: small}}", "serving.attention.node_labels", "not among the node_labels",
         "cluster.workers"),
        ("attention: {workers: [fast, big, old]}", "serving.attention.workers", "none is left for the model",
         "Leave out"),
        ("attention: {workers: [big]}, pools: {prefill: {workers: [big]}, decode: {workers: [fast]}}",
         "serving.attention.workers", "serving.pools.prefill selects it too", "one of the two"),
        ("attention: {workers: [big, old]}, parallelism: {replicas: [{stages: [{workers: [fast-0, fast-1, big]}]}]}",
         "serving.attention.workers", "serving.parallelism.replicas[0] has it too", "one of the two"),
        ("attention: {workers: [big, old]}, parallelism: {replicas: [{stages: [{workers: [fast-0, fast-1], "
         "sequence_split: [1, 1]}]}]}",
         "serving.parallelism.replicas.0.stages.0.sequence_split", "serving.attention has others keep it",
         "tensor_split"),
        ("attention: {workers: [big]}, parallelism: {replicas: [{stages: [{workers: [fast-0, fast-1]}]}]}",
         "cluster.workers", "is in no replica", "Put it into one"),
        ("attention: {workers: [big], kv_cache: 0}", "serving.attention.kv_cache", "is below 1", "1 or more"),
        ("attention: {workers: [big], local_kv_cache: -1}", "serving.attention.local_kv_cache", "is below 0",
         "0 or more"),
        ("attention: {workers: [big], offload: never}", "serving.attention.offload", "is not one of", "auto"),
        ("attention: {workers: [big], partition: heads}", "serving.attention.partition", "is not one of", "kv_heads"),
        ("attention: {workers: [big], kv_cache: lots}", "serving.attention.kv_cache", "not a size", "256MiB"),
    ],
)  # fmt: skip
def test_a_contradiction_names_field_value_and_fix(
    tmp_path: Path, text: str, field: str, problem: str, fix: str
) -> None:
    error = refusal(tmp_path, text)
    assert error.field == field
    assert problem in error.problem and fix in error.fix, str(error)


def test_replicas_for_prompts_may_share_sequences(tmp_path: Path) -> None:
    stage = "stages: [{workers: [fast-0, fast-1], sequence_split: [1, 1]}], role: prefill"
    decode = "stages: [{workers: [old]}], role: decode"
    text = f"attention: {{workers: [big]}}, parallelism: {{replicas: [{{{stage}}}, {{{decode}}}]}}"
    assert names(load(tmp_path, serving(text))) == ["big"]


def test_attention_workers_are_in_no_pool_that_somebody_must_be_in(tmp_path: Path) -> None:
    error = refusal(tmp_path, "attention: {workers: [old]}, pools: {prefill: {workers: [fast, big]}}")
    assert error.field == "serving.pools" and "nobody answers" in error.problem
