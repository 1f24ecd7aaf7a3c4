import asyncio
import random
from collections.abc import Callable

import pytest

from orchestrator.gateway.errors import Draining, Overloaded, QueueTimeout
from orchestrator.gateway.fleet.admission import Admission
from placement.errors import InvalidConfig
from tests.support.clocks import LoopClock


class Client:
    """A request that takes a slot, notes it, and leaves when told."""

    def __init__(
        self,
        admission: Admission,
        log: list[str],
        name: str,
        *,
        priority: int = 0,
        timeout_s: float | None = None,
    ) -> None:
        self.leave = asyncio.Event()
        self.task = asyncio.create_task(self._run(admission, log, name, priority, timeout_s))

    async def _run(
        self, admission: Admission, log: list[str], name: str, priority: int, timeout_s: float | None
    ) -> None:
        async with admission.slot(priority=priority, timeout_s=timeout_s):
            log.append(name)
            await self.leave.wait()

    async def end(self) -> None:
        self.leave.set()
        await self.task


async def settle(done: Callable[[], bool] = lambda: False) -> None:
    """Lets every ready task run."""
    for _ in range(10):
        if done():
            return
        await asyncio.sleep(0)


async def test_slot_is_immediate_while_one_is_free() -> None:
    admission = Admission(2, 0)
    async with admission.slot(), admission.slot():
        assert admission.in_flight == 2
    assert admission.in_flight == 0


async def test_queue_is_first_in_first_out_among_equals() -> None:
    admission, log = Admission(1, 8), []  # type: tuple[Admission, list[str]]
    clients = [Client(admission, log, name) for name in "abc"]
    await settle()
    assert (admission.in_flight, admission.queued) == (1, 2)
    for client in clients:
        await client.end()
    assert log == ["a", "b", "c"]
    assert (admission.in_flight, admission.queued) == (0, 0)


async def test_higher_priority_is_served_first() -> None:
    admission, log = Admission(1, 8), []  # type: tuple[Admission, list[str]]
    clients = [Client(admission, log, name, priority=p) for name, p in (("a", 0), ("b", 0), ("c", 5), ("d", 5))]
    await settle()
    for client in clients:
        client.leave.set()
    await asyncio.gather(*(client.task for client in clients))
    assert log == ["a", "c", "d", "b"]


async def test_full_queue_refuses_at_once_with_a_hint() -> None:
    admission, log = Admission(1, 1), []  # type: tuple[Admission, list[str]]
    clients = [Client(admission, log, name) for name in "ab"]
    await settle()
    with pytest.raises(Overloaded) as caught:
        async with admission.slot():
            pytest.fail("there was no slot")
    assert caught.value.retry_after_s >= 1
    for client in clients:
        await client.end()
    assert log == ["a", "b"]


async def test_hint_grows_with_the_queue_and_is_bounded() -> None:
    hints = []
    for max_queued in (1, 5, 1000):
        admission = Admission(1, max_queued)
        clients = [Client(admission, [], "x") for _ in range(max_queued + 1)]
        await settle()
        with pytest.raises(Overloaded) as caught:
            await admission.slot().__aenter__()
        hints.append(caught.value.retry_after_s)
        for client in clients:
            client.task.cancel()
        await asyncio.gather(*(client.task for client in clients), return_exceptions=True)
    assert hints[0] < hints[1] < hints[2] <= 30


async def test_deadline_that_passes_in_the_queue_ends_the_wait(clock: LoopClock) -> None:
    admission, log = Admission(1, 4), []  # type: tuple[Admission, list[str]]
    holder, late = Client(admission, log, "a"), Client(admission, log, "b", timeout_s=0.01)
    await settle()
    assert admission.queued == 1
    await clock.advance(0.02)
    with pytest.raises(QueueTimeout):
        await late.task
    assert (admission.in_flight, admission.queued) == (1, 0)
    await holder.end()
    assert log == ["a"] and admission.in_flight == 0


async def test_deadline_is_of_no_concern_once_the_slot_is_held(clock: LoopClock) -> None:
    admission = Admission(1, 4)
    holder = Client(admission, [], "a")
    await settle()
    queued = Client(admission, [], "b", timeout_s=0.02)
    await settle()
    await holder.end()
    await clock.advance(0.04)
    assert admission.in_flight == 1
    await queued.end()


async def test_cancelled_waiter_leaves_the_queue() -> None:
    admission, log = Admission(1, 1), []  # type: tuple[Admission, list[str]]
    holder, waiter = Client(admission, log, "a"), Client(admission, log, "b")
    await settle()
    waiter.task.cancel()
    assert (await asyncio.gather(waiter.task, return_exceptions=True))[0].__class__ is asyncio.CancelledError
    assert admission.queued == 0
    third = Client(admission, log, "c")
    await settle()
    await holder.end()
    await third.end()
    assert log == ["a", "c"]


async def test_slot_given_to_a_task_cancelled_in_the_same_moment_is_passed_on() -> None:
    for give_first in (True, False):
        admission, log = Admission(1, 4), []  # type: tuple[Admission, list[str]]
        holder = admission.slot()
        await holder.__aenter__()
        unlucky, next_one = Client(admission, log, "b"), Client(admission, log, "c")
        await settle()
        if give_first:
            await holder.__aexit__(None, None, None)  # gives the slot; the task has not run since
            unlucky.task.cancel()
        else:
            unlucky.task.cancel()
            await holder.__aexit__(None, None, None)
        await settle()
        assert unlucky.task.cancelled()
        assert log == ["c"] and admission.in_flight == 1
        await next_one.end()
        assert admission.in_flight == 0 and await admission.wait_idle(1)


async def test_error_inside_the_block_gives_the_slot_back() -> None:
    admission = Admission(1, 0)
    with pytest.raises(ZeroDivisionError):
        async with admission.slot():
            raise ZeroDivisionError
    assert admission.in_flight == 0


async def test_drain_refuses_newcomers_and_serves_those_who_wait() -> None:
    admission, log = Admission(1, 4), []  # type: tuple[Admission, list[str]]
    clients = [Client(admission, log, name) for name in "ab"]
    await settle()
    admission.start_drain()
    assert admission.draining
    with pytest.raises(Draining):
        async with admission.slot():
            pytest.fail("drained")
    assert not await admission.wait_idle(0.01)
    waiting = asyncio.create_task(admission.wait_idle(5))
    for client in clients:
        await client.end()
    assert await waiting
    assert log == ["a", "b"]


async def test_idle_service_is_idle_at_once() -> None:
    assert await Admission(1, 0).wait_idle(0.01)


@pytest.mark.parametrize(("in_flight", "queued", "field"), [(0, 1, "max_in_flight"), (1, -1, "max_queued")])
def test_bounds_that_cannot_work_are_refused(in_flight: int, queued: int, field: str) -> None:
    with pytest.raises(InvalidConfig) as caught:
        Admission(in_flight, queued)
    assert caught.value.field == f"gateway.{field}"


async def test_a_heavy_request_waits_for_all_its_slots_and_nobody_overtakes_it() -> None:
    admission, entered = Admission(4, 8), list[str]()

    async def hold(name: str, weight: int, leave: asyncio.Event) -> None:
        async with admission.slot(weight=weight):
            entered.append(name)
            await leave.wait()

    leaves = {name: asyncio.Event() for name in ("a", "b", "heavy", "light")}
    weights = {"a": 2, "b": 1, "heavy": 3, "light": 1}
    tasks = [asyncio.create_task(hold(name, weights[name], leave)) for name, leave in leaves.items()]
    await settle()
    assert entered == ["a", "b"] and (admission.in_flight, admission.queued) == (3, 2)
    leaves["b"].set()
    await settle()
    assert entered == ["a", "b"], "two are free, three are needed"
    leaves["a"].set()
    await settle()
    assert entered == ["a", "b", "heavy", "light"] and admission.in_flight == 4
    for leave in leaves.values():
        leave.set()
    await asyncio.gather(*tasks)
    assert admission.in_flight == 0


async def test_a_heavy_request_that_leaves_the_queue_lets_those_behind_it_in(clock: LoopClock) -> None:
    for timeout_s in (0.01, None):
        admission = Admission(2, 8)
        async with admission.slot():
            heavy = asyncio.create_task(admission.slot(weight=2, timeout_s=timeout_s).__aenter__())
            await settle()
            light = Client(admission, [], "light")
            await settle()
            assert admission.queued == 2
            if timeout_s is None:
                heavy.cancel()
            await clock.advance(0.02)
            await asyncio.gather(heavy, return_exceptions=True)
            await settle()
            assert (admission.in_flight, admission.queued) == (2, 0)
            await light.end()


@pytest.mark.parametrize("seed", range(20))
async def test_no_slot_is_lost_or_doubled_under_random_cancels_and_deadlines(seed: int, clock: LoopClock) -> None:
    rng = random.Random(seed)
    admission, inside, most = Admission(3, 10), 0, 0

    async def request(hold_turns: int, timeout_s: float | None) -> None:
        nonlocal inside, most
        weight = rng.randint(1, 3)
        async with admission.slot(priority=rng.randint(-1, 1), timeout_s=timeout_s, weight=weight):
            inside += weight
            most = max(most, inside)
            try:
                for _ in range(hold_turns):
                    await asyncio.sleep(0)
            finally:
                inside -= weight

    tasks = []
    for _ in range(200):
        timeout_s = rng.choice([None, 0.0, 0.0005, 1.0])
        tasks.append(asyncio.create_task(request(rng.randint(0, 4), timeout_s)))
        if rng.random() < 0.4:
            rng.choice(tasks).cancel()
        clock.now_s += rng.choice([0.0, 0.0002])
        if rng.random() < 0.6:
            await asyncio.sleep(0)
        assert admission.in_flight <= 3 and admission.queued <= 10
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    allowed = (Overloaded, QueueTimeout, asyncio.CancelledError)
    assert all(outcome is None or isinstance(outcome, allowed) for outcome in outcomes)
    assert most == 3 and outcomes.count(None) > 20
    assert (admission.in_flight, admission.queued, inside) == (0, 0, 0)
    assert await admission.wait_idle(0.01)
