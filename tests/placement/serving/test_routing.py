from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from placement.serving.routing import ReplicaLoad, least_loaded

LOAD = ReplicaLoad(
    name="a",
    accepting=True,
    pending_tokens=100,
    num_running=2,
    num_waiting=1,
    free_blocks=10,
    total_blocks=20,
)


def test_route_joins_the_shortest_queue_by_pending_tokens() -> None:
    # Fewer requests but more tokens: the tokens decide.
    short = replace(LOAD, name="b", pending_tokens=99, num_running=9, num_waiting=9, free_blocks=0)
    route = least_loaded([LOAD, short], 5)
    assert route is not None and route.replica == "b"
    assert "99" in route.reason and "2 accepting" in route.reason


def test_tie_goes_to_most_free_blocks_then_to_the_first_name() -> None:
    roomy = [replace(LOAD, name=name, free_blocks=11) for name in ("d", "c")]
    route = least_loaded([LOAD, *roomy], 5)
    assert route is not None and route.replica == "c"


def test_replica_that_does_not_accept_is_passed_over() -> None:
    idle_but_draining = replace(LOAD, name="b", accepting=False, pending_tokens=0)
    route = least_loaded([idle_but_draining, LOAD], 5)
    assert route is not None and route.replica == "a"


def test_no_route_when_nothing_accepts() -> None:
    assert least_loaded([], 5) is None
    assert least_loaded([replace(LOAD, accepting=False)], 5) is None


@given(st.permutations([replace(LOAD, name=f"r{i}", pending_tokens=i // 2, free_blocks=i % 2) for i in range(6)]))
def test_route_does_not_depend_on_the_order_of_the_reports(loads: list[ReplicaLoad]) -> None:
    route = least_loaded(loads, 1)
    assert route is not None and route.replica == "r1"
