"""Checks that a grammar is compiled once for all sequences that still wait for it."""

import asyncio
import gc
import logging
from collections.abc import Coroutine
from typing import Any

import pytest

from placement.errors import InvalidRequest
from tests.support.grammars import GatedFactory, regex
from workers.sampling.grammar_compiler import GrammarCompiler

WAIT_S = 30.0


async def begun(*waiters: Coroutine[Any, Any, Any]) -> list[asyncio.Task[Any]]:
    """Starts tasks, and lets them run as far as they can."""
    tasks = [asyncio.create_task(waiter) for waiter in waiters]
    await asyncio.sleep(0)
    return tasks


async def test_all_who_want_a_grammar_get_the_one_that_is_compiled(
    factory: GatedFactory, grammars: GrammarCompiler
) -> None:
    wanted, other = regex("[a-z]+"), regex("[0-9]+")
    waiting = await begun(*(grammars.compile(wanted) for _ in range(8)), grammars.compile(other))
    factory.gate.set()
    *same, different = await asyncio.wait_for(asyncio.gather(*waiting), WAIT_S)
    assert all(grammar is same[0] for grammar in same) and different is not same[0]
    assert sorted(factory.calls, key=lambda spec: spec.source) == [other, wanted]


async def test_who_is_cancelled_cancels_nobody_else(factory: GatedFactory, grammars: GrammarCompiler) -> None:
    waiting = await begun(*(grammars.compile(regex("[a-z]+")) for _ in range(4)))
    for task in waiting[:3]:  # the first among them, for whom it was begun
        task.cancel()
    await asyncio.wait(waiting[:3])
    assert all(task.cancelled() for task in waiting[:3]) and not waiting[3].done()
    factory.gate.set()
    assert (await asyncio.wait_for(waiting[3], WAIT_S)).start() is not None
    assert len(factory.calls) == 1


async def test_a_newcomer_joins_what_nobody_waits_for_any_more(
    factory: GatedFactory, grammars: GrammarCompiler
) -> None:
    (task,) = await begun(grammars.compile(regex("[a-z]+")))
    assert await asyncio.to_thread(factory.entered.acquire, timeout=WAIT_S)
    task.cancel()
    await asyncio.wait([task])
    (again,) = await begun(grammars.compile(regex("[a-z]+")))
    factory.gate.set()
    await asyncio.wait_for(again, WAIT_S)
    assert len(factory.calls) == 1


async def test_what_nobody_waits_for_is_not_begun(factory: GatedFactory, grammars: GrammarCompiler) -> None:
    occupied = await begun(*(grammars.compile(regex(f"number {number}")) for number in range(40)))
    started = len(factory.calls)
    left, kept = await begun(grammars.compile(regex("left")), grammars.compile(regex("kept")))
    left.cancel()
    await asyncio.wait([left])
    factory.gate.set()
    await asyncio.wait_for(asyncio.gather(kept, *occupied), WAIT_S)
    assert started < len(occupied), "the threads were all at work"
    sources = [spec.source for spec in factory.calls]
    assert "left" not in sources and "kept" in sources


async def test_a_refusal_reaches_all_who_wait_and_is_asked_for_anew(
    factory: GatedFactory, grammars: GrammarCompiler
) -> None:
    waiting = await begun(*(grammars.compile(regex("(")) for _ in range(3)))
    factory.gate.set()
    results = await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), WAIT_S)
    assert all(isinstance(result, InvalidRequest) for result in results)
    with pytest.raises(InvalidRequest):
        await grammars.compile(regex("("))
    assert len(factory.calls) == 2


async def test_a_refusal_that_nobody_waits_for_any_more_is_no_complaint(
    factory: GatedFactory, grammars: GrammarCompiler, caplog: pytest.LogCaptureFixture
) -> None:
    (task,) = await begun(grammars.compile(regex("(")))
    assert await asyncio.to_thread(factory.entered.acquire, timeout=WAIT_S)
    task.cancel()
    await asyncio.wait([task])
    factory.gate.set()
    with caplog.at_level(logging.ERROR), pytest.raises(InvalidRequest):
        await grammars.compile(regex("("))
    await asyncio.sleep(0)
    gc.collect()
    assert not caplog.records
