"""Pools, roles and disaggregation in the cluster YAML: what is taken, what is refused, and what the refusal says."""

from pathlib import Path

import pytest

from orchestrator.config.document import Config
from orchestrator.config.pools import members, pool_of_each, replica_pool
from orchestrator.errors import InvalidConfigs
from placement.errors import InvalidConfig
from placement.model.specs import DType
from placement.planning.plan import Role
from placement.planning.pools import Pool
from placement.serving.kv.peers import KvFormat
from tests.support.deploying.configs import MINIMAL, load

WORKERS = (
    "cluster: {ray_address: auto, workers: [{name: fast, count: 2, threads: 1, node_labels: {tier: fast, zone: a}},"
    " {name: slow, threads: 1, node_labels: {tier: slow}}, {threads: 1}]}\n"
)
FAST = "stages: [{workers: [fast-0, fast-1]}]"
SLOW = "stages: [{workers: [slow]}]"
OTHER = "stages: [{workers: [worker-3]}]"


def serving(text: str, *, workers: str = WORKERS) -> str:
    return f"{MINIMAL}{workers}serving: {{{text}}}\n"


def cut(*replicas: str, rest: str = "") -> str:
    return serving(f"{rest}parallelism: {{replicas: [{', '.join(f'{{{replica}}}' for replica in replicas)}]}}")


def roles(config: Config) -> list[str]:
    return [pool.role.value for pool in pool_of_each(config.serving.pools, config.cluster.named_workers).values()]


def refusal(tmp_path: Path, text: str) -> InvalidConfig:
    with pytest.raises(InvalidConfig) as caught:
        load(tmp_path, text)
    assert not isinstance(caught.value, InvalidConfigs), caught.value
    return caught.value


def test_nobody_has_a_role_unless_it_is_said(tmp_path: Path) -> None:
    config = load(tmp_path, MINIMAL)
    assert (config.serving.disaggregation, config.serving.kv_transfer, config.serving.pools) == ("auto", "model", None)
    assert roles(config) == ["mixed"] and config.serving.kv_format is KvFormat.NATIVE
    assert load(tmp_path, MINIMAL, "serving.kv_transfer=int8").serving.kv_format is KvFormat.INT8
    assert load(tmp_path, MINIMAL, "serving.disaggregation=never").serving.disaggregation == "never"


@pytest.mark.parametrize(
    ("prefill", "expected"),
    [
        ("{workers: [fast]}", ["prefill", "prefill", "mixed", "mixed"]),
        ("{workers: [fast-1]}", ["mixed", "prefill", "mixed", "mixed"]),
        ("{workers: [worker-3]}", ["mixed", "mixed", "mixed", "prefill"]),
        ("{node_labels: {tier: fast}}", ["prefill", "prefill", "mixed", "mixed"]),
        ("{node_labels: {tier: slow}}", ["mixed", "mixed", "prefill", "mixed"]),
        ("{workers: [slow], node_labels: {tier: fast, zone: a}}", ["prefill", "prefill", "prefill", "mixed"]),
    ],
)
def test_a_pool_selects_workers_by_name_by_entry_and_by_label(
    tmp_path: Path, prefill: str, expected: list[str]
) -> None:
    assert roles(load(tmp_path, serving(f"pools: {{prefill: {prefill}}}"))) == expected


def test_labels_select_a_worker_that_has_all_of_them_and_none_select_nobody(tmp_path: Path) -> None:
    config = load(tmp_path, serving("pools: {prefill: {workers: [slow], node_labels: {}}}"))
    assert config.serving.pools is not None and config.serving.pools.prefill is not None
    assert members(config.serving.pools.prefill, config.cluster.named_workers) == ["slow"]
    error = refusal(tmp_path, serving("pools: {prefill: {node_labels: {tier: fast, zone: b}}}"))
    assert error.field == "serving.pools.prefill.node_labels" and error.value == {"tier": "fast", "zone": "b"}


def test_a_replica_has_the_pool_of_its_workers_or_the_role_that_it_says(tmp_path: Path) -> None:
    pools = "pools: {prefill: {workers: [fast], block_size: 32, dtype: bfloat16}}, "
    config = load(tmp_path, cut(FAST, f"{SLOW}, role: decode", OTHER, rest=pools))
    assert config.serving.parallelism is not None
    pool_of = pool_of_each(config.serving.pools, config.cluster.named_workers)
    assert [replica_pool(replica, pool_of) for replica in config.serving.parallelism.replicas] == [
        Pool(role=Role.PREFILL, block_size=32, dtype=DType.BFLOAT16), Pool(role=Role.DECODE), Pool(),
    ]  # fmt: skip


def test_a_role_that_repeats_what_the_pool_says_is_fine(tmp_path: Path) -> None:
    pools = "pools: {prefill: {workers: [fast]}, decode: {workers: [slow]}}, "
    text = cut(f"{FAST}, role: prefill", SLOW, f"{OTHER}, role: mixed", rest=pools)
    assert load(tmp_path, text).serving.parallelism is not None


@pytest.mark.parametrize(
    ("text", "field", "problem"),
    [
        (serving("disaggregation: sometimes"), "serving.disaggregation", "is not one of"),
        (serving("kv_transfer: int4"), "serving.kv_transfer", "is not one of"),
        (serving("pools: {}"), "serving.pools", "has no pool"),
        (serving("pools: {prefil: {workers: [fast]}}"), "serving.pools.prefil", "is not a known key"),
        (serving("pools: {prefill: {workers: [fats]}}"), "serving.pools.prefill.workers.0", "is not the name of a"),
        (serving("pools: {prefill: {workers: []}}"), "serving.pools.prefill", "selects no worker"),
        (serving("pools: {decode: {block_size: 32}}"), "serving.pools.decode", "selects no worker"),
        (serving("pools: {prefill: {node_labels: {tier: quick}}}"),
         "serving.pools.prefill.node_labels", "are not among the node_labels"),
        (serving("pools: {prefill: {workers: [slow], node_labels: {tier: fsat}}}"),
         "serving.pools.prefill.node_labels", "are not among the node_labels"),
        (serving("pools: {prefill: {workers: [fast]}, decode: {workers: [slow, fast-1]}}"),
         "serving.pools.decode", "serving.pools.prefill selects too"),
        (serving("pools: {prefill: {workers: [fast], block_size: 0}}"), "serving.pools.prefill.block_size", "below 1"),
        (serving("pools: {prefill: {workers: [fast], dtype: half}}"), "serving.pools.prefill.dtype", "is not one of"),
        (serving("disaggregation: never, pools: {prefill: {workers: [fast]}}"),
         "serving.disaggregation", "some are for only one"),
        (cut(FAST, f"{SLOW}, role: prefill", OTHER, rest="disaggregation: never, "),
         "serving.disaggregation", "some are for only one"),
        (serving("pools: {prefill: {workers: [fast, slow, worker-3]}}"), "serving.pools", "so that nobody answers"),
        (serving("pools: {decode: {workers: [fast, slow, worker-3]}}"), "serving.pools", "nobody computes prompts"),
        (cut(*(f"{each}, role: prefill" for each in (FAST, SLOW, OTHER))),
         "serving.parallelism.replicas", "so that nobody answers"),
        (cut(*(f"{each}, role: decode" for each in (FAST, SLOW, OTHER))),
         "serving.parallelism.replicas", "nobody computes prompts"),
        (serving("disaggregation: always"), "serving.disaggregation", "no replica is for prompts only"),
        (serving("disaggregation: always, pools: {decode: {workers: [slow]}}"),
         "serving.disaggregation", "no replica is for prompts only"),
        (cut(FAST, SLOW, f"{OTHER}, role: both"), "serving.parallelism.replicas.2.role", "is not one of"),
        (cut(FAST, SLOW, OTHER, rest="pools: {prefill: {workers: [fast-0]}}, "),
         "serving.parallelism.replicas.0", "has workers of different pools"),
        (cut(f"{FAST}, role: decode", SLOW, OTHER, rest="pools: {prefill: {workers: [fast]}}, "),
         "serving.parallelism.replicas.0.role", "contradicts serving.pools.prefill"),
        (cut(f"{FAST}, role: mixed", SLOW, OTHER, rest="pools: {prefill: {workers: [fast]}}, "),
         "serving.parallelism.replicas.0.role", "contradicts serving.pools.prefill"),
    ],
)  # fmt: skip
def test_pools_that_make_no_sense_are_refused_by_their_field(
    tmp_path: Path, text: str, field: str, problem: str
) -> None:
    error = refusal(tmp_path, text)
    assert error.field == field
    assert problem in error.problem and error.fix


@pytest.mark.parametrize(
    "text",
    [
        serving("pools: {prefill: {workers: [fast]}}"),
        serving("pools: {decode: {workers: [slow]}}"),
        serving("disaggregation: always, pools: {prefill: {workers: [fast]}, decode: {workers: [slow, worker-3]}}"),
        serving("disaggregation: always, pools: {prefill: {workers: [fast]}}"),
        cut(f"{FAST}, role: prefill", f"{SLOW}, role: decode", OTHER, rest="disaggregation: always, "),
        cut(FAST, SLOW, OTHER, rest="disaggregation: never, "),
    ],
)
def test_prompts_and_answers_are_each_computed_by_somebody(tmp_path: Path, text: str) -> None:
    assert load(tmp_path, text).serving


def test_an_unknown_worker_of_a_replica_is_refused_once(tmp_path: Path) -> None:
    text = cut(
        "stages: [{workers: [fast-0, fast-1, slow, worker-3, nobody]}]", rest="pools: {prefill: {workers: [fast]}}, "
    )
    error = refusal(tmp_path, text)
    assert error.field == "serving.parallelism.replicas.0.stages.0.workers.4"
