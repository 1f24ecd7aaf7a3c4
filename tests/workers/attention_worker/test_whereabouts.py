"""Where attention workers listen, as model ranks are told."""

import threading

import pytest

from placement.errors import InvalidRequest
from workers.attention_worker.whereabouts import Address, Whereabouts

HERE, THERE = Address(host="10.0.0.1", port=4000, name="big-memory"), Address(host="10.0.0.2", port=4001)


def test_a_worker_that_moves_is_found_where_it_moved() -> None:
    whereabouts = Whereabouts([HERE, HERE])
    whereabouts.move(1, THERE)
    assert (whereabouts.of(0), whereabouts.of(1)) == (HERE, THERE)


def test_who_waits_learns_of_a_move_also_to_the_same_address() -> None:
    whereabouts = Whereabouts([HERE])
    before = whereabouts.num_moves
    assert whereabouts.wait(before, timeout_s=0.01) == before
    mover = threading.Thread(target=whereabouts.move, args=(0, HERE))
    mover.start()
    assert whereabouts.wait(before, timeout_s=60.0) == before + 1
    mover.join(60.0)


@pytest.mark.parametrize(
    ("worker", "address", "field"),
    [
        (1, THERE, "worker"),
        (-1, THERE, "worker"),
        (0, Address(host="", port=1), "address"),
        (0, Address(host="10.0.0.2", port=0), "address"),
    ],
)
def test_what_cannot_be_is_refused(worker: int, address: Address, field: str) -> None:
    whereabouts = Whereabouts([HERE])
    with pytest.raises(InvalidRequest) as caught:
        whereabouts.move(worker, address)
    assert caught.value.field == field and whereabouts.of(0) == HERE
