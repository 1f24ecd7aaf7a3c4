"""Which requests that wait are bound: in order, within the room there is, and never so that all wait for ever."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from placement.planning.limits import ReplicaLimits
from placement.planning.plan import Role
from placement.serving.routing.binding import Bindings, Waiting, WaitReason, bind, with_request
from placement.serving.routing.choice import ReplicaLoad, Route
from placement.serving.routing.router import Prompt, Router
from placement.serving.step_plan import StepLoad

LIMITS = ReplicaLimits(block_size=4, token_budget=32, max_num_seqs=4)
IDLE = ReplicaLoad(
    name="a", accepting=True, pending_tokens=0, num_running=0, num_waiting=0, free_blocks=100, total_blocks=100
)


def waiting(*sizes: int, priorities: Sequence[int] = (), num_sequences: int = 1) -> list[Waiting]:
    """Requests of so many tokens, in their order."""
    priorities = priorities or [0] * len(sizes)
    requests = [
        Waiting(number=number, priority=priority, prompt=Prompt(token_ids=range(size), num_sequences=num_sequences))
        for number, (size, priority) in enumerate(zip(sizes, priorities, strict=True))
    ]
    return sorted(requests, key=lambda it: it.rank)


def to(name: str, prefill: str | None = None) -> Callable[[Sequence[ReplicaLoad], Prompt], Route]:
    return lambda _, prompt: Route(
        replica=name, prefill=prefill, reason="because", new_tokens=len(prompt.token_ids) - (prefill is not None)
    )


def bound(requests: Sequence[Waiting], *loads: ReplicaLoad, prefill: str | None = None) -> Bindings:
    return bind(requests, loads, LIMITS, to("a", prefill))


def test_as_many_are_bound_as_have_a_place_and_the_others_wait_in_order() -> None:
    found = bound(waiting(1, 1, 1, 1, 1, 1), IDLE)
    assert list(found.bound) == [0, 1, 2, 3]
    assert found.waits == {4: WaitReason.NO_PLACE, 5: WaitReason.NO_PLACE}
    assert found.counts() == {WaitReason.NO_PLACE: 2}


def test_the_greater_priority_goes_first_then_who_came_first() -> None:
    found = bound(waiting(*[1] * 6, priorities=[0, 5, 0, 5, 9, 0]), IDLE)
    assert list(found.bound) == [4, 1, 3, 0]


def test_prompts_of_about_two_steps_are_queued_at_a_replica_and_no_more() -> None:
    found = bound(waiting(30, 30, 30), IDLE)
    assert list(found.bound) == [0, 1] and found.waits == {2: WaitReason.PROMPTS}
    found = bound(waiting(30, 90, 30), IDLE)
    assert list(found.bound) == [0, 1], "less than a step is left, so that a long one follows without a pause"


def test_an_idle_replica_takes_one_of_any_size() -> None:
    huge = waiting(10_000, 1, num_sequences=9)
    found = bound(huge, replace(IDLE, free_blocks=1))
    assert list(found.bound) == [0] and found.waits == {1: WaitReason.NO_PLACE}


def test_a_prompt_waits_for_blocks_and_nothing_overtakes_it() -> None:
    load = replace(IDLE, num_running=1, pending_tokens=1, free_blocks=5)
    found = bound(waiting(30, 4), load)
    assert not found.bound and found.waits == {0: WaitReason.NO_BLOCKS, 1: WaitReason.BEHIND}


def test_a_pair_is_bound_when_there_is_room_at_both() -> None:
    p, d = replace(IDLE, name="p", role=Role.PREFILL), replace(IDLE, role=Role.DECODE)
    assert list(bound(waiting(20, 20, 20, 20), p, d, prefill="p").bound) == [0, 1, 2]
    assert not bound(waiting(20), p, replace(d, num_running=4, pending_tokens=4), prefill="p").bound
    assert not bound(waiting(20), p, replace(d, num_moving=4), prefill="p").bound, "what awaits its KV has a place"
    crowded = replace(p, num_running=1, pending_tokens=60)
    assert bound(waiting(20), crowded, d, prefill="p").waits == {0: WaitReason.PROMPTS}


def test_what_is_bound_counts_at_each_replica_with_what_is_computed_there() -> None:
    prompt = Prompt(token_ids=range(20), num_sequences=2)
    route = Route(replica="a", prefill="p", reason="", new_tokens=7)
    at_a, at_p = (with_request(replace(IDLE, name=name), route, prompt, LIMITS) for name in ("a", "p"))
    assert (at_a.pending_tokens, at_a.num_waiting, at_a.free_blocks) == (2, 2, 95)
    assert (at_p.pending_tokens, at_p.num_waiting, at_p.free_blocks) == (7, 1, 100)
    alone = with_request(IDLE, Route(replica="a", reason="", new_tokens=7), prompt, LIMITS)
    assert (alone.pending_tokens, alone.num_waiting) == (27, 2)


REQUESTS = st.lists(st.tuples(st.integers(1, 120), st.integers(-3, 3), st.integers(1, 5)), max_size=30).map(
    lambda drawn: sorted(
        (
            Waiting(number=number, priority=priority, prompt=Prompt(token_ids=range(size), num_sequences=count))
            for number, (size, priority, count) in enumerate(drawn)
        ),
        key=lambda it: it.rank,
    )
)
LOADS = st.lists(
    st.builds(
        ReplicaLoad,
        name=st.sampled_from("abcd"),
        accepting=st.just(True),
        pending_tokens=st.integers(0, 100),
        num_running=st.integers(0, 4),
        num_waiting=st.integers(0, 2),
        free_blocks=st.integers(0, 100),
        total_blocks=st.just(100),
        role=st.sampled_from(Role),
    ),
    min_size=1,
    unique_by=lambda load: load.name,
)


@given(REQUESTS, LOADS, st.sampled_from(("auto", "never", "always")))
def test_each_request_is_bound_or_waits_and_no_replica_gets_more_than_it_has_room_for(
    requests: list[Waiting], loads: list[ReplicaLoad], mode: str
) -> None:
    router = Router(LIMITS, mode=mode)  # type: ignore[arg-type]
    router.balance(loads)
    found = bind(requests, loads, LIMITS, router.choose)
    assert found.bound.keys() | found.waits.keys() == {it.number for it in requests}
    assert not found.bound.keys() & found.waits.keys()
    by_number = {it.number: it for it in requests}
    after = {load.name: load for load in loads}
    for number, route in found.bound.items():
        for name in {route.replica, route.prefill or route.replica}:
            before = after[name]
            after[name] = with_request(before, route, by_number[number].prompt, LIMITS)
            if before.num_sequences:
                assert after[name].num_sequences <= LIMITS.max_num_seqs
                computes = name == (route.prefill or route.replica)
                assert not computes or before.prompt_tokens <= 2 * LIMITS.token_budget
    if requests and not any(load.num_sequences for load in loads):
        assert requests[0].number in found.bound, "the first of all is never held up by idle replicas"


@given(REQUESTS, st.lists(st.sampled_from("ab"), min_size=30, max_size=30))
def test_nobody_is_overtaken_at_the_replica_that_he_waits_for(requests: list[Waiting], targets: list[str]) -> None:
    loads = [replace(IDLE, name=name, num_running=3, pending_tokens=3) for name in "ab"]
    wanted = {id(it.prompt): targets[it.number] for it in requests}
    found = bind(
        requests,
        loads,
        LIMITS,
        lambda _, prompt: Route(replica=wanted[id(prompt)], reason="", new_tokens=len(prompt.token_ids)),
    )
    for name in "ab":
        there = [it.number in found.bound for it in requests if targets[it.number] == name]
        assert there == sorted(there, reverse=True), "those that are bound come before those that are not"


def test_all_requests_are_served_and_a_replica_four_times_slower_gets_a_fourth_of_them() -> None:
    router = Router(LIMITS, mode="never")
    speeds = {"fast": 400.0, "slow": 100.0}
    for name, tokens_per_s in speeds.items():
        for size in (8, 32):
            router.stepped(name, StepLoad(num_prefill_tokens=size), size / tokens_per_s)
    left = waiting(*[20] * 200)
    queued: dict[str, list[float]] = {name: [] for name in speeds}  # when each request ends, as prompts do in turn
    count: Counter[str] = Counter()
    now_s = 0.0
    while left:
        loads = [
            replace(IDLE, name=name, pending_tokens=20 * len(ends), num_waiting=len(ends))
            for name, ends in queued.items()
        ]
        found = bind(left, loads, LIMITS, router.choose)
        for route in found.bound.values():
            ends = queued[route.replica]
            ends.append((ends[-1] if ends else now_s) + 20 / speeds[route.replica])
            count[route.replica] += 1
        left = [it for it in left if it.number not in found.bound]
        now_s = min(ends[0] for ends in queued.values() if ends)
        for ends in queued.values():
            ends[:] = [at_s for at_s in ends if at_s > now_s]
    assert count.total() == 200 and 3.5 <= count["fast"] / count["slow"] <= 4.5
