"""The controller with attention workers: they load first, and what they and the ranks that use them are told."""

from dataclasses import replace

from orchestrator.controller import state as machine
from orchestrator.controller import wire
from orchestrator.controller.events import (
    Launch,
    LoadRank,
    Member,
    RankFailed,
    RankLoaded,
    RankStarted,
    RankStopped,
    Reserve,
    Shutdown,
    StartRank,
    StopRank,
)
from orchestrator.controller.settings import DeploymentSettings
from orchestrator.controller.state import Phase, State
from orchestrator.controller.supervision import Observed, plan
from placement.model.part import Part
from placement.model.specs import DeviceSpec, DType
from placement.planning.attention import GROUP, NO_PART
from placement.planning.limits import ReplicaLimits
from placement.planning.plan import Plan, Replica, Shard, Stage
from placement.planning.residency import Partition, resident
from protos.codec.formats import dtype_message
from protos.codec.residency import read_residency
from protos.heterodyne.control.v1 import control_pb2 as pb
from tests.support.planning import MODEL

EPOCH = 7
LIMITS = ReplicaLimits(block_size=16, token_budget=64, max_num_seqs=4)
SECRET = bytes(range(32))
RESIDENCY = resident(
    Partition.KV_HEADS, [3, 1], num_kv_heads=4, block_size=16, num_local_blocks=2, num_remote_blocks=[10, 12]
)


def shard(rank: int, worker: str, part: Part, kv_bytes: int = 1000) -> Shard:
    return Shard(
        rank=rank,
        node=f"node-{worker}",
        device=DeviceSpec(kind="cpu", memory_bytes=None, worker=worker),
        part=part,
        num_blocks=2,
        weight_bytes=0 if part == NO_PART else 1000,
        kv_bytes=kv_bytes,
        workspace_bytes=10,
    )


def replica(name: str, worker: str, *, offloads: bool = True) -> Replica:
    stage = Stage(layers=Part.whole(MODEL).layers, shards=(shard(0, worker, Part.whole(MODEL)),))
    residency = RESIDENCY if offloads else None
    return Replica(name=name, stages=(stage,), limits=LIMITS, dtype=DType.FLOAT32, residency=residency)


PLAN = Plan(
    model=MODEL,
    dtype=DType.FLOAT32,
    replicas=(replica("replica-0", "a"), replica("replica-1", "b", offloads=False)),
    attention=(shard(0, "m0", NO_PART, 5000), shard(1, "m1", NO_PART, 6000)),
)
SETTINGS = DeploymentSettings(plan=PLAN, model_path="/m", load_timeout_s=1.0, offloading="It pays.")
KEYS = frozenset(SETTINGS.shards)
ALL = Observed(reserved=True, processes=KEYS, followed=KEYS)


def started(group: str, rank: int) -> RankStarted:
    port = {"replica-0": 7000, "replica-1": 7100, GROUP: 7200}[group] + rank
    return RankStarted(
        replica=group, epoch=EPOCH, rank=rank, node="here", address=f"10.0.0.9:{port}", ranks_port=port + 1000, pid=port
    )


def loaded(group: str, rank: int) -> RankLoaded:
    return RankLoaded(replica=group, epoch=EPOCH, rank=rank)


def after(*events: object) -> State:
    state = machine.apply(State(), Launch(plan=PLAN, epoch=EPOCH))
    for event in events:
        state = machine.apply(state, event)  # type: ignore[arg-type]
    return state


EVERYBODY = [started(*key) for key in sorted(KEYS)]
WORKERS = [loaded(GROUP, 0), loaded(GROUP, 1)]


def loads(state: State) -> dict[tuple[str, int], LoadRank]:
    return {(each.replica, each.rank): each for each in plan(state, ALL) if isinstance(each, LoadRank)}


def test_attention_workers_are_reserved_and_started_with_all_others() -> None:
    (reserve,) = plan(after(), Observed())
    assert isinstance(reserve, Reserve) and {key for key, _ in reserve.shards} == KEYS
    assert {(each.replica, each.rank) for each in plan(after(), ALL) if isinstance(each, StartRank)} == KEYS


def test_attention_workers_load_before_the_ranks_whose_keys_and_values_they_hold() -> None:
    assert loads(after(*EVERYBODY)).keys() == {(GROUP, 0), (GROUP, 1), ("replica-1", 0)}
    assert ("replica-0", 0) not in loads(after(*EVERYBODY, WORKERS[0]))
    found = loads(after(*EVERYBODY, *WORKERS))
    assert found.keys() == {("replica-0", 0), ("replica-1", 0)}
    assert [each.address for each in found["replica-0", 0].attention] == ["10.0.0.9:7200", "10.0.0.9:7201"]
    assert not found["replica-1", 0].attention


def test_a_deployment_is_ready_with_the_last_of_all_ranks() -> None:
    state = after(*EVERYBODY, loaded("replica-1", 0), *WORKERS)
    assert state.attention is not None and state.attention.phase is Phase.READY
    assert state.phase is Phase.LOADING
    assert machine.apply(state, loaded("replica-0", 0)).phase is Phase.READY


def test_an_attention_worker_that_fails_in_the_launch_ends_it_with_its_cause() -> None:
    state = after(*EVERYBODY, RankFailed(replica=GROUP, epoch=EPOCH, rank=1, cause="no memory"))
    assert state.phase is Phase.FAILED
    assert state.cause == "rank 1 of attention (worker m1 on here): no memory"
    assert {(each.replica, each.rank) for each in plan(state, ALL) if isinstance(each, StopRank)} == KEYS


def test_an_attention_worker_that_fails_later_leaves_replicas_to_find_out() -> None:
    ready = [*EVERYBODY, *WORKERS, loaded("replica-0", 0), loaded("replica-1", 0)]
    state = after(*ready, RankFailed(replica=GROUP, epoch=EPOCH, rank=1, cause="killed"))
    assert state.phase is Phase.READY and [each.phase for each in state.replicas] == [Phase.READY] * 2
    assert state.attention is not None and state.attention.phase is Phase.FAILED


def test_a_shutdown_ends_attention_workers_too() -> None:
    state = after(*EVERYBODY, Shutdown())
    assert {(each.replica, each.rank) for each in plan(state, ALL) if isinstance(each, StopRank)} == KEYS
    for name, rank in sorted(KEYS):
        assert state.phase is Phase.DRAINING
        state = machine.apply(state, RankStopped(replica=name, epoch=EPOCH, rank=rank))
    assert state.phase is Phase.STOPPED


def test_an_attention_worker_is_told_its_memory_and_the_secret_and_no_model() -> None:
    request = SETTINGS.attention_request(PLAN.attention[1], epoch=EPOCH, secret=SECRET)
    assert request.attention.kv_cache_bytes == 6000 and request.attention.secret == SECRET
    assert list(request.attention.dtypes) == [dtype_message(PLAN.replicas[0].dtype)]
    assert request.attention.head_dim == PLAN.model.head_dim
    assert (request.epoch, request.model_path, request.HasField("residency")) == (EPOCH, "", False)


def test_a_model_rank_is_told_where_its_blocks_are_and_where_attention_workers_listen() -> None:
    members = [
        Member(address="10.0.0.9:7200", ranks_port=8200, shard=PLAN.attention[0]),
        Member(address="[fe80::1]:7201", ranks_port=8201, shard=PLAN.attention[1]),
    ]
    settings = replace(SETTINGS, q_first=False, staggered=False)
    (rank,) = PLAN.replicas[0].shards
    request = settings.load_request("replica-0", rank, epoch=EPOCH)
    settings.add_residency(request, "replica-0", wire.attention_workers(members), SECRET)
    assert request.num_blocks == RESIDENCY.num_blocks == 12
    assert read_residency(request.residency, MODEL, num_blocks=12, block_size=16) == RESIDENCY
    said = request.residency
    assert [(each.host, each.port, each.name) for each in said.workers] == [
        ("10.0.0.9", 8200, "m0"), ("fe80::1", 8201, "m1"),
    ]  # fmt: skip
    assert (said.secret, said.replica, said.q_first, said.staggered) == (SECRET, "replica-0", False, False)


def test_a_rank_that_holds_its_own_blocks_is_told_of_no_attention_workers() -> None:
    (rank,) = PLAN.replicas[1].shards
    request = SETTINGS.load_request("replica-1", rank, epoch=EPOCH)
    SETTINGS.add_residency(request, "replica-1", (), SECRET)
    assert not request.HasField("residency") and request.num_blocks == rank.num_blocks


def test_watchers_learn_what_attention_workers_hold_and_what_was_decided() -> None:
    message = wire.deployment(after(*EVERYBODY), version=1, plan=PLAN, offloading=SETTINGS.offloading)
    assert [each.name for each in message.replicas] == ["replica-0", "replica-1"]
    assert message.attention.name == GROUP and message.attention.phase == pb.PHASE_LOADING
    assert [each.worker for each in message.attention.ranks] == ["m0", "m1"]
    assert message.attention.ranks[0].holds == "KV heads 0-2 of 4 of 160 tokens of replica-0 (960 KiB)"
    assert message.offloading == "It pays."
    plain = wire.deployment(State(), version=1)
    assert not plain.HasField("attention") and not plain.offloading
