"""What is asked of the engine is taken in order, a little at a time, and answered once, even where the engine stops."""

import itertools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.serving.events import EndReason
from tests.support.engine import WAIT_S, Inline, Listener, Parts, SlowRunner, engines, submission
from workers.engine.types import Stopping
from workers.step.types import Batch, StepResult

NUM_MANY = 3000


@pytest.fixture
def make_engine() -> Iterator[Callable[..., Parts]]:
    with engines() as make:
        yield make


class Order(Listener):
    """Notes in which order things were said."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[int] = []

    def step(self, stats: Any, outputs: Any) -> None:
        self.said += [output.sequence_id for output in outputs]
        super().step(stats, outputs)

    def refused(self, sequence_id: int, error: Any) -> None:
        self.said.append(sequence_id)
        super().refused(sequence_id, error)


def test_stop_answers_everything_while_a_step_hangs(make_engine: Any) -> None:
    runner = SlowRunner()
    parts = make_engine(runner, vocab_size=16, max_num_seqs=2, num_blocks=8)
    listener, other = Listener(), Listener()
    for i in range(3):  # two run, and one waits for a place
        parts.engine.submit(listener, i, submission([3, 4], max_tokens=40))
    assert runner.entered.acquire(timeout=WAIT_S)
    parts.engine.submit(other, 0, submission([3, 4], max_tokens=40))
    parts.engine.stop()
    parts.engine.ended.result(WAIT_S)
    assert {output.end for output in (listener.ends | other.ends).values()} == {EndReason.FAILED}
    assert {output.detail for output in listener.ends.values()} == {"Stopping: this worker stops"}
    assert len(listener.ends) + len(listener.refusals) == 3 and len(other.ends) + len(other.refusals) == 1
    assert parts.engine.failure is None
    assert parts.pool.num_free == parts.pool.num_total
    assert parts.engine.thread.is_alive(), "it waits for the step, which is of no use to anybody any more"
    runner.gate.release(10)
    parts.idle()


def test_what_is_submitted_to_a_stopped_engine_is_refused_at_once(make_engine: Any) -> None:
    parts = make_engine(SlowRunner(), vocab_size=16)
    parts.idle()
    listener = Listener()
    parts.engine.submit(listener, 1, submission([3, 4]))
    assert isinstance(listener.refusals[1], Stopping)


def test_stop_refuses_what_is_still_in_the_inbox(make_engine: Any) -> None:
    parts = make_engine(SlowRunner(), vocab_size=16, start=False)
    listener = Order()
    for i in range(NUM_MANY):
        parts.engine.submit(listener, i, submission([3, 4]))
    parts.engine.stop()
    parts.engine.thread.start()
    parts.engine.ended.result(WAIT_S)
    assert listener.said == list(range(NUM_MANY))
    assert all(isinstance(error, Stopping) for error in listener.refusals.values())


def test_a_cancel_takes_effect_while_a_step_hangs(make_engine: Any) -> None:
    runner = SlowRunner()
    parts = make_engine(runner, vocab_size=16)
    listener = Listener()
    parts.engine.submit(listener, 1, submission([3, 4], max_tokens=40))
    assert runner.entered.acquire(timeout=WAIT_S)
    parts.engine.cancel(listener, 1)
    listener.wait_ends(1)
    assert listener.ends[1].end is EndReason.CANCELLED and not listener.tokens[1]
    assert parts.pool.num_free == parts.pool.num_total
    runner.gate.release(10)
    parts.idle()


def test_a_long_inbox_is_taken_a_little_at_a_time_and_in_order(make_engine: Any) -> None:
    runner = SlowRunner()
    runner.gate.release(NUM_MANY)
    # Steps take no time at all, and 0.3 ms go by whenever somebody looks: 4 commands at most fit in a millisecond.
    ticks = itertools.count()
    clock = lambda: 0.0003 * next(ticks)  # noqa: E731
    parts = make_engine(runner, vocab_size=16, start=False, clock=clock, executor=Inline(1))
    listener = Order()
    parts.engine.submit(listener, 0, submission([3, 4], max_tokens=400))
    for i in range(1, NUM_MANY):
        parts.engine.submit(listener, i, submission([]))  # refused as soon as it is looked at
    parts.engine.thread.start()
    listener.wait(lambda: len(listener.refusals) == NUM_MANY - 1 and bool(listener.ends))
    tokens_at = [at for at, sequence_id in enumerate(listener.said) if sequence_id == 0]
    assert tokens_at[0] <= 4 and len(tokens_at) == 400
    assert max(b - a for a, b in itertools.pairwise(tokens_at)) <= 5
    assert [sequence_id for sequence_id in listener.said if sequence_id] == list(range(1, NUM_MANY))
    parts.idle()


class Deaf(Listener):
    """Cannot be told anything any more."""

    def step(self, stats: Any, outputs: Any) -> None:
        raise RuntimeError("nobody is there")


def test_a_sink_that_cannot_be_told_keeps_no_other_from_being_told(make_engine: Any) -> None:
    runner = SlowRunner()
    parts = make_engine(runner, vocab_size=16)
    deaf, listener = Deaf(), Listener()
    for sink in (deaf, listener):
        parts.engine.submit(sink, 1, submission([3, 4], max_tokens=40))
    assert runner.entered.acquire(timeout=WAIT_S)
    parts.engine.stop()
    parts.engine.ended.result(WAIT_S)
    assert len(listener.ends) + len(listener.refusals) == 1
    runner.gate.release(10)
    parts.idle()


class Fails(SlowRunner):
    """The first step waits for the second, which fails, and is cancelled then: as a pipeline has it."""

    def __init__(self) -> None:
        super().__init__()
        self._steps = itertools.count()
        self._failed = threading.Event()

    def _execute(self, batch: Batch) -> StepResult:
        if next(self._steps) == 0:
            assert self._failed.wait(WAIT_S)
            raise CancelledError
        self._failed.set()
        raise MemoryError("no room")


def test_the_cause_is_that_of_the_step_that_failed_and_not_of_one_that_was_cancelled_for_it(make_engine: Any) -> None:
    parts = make_engine(Fails(), vocab_size=16, num_stages=2, token_budget=2, max_num_seqs=2, start=False)
    listener = Listener()
    for i in range(2):
        parts.engine.submit(listener, i, submission([3, 4], max_tokens=40, cache_salt=bytes([i])))
    parts.engine.thread.start()
    listener.wait_ends(2)
    parts.engine.ended.result(WAIT_S)
    assert isinstance(parts.engine.failure, MemoryError)
    assert {output.detail for output in listener.ends.values()} == {"MemoryError: no room"}


class Script(SlowRunner):
    """While a step executes, does what the script has for that step."""

    def __init__(self, script: dict[int, list[Callable[[], None]]]) -> None:
        super().__init__()
        self.gate.release(1000)
        self._script = script
        self._steps = itertools.count()

    def _execute(self, batch: Batch) -> StepResult:
        for action in self._script.get(next(self._steps), ()):
            action()
        return super()._execute(batch)


ACTIONS = st.tuples(st.sampled_from(["submit", "submit", "cancel", "abandon", "stop"]), st.integers(0, 7))


@settings(max_examples=60, deadline=None)
@given(first=st.integers(1, 6), script=st.dictionaries(st.integers(0, 12), st.lists(ACTIONS, max_size=6), max_size=6))
def test_whatever_happens_each_sequence_is_answered_once(first: int, script: dict[int, list[tuple[str, int]]]) -> None:
    """Also when engines stop in the middle of it. The listener itself refuses a second end, or a gap in the tokens."""
    actions: dict[int, list[Callable[[], None]]] = {}
    with engines() as make_engine:
        parts = make_engine(Script(actions), vocab_size=16, max_num_seqs=3, num_blocks=12)
        stays, gone = Listener(), Listener()
        ids = itertools.count()
        asked: list[int] = []

        def act(name: str, number: int) -> None:
            match name:
                case "submit":
                    asked.append(next(ids))
                    parts.engine.submit(stays, asked[-1], submission([3] * (1 + number), max_tokens=1 + number))
                    parts.engine.submit(gone, asked[-1], submission([3] * (1 + number), max_tokens=9))
                case "cancel":
                    parts.engine.cancel(stays, number)
                case "abandon":
                    parts.engine.abandon(gone)
                case "stop":
                    parts.engine.stop()

        for step, wanted in script.items():
            actions[step] = [lambda name=name, number=number: act(name, number) for name, number in wanted]
        for number in range(first):
            act("submit", number)
        stays.wait(lambda: len(stays.ends) + len(stays.refusals) >= first)
        parts.idle()
        assert sorted([*stays.ends, *stays.refusals]) == sorted(asked)
        for sequence_id, end in stays.ends.items():
            expected = {EndReason.LENGTH, EndReason.CANCELLED, EndReason.FAILED}
            assert end.end in expected and stays.tokens[sequence_id] == [1] * len(stays.tokens[sequence_id])
