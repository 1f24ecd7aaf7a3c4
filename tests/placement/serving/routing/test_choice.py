from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from placement.planning.limits import ReplicaLimits
from placement.serving.routing.choice import ReplicaLoad, Route, first_token_s, shortest_queue
from placement.serving.routing.speed import ReplicaSpeed
from placement.serving.step_plan import StepLoad

LIMITS = ReplicaLimits(block_size=16, token_budget=256, max_num_seqs=8)
LOAD = ReplicaLoad(
    name="a",
    accepting=True,
    pending_tokens=100,
    num_running=2,
    num_waiting=1,
    free_blocks=10,
    total_blocks=20,
)
IDLE = replace(LOAD, pending_tokens=0, num_running=0, num_waiting=0, free_blocks=20)


def route(
    loads: Sequence[ReplicaLoad],
    prompt_tokens: int = 5,
    *,
    speeds: Mapping[str, ReplicaSpeed] | None = None,
    cached: Mapping[str, int] | None = None,
) -> Route | None:
    return shortest_queue(loads, prompt_tokens, limits=LIMITS, speeds=speeds or {}, cached_tokens=cached or {})


def chosen(
    loads: Sequence[ReplicaLoad],
    prompt_tokens: int = 5,
    *,
    speeds: Mapping[str, ReplicaSpeed] | None = None,
    cached: Mapping[str, int] | None = None,
) -> str:
    found = route(loads, prompt_tokens, speeds=speeds, cached=cached)
    assert found is not None
    return found.replica


def speed(prefill_tokens_per_s: float) -> ReplicaSpeed:
    return ReplicaSpeed.expected(prefill_tokens_per_s=prefill_tokens_per_s)


# Before anything is measured, all replicas are taken to be equally fast, and the tokens decide as they ever did.


def test_without_measurements_the_shortest_queue_is_that_with_fewest_pending_tokens() -> None:
    # Fewer requests but more tokens: the tokens decide.
    short = replace(LOAD, name="b", pending_tokens=60, num_running=5, num_waiting=2, free_blocks=9)
    found = route([LOAD, short], 5)
    assert found is not None and found.replica == "b"
    assert "60 pending and 5 new tokens" in found.reason and "an assumed 1e+03 tokens/s" in found.reason
    assert "next of 2 is a" in found.reason


def test_tie_goes_to_most_free_blocks_then_to_the_first_name() -> None:
    roomy = [replace(LOAD, name=name, free_blocks=11) for name in ("d", "c")]
    assert chosen([LOAD, *roomy]) == "c"


def test_replica_that_does_not_accept_is_passed_over() -> None:
    idle_but_draining = replace(IDLE, name="b", accepting=False)
    found = route([idle_but_draining, LOAD])
    assert found is not None and found.replica == "a" and "only replica" in found.reason


def test_no_route_when_nothing_accepts() -> None:
    assert route([]) is None
    assert route([replace(LOAD, accepting=False)]) is None


@given(st.permutations([replace(LOAD, name=f"r{i}", pending_tokens=i // 2, free_blocks=i % 2) for i in range(6)]))
def test_route_does_not_depend_on_the_order_of_the_reports(loads: list[ReplicaLoad]) -> None:
    assert chosen(loads, 1) == "r1"


# Measured speeds turn tokens into seconds.


def test_queues_are_compared_in_seconds() -> None:
    slow, fast = replace(IDLE, name="slow"), replace(IDLE, name="fast", pending_tokens=1000)
    speeds = {"slow": speed(20.0), "fast": speed(1000.0)}
    # 1100 tokens at 1000 a second end long before 100 tokens at 20 a second.
    found = route([slow, fast], 100, speeds=speeds)
    assert found is not None and found.replica == "fast"
    assert "fast in 1.1 s: 1000 pending and 100 new tokens, at 1e+03 tokens/s" in found.reason
    assert found.reason.endswith("next of 2 is slow in 5 s")
    assert chosen([slow, replace(fast, pending_tokens=6000)], 100, speeds=speeds) == "slow"


def test_replica_of_unknown_speed_is_taken_to_be_as_fast_as_the_fastest() -> None:
    loads = [replace(IDLE, name=name, pending_tokens=pending) for name, pending in (("a", 10), ("b", 0), ("new", 5))]
    speeds = {"a": speed(1000.0), "b": speed(100.0)}
    assert chosen(loads, 10, speeds=speeds) == "new"
    assert chosen(loads, 10, speeds=speeds | {"new": speed(10.0)}) == "a"
    assert chosen(loads, 10, speeds=speeds | {"new": ReplicaSpeed()}) == "new", "nothing is known of it either"


def test_cached_prefix_counts_by_the_time_that_it_saves() -> None:
    # 400 of 500 tokens are cached at b, which has 300 tokens more to do: it wins, but not if it is slow.
    loads = [replace(IDLE, name="a"), replace(IDLE, name="b", pending_tokens=300, free_blocks=40, total_blocks=40)]
    equal = {"a": speed(1000.0), "b": speed(1000.0)}
    found = route(loads, 500, speeds=equal, cached={"b": 400})
    assert found is not None and found.replica == "b" and "400 more in its cache" in found.reason
    assert chosen(loads, 500, speeds=equal, cached={"b": 100}) == "a"
    assert chosen(loads, 500, speeds=equal | {"b": speed(500.0)}, cached={"b": 400}) == "a"


def test_last_token_of_a_prompt_is_computed_even_where_all_are_cached() -> None:
    found = route([IDLE], 32, speeds={"a": speed(1.0)}, cached={"a": 32})
    assert found is not None and "a in 1 s: 0 pending and 1 new tokens, 31 more in its cache" in found.reason


def test_decodes_delay_a_prompt() -> None:
    decoding = speed(1000.0)
    for num_decodes in (1, 2, 3, 4):  # 20 ms and 10 ms for each
        decoding = decoding.after_step(StepLoad(num_decodes=num_decodes), 0.02 + 0.01 * num_decodes)
    busy = replace(LOAD, pending_tokens=4, num_running=4, num_waiting=0)
    # The step that runs takes 60 ms; then one of 100 tokens, and two of 500, each with 40 ms of decodes.
    assert first_token_s(busy, decoding, 100, LIMITS) == pytest.approx(0.06 + 0.1 + 0.04)
    roomy = replace(busy, free_blocks=100)
    assert first_token_s(roomy, decoding, 500, LIMITS) == pytest.approx(0.06 + 0.5 + 2 * 0.04)
    assert first_token_s(IDLE, decoding, 100, LIMITS) == pytest.approx(0.1)


def test_full_replica_is_passed_over_for_one_that_has_a_place() -> None:
    # A fast replica whose places are taken by long answers is slower than a slow one with a place.
    fast = speed(10_000.0).after_step(StepLoad(num_decodes=8), 0.02).after_answer(1000)
    full = replace(LOAD, name="fast", pending_tokens=28, num_running=8, num_waiting=2)
    loads = [full, replace(IDLE, name="slow")]
    speeds = {"fast": fast, "slow": speed(100.0)}
    # Three of eight must end, which takes some 3 / 8 of 1000 steps of 20 ms.
    assert first_token_s(full, fast, 20, LIMITS) == pytest.approx(7.5, rel=0.01)
    assert chosen(loads, 20, speeds=speeds) == "slow"
    assert chosen([replace(full, num_running=7, num_waiting=0), loads[1]], 20, speeds=speeds) == "fast"
    out_of_blocks = replace(full, num_running=4, num_waiting=0, free_blocks=1)
    assert chosen([out_of_blocks, loads[1]], 20, speeds=speeds) == "slow", "one must end for its blocks"


@given(
    st.lists(st.tuples(st.integers(0, 10**5), st.integers(0, 8), st.integers(0, 20), st.floats(1.0, 1e5)), min_size=1),
    st.integers(1, 10**5),
)
def test_no_other_replica_is_expected_sooner(replicas: list[tuple[int, int, int, float]], prompt_tokens: int) -> None:
    loads = [
        replace(LOAD, name=f"r{i}", pending_tokens=pending, num_running=running, free_blocks=free)
        for i, (pending, running, free, _) in enumerate(replicas)
    ]
    speeds = {f"r{i}": speed(rate) for i, (*_, rate) in enumerate(replicas)}
    times = {load.name: first_token_s(load, speeds[load.name], prompt_tokens, LIMITS) for load in loads}
    assert times[chosen(loads, prompt_tokens, speeds=speeds)] == min(times.values())
