"""Requests that wait for a replica with room: who is next, and that everything ends the wait that should."""

import asyncio
from collections.abc import Sequence

import pytest

from orchestrator.gateway.errors import QueueTimeout, ReplicaUnavailable
from orchestrator.gateway.fleet.binding import BindingQueue
from placement.serving.routing.binding import Bindings, Waiting, WaitReason
from placement.serving.routing.choice import Route
from placement.serving.routing.router import Prompt
from tests.support.clocks import LoopClock, turns


class Room:
    """Decides by a number of places that the test sets."""

    def __init__(self, places: int = 0) -> None:
        self.places = places
        self.is_lost = False
        self.num_decisions = 0

    def decide(self, waiting: Sequence[Waiting]) -> Bindings:
        self.num_decisions += 1
        if self.is_lost:
            raise ReplicaUnavailable("no replica takes requests")
        first, rest = waiting[: self.places], waiting[self.places :]
        self.places -= len(first)
        return Bindings(
            bound={it.number: Route(replica="a", reason="") for it in first},
            waits={it.number: WaitReason.NO_PLACE for it in rest},
        )


def waiting(number: int, priority: int = 0) -> Waiting:
    return Waiting(number=number, priority=priority, prompt=Prompt(token_ids=[1]))


async def test_who_comes_while_there_is_room_is_bound_without_a_turn_of_the_loop() -> None:
    queue = BindingQueue(Room(places=1).decide)
    taking = queue.take(waiting(0), timeout_s=5.0)
    with pytest.raises(StopIteration) as ended:
        taking.send(None)
    assert ended.value.value.replica == "a" and not len(queue)


async def test_those_that_wait_are_bound_by_priority_then_arrival(clock: LoopClock) -> None:
    room = Room()
    queue = BindingQueue(room.decide)
    order: list[int] = []

    async def ask(number: int, priority: int) -> None:
        await queue.take(waiting(number, priority))
        order.append(number)

    tasks = [asyncio.create_task(ask(number, priority)) for number, priority in enumerate((0, 0, 5, -1))]
    await turns()
    assert len(queue) == 4 and queue.counts() == {WaitReason.NO_PLACE: 4}
    for _ in tasks:
        room.places = 1
        queue.wake()
        await turns()
    assert order == [2, 0, 1, 3]
    assert not len(queue) and not queue.counts()
    await asyncio.gather(*tasks)


async def test_waking_many_times_decides_once_and_never_while_nobody_waits(clock: LoopClock) -> None:
    room = Room()
    queue = BindingQueue(room.decide)
    queue.wake()
    await turns()
    assert not room.num_decisions
    task = asyncio.create_task(queue.take(waiting(0)))
    await turns()
    for _ in range(10):
        queue.wake()
    await turns()
    assert room.num_decisions == 2
    room.places = 1
    queue.wake()
    await task


async def test_the_wait_ends_at_the_deadline(clock: LoopClock) -> None:
    queue = BindingQueue(Room().decide)
    task = asyncio.create_task(queue.take(waiting(0), timeout_s=3.0))
    await turns()
    await clock.advance(2.9)
    assert not task.done()
    await clock.advance(0.2)
    with pytest.raises(QueueTimeout, match="before a replica had room"):
        await task
    assert not len(queue)


async def test_one_that_is_cancelled_leaves_and_those_behind_it_go_on() -> None:
    room = Room()
    queue = BindingQueue(room.decide)
    tasks = [asyncio.create_task(queue.take(waiting(number))) for number in range(2)]
    await turns()
    tasks[0].cancel()
    room.places = 1
    assert (await tasks[1]).replica == "a", "it is looked at again without anybody else's doing"
    await asyncio.gather(*tasks, return_exceptions=True)
    assert tasks[0].cancelled() and not len(queue)


async def test_the_loss_of_the_last_replica_ends_every_wait() -> None:
    room = Room()
    queue = BindingQueue(room.decide)
    tasks = [asyncio.create_task(queue.take(waiting(number))) for number in range(3)]
    await turns()
    room.is_lost = True
    queue.wake()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(result) for result in results] == [ReplicaUnavailable] * 3
    assert not len(queue) and not queue.counts()


async def test_decisions_that_take_long_are_made_less_often(clock: LoopClock) -> None:
    room = Room()

    def decide(requests: Sequence[Waiting]) -> Bindings:
        clock.now_s += 0.01
        return room.decide(requests)

    queue = BindingQueue(decide)
    tasks = [asyncio.create_task(queue.take(waiting(number))) for number in range(2)]
    await turns()
    assert room.num_decisions == 1, "the second waits for the pause to be over"
    await clock.advance(0.02)
    assert room.num_decisions == 1
    room.places = 2
    await clock.advance(0.02)
    assert room.num_decisions == 2
    await asyncio.gather(*tasks)
