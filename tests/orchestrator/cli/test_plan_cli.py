"""The command ``plan``: what would be done, in words and as a picture."""

from pathlib import Path
from xml.etree import ElementTree

import pytest

from orchestrator.cli.plan import show_plan
from orchestrator.cli.plan_picture import describe, plan_svg, shares
from orchestrator.deployment.plan_lines import plan_events, warning_events
from orchestrator.deployment.preflight import Checked, preflight
from placement.errors import InvalidConfig
from placement.model.specs import ClusterSpec, DeviceSpec, DType, NodeSpec
from placement.planning.layout import ReplicaLayout, StageLayout
from placement.planning.limits import ReplicaLimits
from placement.planning.plan import Plan
from placement.planning.planner import plan_replicas
from placement.planning.seating import Host
from tests.support.deploying.deployment import MACHINE, make_config, too_large_for_each
from tests.support.shapes import LLAMA_8B

DEVICE = DeviceSpec(kind="cpu", memory_bytes=2**40)
CLUSTER = ClusterSpec(
    nodes=tuple(NodeSpec(name=name, memory_bytes=2**40, devices=(DEVICE,)) for name in ("a", "b", "c", "d"))
)
SVG = "{http://www.w3.org/2000/svg}"
FREE = ["gateway.address=127.0.0.1:0", "telemetry.prometheus_address=null"]


@pytest.fixture(scope="module")
def plan() -> Plan:
    """Two stages of unequal ranks, and a replica whose second rank holds nothing of the layers' attention."""
    layouts = (
        ReplicaLayout(
            stages=(
                StageLayout(devices=(0, 1), weights=(3, 1), num_layers=24),
                StageLayout(devices=(2,), weights=(1,), num_layers=8),
            )
        ),
        ReplicaLayout(stages=(StageLayout(devices=(3,), weights=(1,)),)),
    )
    return plan_replicas(
        LLAMA_8B, CLUSTER, dtype=DType.BFLOAT16, kv_cache_bytes=2**33, max_context_tokens=None,
        limits=ReplicaLimits(block_size=16, token_budget=256, max_num_seqs=32), layouts=layouts,
    )  # fmt: skip


def test_every_rank_has_a_line_with_its_worker_and_what_it_holds(tmp_path: Path, served_checkpoint: Path) -> None:
    stages = [{"workers": ["b", "worker-1"]}, {"workers": ["a"], "layers": 1}]
    config = make_config(
        tmp_path,
        served_checkpoint,
        cluster={"workers": [{"name": "a", "threads": 1}, {"threads": 1}, {"name": "b", "threads": 1}]},
        serving={"parallelism": {"replicas": [{"stages": stages}]}},
    )
    checked = preflight(config, machine=MACHINE)
    *lines, context = [said.pairs() for said in plan_events(checked)]
    assert context.startswith("event=context context_tokens=")
    assert [line.split()[1:5] for line in lines] == [
        ["replica=replica-0", "stage=0", "rank=0", "worker=b"],
        ["replica=replica-0", "stage=0", "rank=1", "worker=worker-1"],
        ["replica=replica-0", "stage=1", "rank=2", "worker=a"],
    ]
    assert "layers=0 kv_heads=0 " in lines[0] and "layers=0 kv_heads=1 " in lines[1]
    assert "layers=1 kv_heads=0-1 " in lines[2] and "vocab_rows=none" in lines[2]
    assert len({line.split("kv_tokens=")[1] for line in lines}) == 1


def test_more_threads_than_cores_are_a_warning_where_no_worker_alone_has_them(
    tmp_path: Path, served_checkpoint: Path
) -> None:
    config = make_config(tmp_path, served_checkpoint, cluster={"workers": [{"threads": 3, "count": 3}]})
    (warning,) = warning_events(preflight(config, machine=MACHINE))
    last = warning.pairs()
    assert last == (
        'event=more_threads_than_cores threads=9 cores=8 effect="cpu workers slow each other down" '
        'fix="lower threads or count in cluster.workers"'
    )


def test_ranks_of_a_replica_have_as_many_blocks_and_take_no_more_memory_than_set(plan: Plan) -> None:
    shards = plan.replicas[0].shards
    assert len({shard.num_blocks for shard in shards}) == 1
    assert max(shard.kv_bytes for shard in shards) <= 2**33 < max(shard.kv_bytes for shard in shards) * 1.01
    per_block = [shard.kv_bytes // shard.num_blocks for shard in shards]
    assert per_block == [24 * 6 * 8192, 24 * 2 * 8192, 8 * 8 * 8192]


def test_the_picture_has_a_box_for_every_rank_as_wide_as_its_share(plan: Plan) -> None:
    root = ElementTree.fromstring(plan_svg(plan))
    boxes = [group.find(f"{SVG}rect") for group in root.iter(f"{SVG}g")]
    widths = [float(box.get("width", "0")) for box in boxes if box is not None]
    assert len(widths) == 4
    first, second = shares(plan.replicas[0].stages[0])
    assert widths[0] / widths[1] == pytest.approx(first / second, rel=0.01) and 2.5 < first / second < 3.5
    assert widths[2] == pytest.approx(widths[0] + widths[1], rel=0.01)
    titles = [title.text or "" for title in root.iter(f"{SVG}title")]
    assert "vocabulary" in titles[0] and "vocabulary" not in titles[2]


def test_nothing_of_what_a_rank_holds_is_left_out_however_narrow_its_box_is(plan: Plan) -> None:
    layout = ReplicaLayout(
        stages=(
            StageLayout(devices=(0, 1, 2), weights=(62, 1, 1)),
            StageLayout(devices=(3,), weights=(1,), num_layers=1),
        )
    )
    narrow = plan_replicas(
        LLAMA_8B, CLUSTER, dtype=DType.BFLOAT16, kv_cache_bytes=2**33, max_context_tokens=None,
        limits=ReplicaLimits(block_size=16, token_budget=256, max_num_seqs=32), layouts=(layout,),
    )  # fmt: skip
    for drawn in (plan, narrow):
        root = ElementTree.fromstring(plan_svg(drawn, lambda shard: f"node {shard.node}"))
        written = " ".join(text.text or "" for text in root.iter(f"{SVG}text"))
        bottom = max(float(text.get("y", "0")) for text in root.iter(f"{SVG}text"))
        assert bottom < float(root.get("viewBox", "").split()[3])
        for shard in (shard for replica in drawn.replicas for shard in replica.shards):
            for line in describe(shard, drawn.model, f"node {shard.node}"):
                assert line in written, line


def test_a_rank_without_a_share_is_said_to_have_none(plan: Plan) -> None:
    lines = describe(plan.replicas[0].shards[2], plan.model, "c")
    assert "KV heads all 8" in lines
    layouts = (ReplicaLayout(stages=(StageLayout(devices=(0, 1), weights=(1, 0)),)),)
    made = plan_replicas(
        LLAMA_8B, CLUSTER, dtype=DType.BFLOAT16, kv_cache_bytes=2**33, max_context_tokens=None,
        limits=ReplicaLimits(block_size=16, token_budget=256, max_num_seqs=32), layouts=layouts,
    )  # fmt: skip
    idle = made.replicas[0].shards[1]
    assert {"KV heads none", "FFN columns none"} <= set(describe(idle, made.model, "b"))
    assert idle.kv_bytes == 0


def test_the_plan_of_a_file_is_shown_and_drawn(tmp_path: Path) -> None:
    picture = tmp_path / "plan.svg"
    lines = list(show_plan(Path("deploy/split.yaml"), overrides=FREE[:1], picture=picture))
    assert [line.split()[3:5] for line in lines[:2]] == [["rank=0", "worker=big"], ["rank=1", "worker=small"]]
    assert lines[2:] == ["event=context context_tokens=2048 model_context_tokens=2048", f"drawn in {picture}"]
    assert ElementTree.parse(picture).getroot().tag == f"{SVG}svg"


def test_a_plan_that_cuts_a_model_unasked_says_by_what_and_that_speed_counts_when_served(
    tmp_path: Path, served_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.deployment.preflight.measure_machine", lambda: MACHINE)
    too_large_for_each(tmp_path, served_checkpoint, 1, 3)
    *ranks, _, last = show_plan(tmp_path / "cluster.yaml", overrides=[], picture=None)
    assert len(ranks) == 2
    assert last == 'event=auto_split by=threads when_served="by measured speed"'


def test_a_picture_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match=r"--svg: cannot be written: no such file"):
        list(show_plan(Path("deploy/local.yaml"), overrides=FREE, picture=tmp_path / "no" / "plan.svg"))


def test_a_plan_names_targets_where_they_are_known_and_says_what_follows_where_they_differ(
    tmp_path: Path, served_checkpoint: Path
) -> None:
    workers = [{"name": name, "device": "cpu", "threads": 1} for name in ("a", "b")]
    parallelism = {"replicas": [{"stages": [{"workers": ["a", "b"]}]}]}
    config = make_config(
        tmp_path,
        served_checkpoint,
        model={"path": str(served_checkpoint), "dtype": "bfloat16"},
        cluster={"ray_address": "auto", "workers": workers},
        serving={"parallelism": parallelism},
    )
    hosts = tuple(
        Host(
            host_id=name, name=name, labels={}, num_cpus=1, num_gpus=0, memory_bytes=2**36, total_cpus=1, total_gpus=0,
            target=target,
        )
        for name, target in (("x", "avx512f"), ("y", "generic"))
    )  # fmt: skip
    said = list(plan_events(preflight(config, machine=MACHINE, listens=False, hosts=hosts)))
    assert [each.fields.get("target") for each in said[:2]] == ["avx512f", "generic"]
    assert "cpu of node x, target avx512f, 1 thread(s)" in said[0].sentence
    assert said[2].event == "mixed_targets" and said[2].sentence == (
        "The ranks of replica-0 have the targets avx512f and generic: in bfloat16 answers depend on who computes."
    )
    unknown = list(plan_events(preflight(config, machine=MACHINE, listens=False)))
    assert "target" not in unknown[0].pairs() and [each.event for each in unknown] == ["plan", "plan", "context"]


def pools(tmp_path: Path, model: Path, **serving: object) -> Checked:
    """Three workers: one for prompts, in bfloat16 and in larger blocks, one for answers, and one for both."""
    own = {"prefill": {"workers": ["a"], "dtype": "bfloat16", "block_size": 32}, "decode": {"workers": ["b"]}}
    config = make_config(
        tmp_path,
        model,
        model={"dtype": "float32"},
        cluster={"workers": [{"name": name, "threads": 1} for name in "abc"]},
        serving={"pools": own, **serving},
    )
    return preflight(config, machine=MACHINE, listens=False)


def test_a_plan_says_who_computes_what_where_replicas_differ(tmp_path: Path, served_checkpoint: Path) -> None:
    checked = pools(tmp_path, served_checkpoint)
    *ranks, roles, _ = plan_events(checked)
    assert [(said.fields["role"], said.fields["dtype"]) for said in ranks] == [
        ("prefill", "bfloat16"), ("decode", "float32"), ("mixed", "float32"),
    ]  # fmt: skip
    assert ranks[0].sentence.startswith("replica-0 (prefill, bfloat16) rank 0: worker a, ")
    assert roles.pairs() == (
        "event=roles prefill=replica-0 decode=replica-1 mixed=replica-2 disaggregation=auto "
        "kv_transfer=bfloat16,float32"
    )
    assert roles.sentence == (
        "replica-0 computes prompts, replica-1 answers them, replica-2 does both; keys and values go over the network "
        "as bfloat16 or float32, where that is expected to be faster."
    )


def test_many_replicas_of_a_role_are_counted_and_not_all_named(tmp_path: Path, served_checkpoint: Path) -> None:
    config = make_config(
        tmp_path,
        served_checkpoint,
        cluster={"workers": [{"name": "a", "threads": 1}, {"name": "b", "threads": 1, "count": 7}]},
        serving={"pools": {"decode": {"workers": ["b"]}}, "kv_transfer": "int8", "kv_cache": "1MiB"},
    )
    checked = preflight(config, machine=MACHINE, listens=False)
    (said,) = (each for each in plan_events(checked) if each.event == "roles")
    assert said.sentence.startswith(
        "replica-1, replica-2, replica-3, replica-4 and 3 more answer prompts of others, replica-0 does both; "
    )
    assert "as 8-bit integers" in said.sentence and said.fields["kv_transfer"] == "int8"


def test_a_picture_says_what_each_replica_is_for(tmp_path: Path, served_checkpoint: Path) -> None:
    root = ElementTree.fromstring(plan_svg(pools(tmp_path, served_checkpoint).plan))
    titles = [text.text or "" for text in root.iter(f"{SVG}text") if (text.text or "").startswith("replica-")]
    assert [title.split(", ")[:3] for title in titles] == [
        ["replica-0: prefill", "1 rank", "bfloat16"],
        ["replica-1: decode", "1 rank", "float32"],
        ["replica-2: mixed", "1 rank", "float32"],
    ]


def test_nothing_is_said_of_roles_where_all_replicas_do_both(tmp_path: Path, served_checkpoint: Path) -> None:
    checked = pools(tmp_path, served_checkpoint, pools=None)
    assert [said.event for said in plan_events(checked)] == ["plan"] * 3 + ["context"]
    assert "role=" not in " ".join(said.pairs() for said in plan_events(checked))
