"""Events reach their reader all and in order, and a busy gateway wakes readers less often, not later than it must."""

import asyncio

from orchestrator.gateway.fleet.inbox import Inbox, Lost, Rounds
from protos.heterodyne.worker.v1 import worker_pb2 as pb
from tests.support.clocks import LoopClock, turns


def output(index: int) -> pb.SequenceOutput:
    return pb.SequenceOutput(sequence_id=1, index=index)


async def test_a_reader_takes_all_there_is_and_waits_for_more() -> None:
    inbox = Inbox()
    inbox.put(output(0))
    inbox.put_now(output(1))
    assert await inbox.take() == [output(0), output(1)]
    waiting = asyncio.create_task(inbox.take())
    await asyncio.sleep(0)
    inbox.put(output(2))
    await turns()
    assert not waiting.done(), "put alone wakes nobody"
    inbox.wake()
    assert await waiting == [output(2)]
    inbox.put_now(Lost(cause="gone"))
    assert await inbox.take() == [Lost(cause="gone")]


async def test_a_reader_that_was_cancelled_loses_nothing() -> None:
    inbox = Inbox()
    waiting = asyncio.create_task(inbox.take())
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    inbox.put_now(output(0))
    assert await inbox.take() == [output(0)]


async def test_a_reader_that_is_too_slow_is_told_of_once_and_still_hears_how_it_ends() -> None:
    inbox, told = Inbox(limit=3), list[int]()
    inbox.on_full = lambda: told.append(1)
    for number in range(3):
        inbox.put(output(number))
    assert not inbox.full and not told
    for number in range(3, 6):
        inbox.put(output(number))
    assert inbox.full and told == [1]
    inbox.put_now(Lost(cause="gone"))
    assert await inbox.take() == [*map(output, range(3)), Lost(cause="gone")]
    inbox.put(output(6))
    inbox.wake()
    assert await inbox.take() == [], "there would be a gap before it"


async def read(inbox: Inbox, taken: list[int], clock: LoopClock, work_s: float) -> None:
    """Takes what there is, again and again; each time it holds the loop for ``work_s``, as writes to a client do."""
    while True:
        taken.append(len(await inbox.take()))
        clock.now_s += work_s


async def test_however_long_a_round_takes_the_next_one_is_soon(clock: LoopClock) -> None:
    inbox, rounds, taken = Inbox(), Rounds(), list[int]()
    reader = asyncio.create_task(read(inbox, taken, clock, 0.2))
    await turns()
    for number in range(2):
        inbox.put(output(number))
        rounds.wake([inbox])
        await turns()
        assert taken == [1], "the second waits for the pause to be over"
    await clock.advance(0.049)
    assert taken == [1]
    await clock.advance(0.002)
    assert taken == [1, 1], "half of the round would be 100 ms"
    reader.cancel()


async def test_at_rest_every_step_wakes_its_readers_at_once(clock: LoopClock) -> None:
    inbox, rounds, taken = Inbox(), Rounds(), list[int]()
    reader = asyncio.create_task(read(inbox, taken, clock, 0.001))
    await turns()
    for number in range(5):
        inbox.put(output(number))
        rounds.wake([inbox])
        await turns(2)
        assert sum(taken) == number + 1
        await clock.advance(0.005)
    assert taken == [1] * 5
    reader.cancel()


async def test_under_load_steps_are_gathered_and_none_is_left_behind(clock: LoopClock) -> None:
    inboxes, rounds = [Inbox() for _ in range(4)], Rounds()
    taken: list[list[int]] = [[] for _ in inboxes]
    readers = [asyncio.create_task(read(inbox, mine, clock, 0.005)) for inbox, mine in zip(inboxes, taken, strict=True)]
    await turns()
    for number in range(100):
        for inbox in inboxes:
            inbox.put(output(number))
        rounds.wake(inboxes)
        await clock.advance(0.001)
    await clock.advance(0.05)
    # A round takes 20 ms of work and is followed by a pause of 10 ms, in which steps go on coming.
    assert all(sum(mine) == 100 and max(mine) >= 10 and len(mine) <= 12 for mine in taken), taken
    for reader in readers:
        reader.cancel()
