"""The controller's decisions: events change the state, and commands follow from it."""

import itertools
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.controller import state as machine
from orchestrator.controller.events import (
    Command,
    Event,
    FollowRank,
    Launch,
    LoadRank,
    RankEvent,
    RankFailed,
    RankLoaded,
    RankProgress,
    RankStarted,
    RankStopped,
    Reserve,
    Shutdown,
    StartRank,
    StopRank,
)
from orchestrator.controller.state import Phase, State
from orchestrator.controller.supervision import Observed, plan
from placement.measured.collectives import MeasuredSum
from placement.measured.measurements import NOTHING_MEASURED, StageMeasurements
from placement.model.part import Part, Span
from placement.model.specs import DeviceSpec, DType, ModelSpec, RopeSpec
from placement.planning.limits import ReplicaLimits
from placement.planning.plan import Plan, Replica, Shard, Stage
from protos.codec.loading import Loading

EPOCH = 5
MODEL = ModelSpec(
    architecture="llama",
    num_layers=4,
    hidden_size=8,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    ffn_size=16,
    vocab_size=32,
    max_context_tokens=64,
    rms_norm_eps=1e-5,
    rope=RopeSpec(),
    tied_embeddings=True,
)


# Everything is reserved, and every rank may have a process, which is followed.
KEYS = frozenset((f"replica-{i}", rank) for i in range(2) for rank in range(3))
ALL = Observed(reserved=True, processes=KEYS, followed=KEYS)


# Nobody follows a process.
UNSEEN = replace(ALL, followed=frozenset())


def apply(state: State, event: Event) -> tuple[State, tuple[Command, ...]]:
    """The state after an event, and the commands that were not planned before it."""
    after = machine.apply(state, event)
    return after, tuple(command for command in plan(after, ALL) if command not in plan(state, ALL))


def stops(state: State, observed: Observed = ALL) -> set[tuple[str, int]]:
    return {(c.replica, c.rank) for c in plan(state, observed) if isinstance(c, StopRank)}


LIMITS = ReplicaLimits(block_size=8, token_budget=64, max_num_seqs=8)


def make_plan(num_replicas: int, num_ranks: int) -> Plan:
    device = DeviceSpec(kind="cpu", memory_bytes=1 << 30)

    def shard(rank: int) -> Shard:
        return Shard(
            rank=rank,
            node=f"node-{rank}",
            device=device,
            part=replace(Part.whole(MODEL), layers=Span(rank, rank + 1)),
            num_blocks=8,
            weight_bytes=1000,
            kv_bytes=100,
            workspace_bytes=10,
        )

    def replica(number: int) -> Replica:
        stages = tuple(Stage(layers=Span(r, r + 1), shards=(shard(r),)) for r in range(num_ranks))
        return Replica(name=f"replica-{number}", stages=stages, limits=LIMITS, dtype=DType.FLOAT32)

    return Plan(model=MODEL, dtype=DType.FLOAT32, replicas=tuple(replica(i) for i in range(num_replicas)))


def started(replica: str, rank: int, epoch: int = EPOCH) -> RankStarted:
    return RankStarted(
        replica=replica,
        epoch=epoch,
        rank=rank,
        node=f"host-{rank}",
        address=f"127.0.0.1:{7000 + rank}",
        ranks_port=8000 + rank,
        pid=100 + rank,
    )


def loaded(replica: str, rank: int, epoch: int = EPOCH) -> RankLoaded:
    return RankLoaded(replica=replica, epoch=epoch, rank=rank)


def failed(replica: str, rank: int, cause: str = "killed", epoch: int = EPOCH) -> RankFailed:
    return RankFailed(replica=replica, epoch=epoch, rank=rank, cause=cause)


def launched(num_replicas: int = 2, num_ranks: int = 2) -> State:
    """A deployment that serves."""
    state, _ = apply(State(), Launch(plan=make_plan(num_replicas, num_ranks), epoch=EPOCH))
    for number, rank in itertools.product(range(num_replicas), range(num_ranks)):
        state, _ = apply(state, started(f"replica-{number}", rank))
        state, _ = apply(state, loaded(f"replica-{number}", rank))
    assert state.phase is Phase.READY
    return state


def test_launch_starts_every_rank_of_every_replica() -> None:
    state, commands = apply(State(), Launch(plan=make_plan(2, 2), epoch=EPOCH))
    assert [(c.replica, c.epoch, c.shard.rank) for c in commands if isinstance(c, StartRank)] == [
        ("replica-0", EPOCH, 0),
        ("replica-0", EPOCH, 1),
        ("replica-1", EPOCH, 0),
        ("replica-1", EPOCH, 1),
    ]
    assert state.phase is Phase.STARTING


def test_a_started_rank_is_told_to_load_at_its_address() -> None:
    state, _ = apply(State(), Launch(plan=make_plan(1, 1), epoch=EPOCH))
    state, commands = apply(state, started("replica-0", 0))
    (command,) = commands
    assert isinstance(command, LoadRank)
    assert command.address == "127.0.0.1:7000"
    assert [member.address for member in command.members] == [command.address], "other replicas reach it there"
    assert state.replicas[0].phase is Phase.LOADING
    compiles = Loading.COMPILE
    progress = RankProgress(
        replica="replica-0", epoch=EPOCH, rank=0, loaded_bytes=300, total_bytes=400, loading=compiles
    )
    state, commands = apply(state, progress)
    rank = state.replicas[0].ranks[0]
    assert (rank.loaded_bytes, rank.total_bytes, rank.loading, commands) == (300, 400, compiles, ())
    state, _ = apply(state, RankLoaded(replica="replica-0", epoch=EPOCH, rank=0))
    assert state.replicas[0].ranks[0].loading is None


def test_what_a_rank_measured_is_kept_whatever_becomes_of_it() -> None:
    sum_ = MeasuredSum(num_bytes=1024, algorithm="direct", duration_s=5e-5)
    measured = StageMeasurements(sums=(sum_,))
    state, _ = apply(State(), Launch(plan=make_plan(1, 2), epoch=EPOCH))
    for rank in range(2):
        state, _ = apply(state, started("replica-0", rank))
    state, _ = apply(state, RankLoaded(replica="replica-0", epoch=EPOCH, rank=0, measured=measured))
    state, _ = apply(state, loaded("replica-0", 1))
    assert [rank.measured for rank in state.replicas[0].ranks] == [measured, NOTHING_MEASURED]
    state, _ = apply(state, failed("replica-0", 0))
    assert [rank.measured for rank in state.replicas[0].ranks] == [measured, NOTHING_MEASURED]


def test_ranks_of_a_replica_load_together_once_the_last_has_started() -> None:
    state, _ = apply(State(), Launch(plan=make_plan(2, 3), epoch=EPOCH))
    for rank in (2, 0):
        state, commands = apply(state, started("replica-1", rank))
        assert commands == ()
    state, commands = apply(state, started("replica-1", 1))
    assert [(c.replica, c.shard.rank, c.address) for c in commands if isinstance(c, LoadRank)] == [
        ("replica-1", rank, f"127.0.0.1:{7000 + rank}") for rank in range(3)
    ]
    for command in commands:
        assert isinstance(command, LoadRank)
        assert [(m.address, m.ranks_port, m.shard.rank) for m in command.members] == [
            (f"127.0.0.1:{7000 + rank}", 8000 + rank, rank) for rank in range(3)
        ]


def test_a_replica_that_failed_meanwhile_does_not_load() -> None:
    state, _ = apply(State(), Launch(plan=make_plan(1, 3), epoch=EPOCH))
    state, _ = apply(state, started("replica-0", 0))
    state, _ = apply(state, failed("replica-0", 1))
    _, commands = apply(state, started("replica-0", 2))
    assert not any(isinstance(command, LoadRank) for command in commands)


def test_a_replica_is_ready_when_its_last_rank_is_and_the_deployment_when_its_last_replica_is() -> None:
    state, _ = apply(State(), Launch(plan=make_plan(2, 2), epoch=EPOCH))
    phases = []
    for number, rank in itertools.product(range(2), range(2)):
        state, _ = apply(state, started(f"replica-{number}", rank))
        state, _ = apply(state, loaded(f"replica-{number}", rank))
        phases.append((tuple(replica.phase for replica in state.replicas), state.phase))
    assert phases[0][0][0] is Phase.STARTING
    assert phases[1] == ((Phase.READY, Phase.STARTING), Phase.STARTING)
    assert phases[3] == ((Phase.READY, Phase.READY), Phase.READY)
    assert state.launched


def test_a_failure_in_the_launch_stops_everything_and_its_cause_is_the_first() -> None:
    state, _ = apply(State(), Launch(plan=make_plan(2, 2), epoch=EPOCH))
    state, _ = apply(state, started("replica-0", 0))
    state, commands = apply(state, failed("replica-0", 1, "out of memory"))
    assert state.phase is Phase.FAILED
    assert state.cause == "rank 1 of replica-0 (on node-1): out of memory"
    assert {(c.replica, c.rank) for c in commands if isinstance(c, StopRank)} == {
        ("replica-0", 0),
        ("replica-0", 1),
        ("replica-1", 0),
        ("replica-1", 1),
    }
    state, _ = apply(state, failed("replica-0", 0, "lost its peer"))
    assert state.cause == "rank 1 of replica-0 (on node-1): out of memory"


def test_a_failure_later_ends_that_replica_and_leaves_the_other_serving() -> None:
    state, commands = apply(launched(), failed("replica-1", 0))
    assert [replica.phase for replica in state.replicas] == [Phase.READY, Phase.FAILED]
    assert state.phase is Phase.READY
    assert state.replicas[1].cause == "rank 0 of replica-1 (on host-0): killed"
    assert {(c.replica, c.rank) for c in commands if isinstance(c, StopRank)} == {("replica-1", 0), ("replica-1", 1)}


def test_the_last_replica_lost_fails_the_deployment() -> None:
    state, _ = apply(launched(num_replicas=1), failed("replica-0", 0))
    assert state.phase is Phase.FAILED
    assert "killed" in state.cause


def test_an_event_of_a_passed_epoch_changes_nothing() -> None:
    before = launched()
    for event in (failed("replica-0", 0, epoch=EPOCH - 1), loaded("replica-0", 0, epoch=EPOCH + 1)):
        assert apply(before, event) == (before, ())


def test_what_a_rank_that_ended_says_is_ignored() -> None:
    state, _ = apply(launched(), failed("replica-0", 0))
    for event in (failed("replica-0", 0, "again"), loaded("replica-0", 0)):
        assert apply(state, event) == (state, ())


def test_shutdown_stops_what_runs_and_ends_when_all_have_stopped() -> None:
    state, _ = apply(launched(), failed("replica-1", 0))
    state, _ = apply(state, RankStopped(replica="replica-1", epoch=EPOCH, rank=1))
    state, commands = apply(state, Shutdown())
    assert {(c.replica, c.rank) for c in commands if isinstance(c, StopRank)} == {("replica-0", 0), ("replica-0", 1)}
    assert state.phase is Phase.DRAINING
    for rank in range(2):
        state, _ = apply(state, RankStopped(replica="replica-0", epoch=EPOCH, rank=rank))
    assert state.phase is Phase.STOPPED
    assert [replica.phase for replica in state.replicas] == [Phase.STOPPED, Phase.FAILED]


def test_shutdown_with_nothing_running_is_stopped_at_once() -> None:
    state, commands = apply(State(), Shutdown())
    assert (state.phase, commands) == (Phase.STOPPED, ())


KINDS = ("started", "loaded", "failed", "stopped", "progress", "shutdown")


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 1), st.integers(0, 1), st.integers(4, 5)), max_size=40)
)
def test_whatever_happens_the_state_is_sound(events: list[tuple[str, int, int, int]]) -> None:
    state, _ = apply(State(), Launch(plan=make_plan(2, 2), epoch=EPOCH))
    for kind, number, rank, epoch in events:
        name = f"replica-{number}"
        base = RankEvent(replica=name, epoch=epoch, rank=rank)
        event: Event = {
            "started": started(name, rank, epoch),
            "loaded": loaded(name, rank, epoch),
            "failed": failed(name, rank, epoch=epoch),
            "stopped": RankStopped(replica=base.replica, epoch=epoch, rank=rank),
            "progress": RankProgress(replica=name, epoch=epoch, rank=rank, loaded_bytes=1),
            "shutdown": Shutdown(),
        }[kind]
        before = state
        state, commands = apply(before, event)
        check(before, state, commands)


def check(before: State, state: State, commands: tuple[Command, ...]) -> None:
    for old, new in zip(before.replicas, state.replicas, strict=True):
        assert new.epoch == old.epoch
        for old_rank, new_rank in zip(old.ranks, new.ranks, strict=True):
            assert not old_rank.phase.ended or new_rank == old_rank, "what has ended stays as it is"
        if new.phase is Phase.READY:
            assert all(rank.phase is Phase.READY for rank in new.ranks)
        if new.phase is Phase.FAILED:
            assert new.cause
            assert any(rank.phase is Phase.FAILED for rank in new.ranks)
            alive = {(new.name, rank.shard.rank) for rank in new.ranks if not rank.phase.ended}
            assert alive <= stops(state, Observed(reserved=True)), "until they have ended, whatever was lost"
        if state.phase in (Phase.FAILED, Phase.DRAINING) and not (state.launched and state.phase is Phase.FAILED):
            assert {(new.name, rank.shard.rank) for rank in new.ranks} == stops(state) & {(new.name, 0), (new.name, 1)}
    unseen = {(c.replica, c.rank) for c in plan(state, UNSEEN) if isinstance(c, FollowRank)}
    running = {
        (replica.name, rank.shard.rank)
        for replica in state.replicas
        for rank in replica.ranks
        if rank.phase in (Phase.LOADING, Phase.READY)
    }
    assert unseen == running - stops(state), "what runs is followed or is to be stopped"
    assert not {
        c for c in plan(state, ALL) if isinstance(c, StartRank | LoadRank) and (c.replica, c.rank) in stops(state)
    }
    assert len(commands) == len(set(map(repr, commands)))
    if state.phase is Phase.STOPPED:
        assert all(rank.phase.ended for replica in state.replicas for rank in replica.ranks)


def test_the_shard_of_a_command_is_that_of_the_plan() -> None:
    wanted = make_plan(1, 2)
    _, commands = apply(State(), Launch(plan=wanted, epoch=EPOCH))
    assert [c.shard for c in commands if isinstance(c, StartRank)] == list(wanted.replicas[0].shards)


def test_nothing_is_started_before_all_of_it_is_reserved() -> None:
    state = machine.apply(State(), Launch(plan=make_plan(2, 2), epoch=EPOCH))
    (reserve,) = plan(state, Observed())
    assert isinstance(reserve, Reserve)
    assert [key for key, _ in reserve.shards] == [(f"replica-{i}", rank) for i in range(2) for rank in range(2)]


def test_what_is_to_be_done_follows_from_where_things_are_and_not_from_what_was_heard() -> None:
    """A command stays planned until its effect is seen."""
    state = machine.apply(State(), Launch(plan=make_plan(1, 2), epoch=EPOCH))
    state = machine.apply(state, started("replica-0", 0))
    assert [(type(c), c.rank) for c in plan(state, ALL) if isinstance(c, StartRank)] == [(StartRank, 1)]
    state = machine.apply(state, started("replica-0", 1))
    state = machine.apply(state, loaded("replica-0", 0))
    assert [(type(c), c.rank) for c in plan(state, ALL) if isinstance(c, LoadRank)] == [(LoadRank, 1)]
    state = machine.apply(state, loaded("replica-0", 1))
    assert plan(state, ALL) == ()


def test_a_process_that_nobody_follows_is_to_be_followed_until_it_is_to_end() -> None:
    def follows(state: State, followed: frozenset[tuple[str, int]] = frozenset()) -> set[tuple[str, int]]:
        planned = plan(state, replace(ALL, followed=followed))
        return {(c.replica, c.rank) for c in planned if isinstance(c, FollowRank)}

    state = machine.apply(State(), Launch(plan=make_plan(1, 2), epoch=EPOCH))
    assert follows(state) == set(), "nothing runs"
    state = machine.apply(state, started("replica-0", 0))
    assert follows(state) == {("replica-0", 0)}
    state = launched(num_replicas=1)
    both = {("replica-0", 0), ("replica-0", 1)}
    assert follows(state) == both
    assert follows(state, frozenset({("replica-0", 0)})) == {("replica-0", 1)}
    assert follows(machine.apply(state, failed("replica-0", 0))) == set()
    assert follows(machine.apply(state, Shutdown())) == set()


def test_what_has_ended_is_stopped_for_as_long_as_it_may_have_a_process() -> None:
    state = machine.apply(launched(num_replicas=1), failed("replica-0", 0))
    state = machine.apply(state, RankStopped(replica="replica-0", epoch=EPOCH, rank=1))
    both = frozenset({("replica-0", 0), ("replica-0", 1)})
    assert stops(state, Observed(reserved=True, processes=both)) == both
    assert stops(state, Observed(reserved=True, processes=both - {("replica-0", 1)})) == {("replica-0", 0)}
    assert plan(state, Observed(reserved=True)) == ()
