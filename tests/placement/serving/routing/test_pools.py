from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from placement.planning.plan import Role
from placement.serving.routing.pools import PHASES, Member, Pools, Thresholds, balanced

THRESHOLDS = Thresholds(home_s=0.25, spill_s=1.0, pull_s=3.0)
P = Member(name="p", role=Role.PREFILL)
D = Member(name="d", role=Role.DECODE)
M = Member(name="m", role=Role.MIXED)


def after(*steps: tuple[Member, ...], pools: Pools | None = None) -> Pools:
    pools = pools or Pools()
    for members in steps:
        pools = balanced(pools, members, THRESHOLDS)
    return pools


def serving(pools: Pools, phase: Role, *members: Member) -> set[str]:
    return set(pools.serving(phase, [(member.name, member.role) for member in members]))


def test_each_pool_serves_its_phase_and_mixed_replicas_nothing_while_there_is_no_pressure() -> None:
    pools = after((P, D, M))
    assert pools == Pools()
    assert serving(pools, Role.PREFILL, P, D, M) == {"p"} and serving(pools, Role.DECODE, P, D, M) == {"d"}


def test_mixed_replicas_serve_a_phase_that_nobody_is_for() -> None:
    assert serving(Pools(), Role.PREFILL, D, M) == {"m"} and serving(Pools(), Role.DECODE, D, M) == {"d"}
    assert serving(Pools(), Role.PREFILL, M) == serving(Pools(), Role.DECODE, M) == {"m"}


def test_whoever_is_left_serves_a_phase_whose_replicas_are_all_gone() -> None:
    assert serving(Pools(), Role.PREFILL, D) == {"d"} and serving(Pools(), Role.DECODE, P) == {"p"}


def test_mixed_replicas_help_above_the_threshold_and_until_the_queue_is_short_again() -> None:
    busy, shorter, short = (replace(P, prompt_s=seconds) for seconds in (1.5, 0.5, 0.1))
    assert after((shorter, D, M)) == Pools(), "not yet"
    helped = after((busy, D, M))
    assert helped.spilled == {Role.PREFILL} and not helped.pulled
    assert serving(helped, Role.PREFILL, P, D, M) == {"p", "m"} and serving(helped, Role.DECODE, P, D, M) == {"d"}
    assert after((shorter, D, M), pools=helped) == helped, "between the thresholds nothing changes"
    assert after((short, D, M), pools=helped) == Pools()


def test_a_replica_of_the_other_pool_is_pulled_once_mixed_ones_are_too_busy_and_returns_home() -> None:
    busy, busy_mixed = replace(P, prompt_s=9.0), replace(M, prompt_s=4.0)
    other = replace(D, name="e", answer_s=0.5)
    assert not after((busy, replace(M, prompt_s=2.0), D, other)).pulled
    pulled = after((busy, busy_mixed, D, other))
    assert pulled.pulled == {"d"}, "the one with the shorter queue of its own"
    assert serving(pulled, Role.PREFILL, busy, busy_mixed, D, other) == {"p", "m", "d"}
    assert serving(pulled, Role.DECODE, busy, busy_mixed, D, other) >= {"e"}
    assert after((busy, busy_mixed, D, other), pools=pulled).pulled == {"d"}, "it has room, so one is enough"
    full = replace(D, prompt_s=4.0)
    assert after((busy, busy_mixed, full, other), pools=pulled).pulled == {"d", "e"}
    assert after((replace(P, prompt_s=0.5), M, D, other), pools=pulled).pulled == set()
    assert after((P, M, D, other), pools=pulled) == Pools()


def test_answers_pull_a_replica_that_is_for_prompts_as_well() -> None:
    pools = after((P, replace(D, answer_s=5.0)))
    assert pools.pulled == {"p"} and serving(pools, Role.DECODE, P, D) == {"d", "p"}


def test_nobody_is_pulled_from_a_pool_that_is_too_busy_itself() -> None:
    assert not after((replace(P, prompt_s=9.0), replace(D, answer_s=2.0))).pulled


def test_the_pool_that_lost_all_its_replicas_is_replaced_until_one_is_back() -> None:
    gone = after((D, replace(D, name="e")))
    assert gone.pulled == {"d"} and Role.PREFILL in gone.spilled
    assert after((P, D, replace(D, name="e")), pools=gone) == Pools()


MEMBERS = st.lists(
    st.builds(
        Member,
        name=st.sampled_from("abcdef"),
        role=st.sampled_from(Role),
        prompt_s=st.floats(0.0, 10.0),
        answer_s=st.floats(0.0, 10.0),
    ),
    min_size=1,
    unique_by=lambda member: member.name,
)


@given(MEMBERS, st.integers(1, 6))
def test_every_phase_is_always_served_and_all_return_home_once_the_pressure_is_over(
    members: list[Member], num_steps: int
) -> None:
    pools = after(*[tuple(members)] * num_steps)
    roles = [(member.name, member.role) for member in members]
    for phase in PHASES:
        assert pools.serving(phase, roles)
        names = pools.serving(phase, roles)
        assert len(set(names)) == len(names)
    assert all(dict(roles)[name] is not Role.MIXED for name in pools.pulled)
    idle = [
        *(replace(member, prompt_s=0.0, answer_s=0.0) for member in members),
        Member(name="p", role=Role.PREFILL),
        Member(name="d", role=Role.DECODE),
    ]
    assert after(*[tuple(idle)] * (len(members) + 1), pools=pools) == Pools()
