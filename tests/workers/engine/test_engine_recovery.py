"""A step loses all keys and values: they are computed again, and every answer is as if nothing had happened."""

import json
import queue
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from placement.serving.events import EndReason, Receive
from tests.support.engine import WAIT_S, Listener, Parts, SlowRunner, engines, submission
from tests.support.grammars import grammar_factory
from workers.engine.inbox import KvCame
from workers.engine.types import KvTransfer, Output, PrefillSource, Shipping, StepStats, Submission
from workers.sampling.grammar import Grammar, GrammarSpec
from workers.sampling.sampling import SampledToken, SamplingParams
from workers.step.runner import ModelRunner
from workers.step.types import Batch, StepResult
from workers.transport.errors import KvGone

NUM_TOKENS = 20
SHARED = tuple((37 * i + 11) % 509 for i in range(45))


class Losing:
    """A model runner some of whose steps find the keys and values gone, which are then noise.

    Args:
        when: steps raise while they are laid out ("prepare"), before they compute, or once they have "sampled".
        lost: the numbers of these steps, of all that are laid out, or executed.
    """

    def __init__(self, runner: ModelRunner, when: str = "", lost: Seq[int] = ()) -> None:
        self.gate = threading.Event()
        self.recovered = 0
        self._runner = runner
        self._when = when
        self._lost = lost
        self._num_steps = 0
        self._is_gone = False

    def prepare(self, batch: Batch) -> Callable[[], StepResult]:
        if self._when == "prepare" and self._is_lost():
            raise KvGone("nobody holds them")
        step = self._runner.prepare(batch)

        def execute() -> StepResult:
            assert self.gate.wait(WAIT_S)
            assert not self._is_gone, "a step executes before the runner has recovered"
            is_lost = self._when != "prepare" and self._is_lost()
            if is_lost and self._when == "sampled":
                step()
            if is_lost:
                self._is_gone = True
                raise KvGone("nobody holds them")
            return step()

        return execute

    def _is_lost(self) -> bool:
        self._num_steps += 1
        return self._num_steps - 1 in self._lost

    def recover(self) -> None:
        for layer in self._runner._cache.layers:
            layer.keys.normal_(0, 30)
            layer.values.normal_(0, 30)
        self.recovered += 1
        self._is_gone = False


@dataclass(eq=False)
class Hearing(Listener):
    """Keeps all that is said of tokens."""

    said: dict[int, list[SampledToken]] = field(default_factory=lambda: defaultdict(list))

    def step(self, stats: StepStats, outputs: Seq[Output]) -> None:
        for output in outputs:
            if output.token is not None:
                self.said[output.sequence_id].append(output.token)
        super().step(stats, outputs)


@pytest.fixture
def make_engine() -> Iterator[Callable[..., Parts]]:
    with engines() as make:
        yield make


@pytest.fixture(scope="module")
def directory(served_checkpoint: Path) -> Path:
    return served_checkpoint


@pytest.fixture(scope="module")
def grammar(directory: Path) -> Grammar:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "yy"]}}}
    schema |= {"required": ["a", "b"], "additionalProperties": False}
    factory = grammar_factory(directory, vocab_size=509, eos_token_ids=[2])
    return factory.compile(GrammarSpec(kind="json_schema", source=json.dumps(schema)))


def asked(grammar: Grammar) -> list[Submission]:
    """Of every kind: greedy, drawn with penalties, three choices of a prompt, by grammar, with log-probabilities."""
    drawn = [SamplingParams(temperature=1.0, top_p=0.95, presence_penalty=0.5, seed=seed) for seed in range(5)]
    most = {"max_tokens": NUM_TOKENS}
    return [
        submission(SHARED, **most),
        submission((3, 1, 4), **most, sampling=SamplingParams(logprobs=2)),
        submission((*SHARED, 7), **most, sampling=drawn[0]),
        *(submission(SHARED[:30], **most, sampling=each, cache_salt=b"one") for each in drawn[1:4]),
        submission(SHARED[:20], **most, sampling=drawn[4], grammar=grammar),
        submission(SHARED[5:], **most, grammar=grammar),
        submission(SHARED[3:], **most, prompt_logprobs=1),
        submission((5, 6), max_tokens=2),
        submission(SHARED[:9], **most, emitted_ids=(4, 4, 4)),
    ]


def answers(parts: Parts, runner: Losing, wanted: Seq[Submission]) -> Hearing:
    listener = Hearing()
    firsts = {i: len(each.emitted_ids) for i, each in enumerate(wanted)}
    for i, first in firsts.items():
        listener.tokens[i] = [0] * first  # told elsewhere
    for i, each in enumerate(wanted):
        parts.engine.submit(listener, i, each)
    runner.gate.set()
    listener.wait_ends(len(wanted))
    return listener


@pytest.mark.parametrize("sizes", [{}, {"num_blocks": 24, "max_num_seqs": 4}, {"prefix_cache": False}])
def test_every_answer_is_that_of_an_undisturbed_run(
    directory: Path, grammar: Grammar, make_runner: Any, make_engine: Any, sizes: dict[str, Any]
) -> None:
    wanted = asked(grammar)
    quiet = Losing(make_runner(directory))
    whole = answers(make_engine(quiet, token_budget=32, **sizes), quiet, wanted)
    assert whole.said[1][0].logprob is not None and whole.scores[8] and not quiet.recovered
    for when in ("prepare", "before", "sampled"):
        runner = Losing(make_runner(directory), when, (0, 2, 3, 9, 15, 22))
        parts = make_engine(runner, token_budget=32, **sizes)
        found = answers(parts, runner, wanted)
        assert runner.recovered == 6
        for i in range(len(wanted)):
            assert found.tokens[i] == whole.tokens[i], (when, i)
            assert found.ends[i].end is whole.ends[i].end
            assert logprobs(found, i) == pytest.approx(logprobs(whole, i), abs=1e-4)
        steps = [stats.step for stats in found.steps]
        assert steps == sorted(steps)
        parts.idle()
        assert parts.engine.load.num_preemptions > 0
        assert not parts.engine._loop._pace._executing, "no step is thought to be on its way"


def logprobs(listener: Hearing, i: int) -> list[float]:
    """Those of the prompt, then those of the answer."""
    scores = [logprob for scores in listener.scores[i] for logprob in scores.logprobs]
    return [*scores, *(token.logprob for token in listener.said[i] if token.logprob is not None)]


class Recovers(SlowRunner):
    """Loses the keys and values when its gate lets a step through and it is told to; recovers when it is let."""

    def __init__(self) -> None:
        super().__init__()
        self.recovering = threading.Event()
        self.may_recover = threading.Event()
        self.problem: Exception | None = None

    def recover(self) -> None:
        self.recovering.set()
        assert self.may_recover.wait(WAIT_S)
        self.error = None
        if self.problem is not None:
            raise self.problem


def lose(parts: Parts, runner: Recovers, listener: Listener) -> None:
    parts.engine.submit(listener, 1, submission([3, 4, 5], max_tokens=6))
    assert runner.entered.acquire(timeout=WAIT_S)
    runner.error = KvGone("big-memory: closed its connection")
    runner.gate.release(100)
    assert runner.recovering.wait(WAIT_S)


def test_sequences_come_and_go_while_the_runner_recovers(make_engine: Any) -> None:
    runner, listener = Recovers(), Listener()
    parts = make_engine(runner, vocab_size=16)
    lose(parts, runner, listener)
    parts.engine.submit(listener, 2, submission([3, 4], max_tokens=5))
    parts.engine.submit(listener, 3, submission([3, 4], max_tokens=500))
    parts.engine.cancel(listener, 3)
    listener.wait(lambda: 3 in listener.ends)
    assert not listener.tokens[1]
    runner.may_recover.set()
    listener.wait_ends(3)
    assert listener.tokens == {1: [1] * 6, 2: [1] * 5, 3: []} or listener.tokens == {1: [1] * 6, 2: [1] * 5}
    assert [listener.ends[i].end for i in (1, 2, 3)] == [EndReason.LENGTH, EndReason.LENGTH, EndReason.CANCELLED]
    assert listener.ends[1].num_preemptions or listener.firsts[1].num_preemptions
    parts.idle()


def test_an_engine_stops_while_its_runner_recovers(make_engine: Any) -> None:
    runner, listener = Recovers(), Listener()
    parts = make_engine(runner, vocab_size=16)
    lose(parts, runner, listener)
    parts.engine.stop("is told to stop")
    listener.wait_ends(1)
    assert (listener.ends[1].end, listener.ends[1].detail) == (EndReason.FAILED, "Stopping: is told to stop")
    runner.may_recover.set()
    parts.idle()


def test_a_runner_that_finds_nobody_ends_every_sequence_with_the_cause(make_engine: Any) -> None:
    runner, listener = Recovers(), Listener()
    parts = make_engine(runner, vocab_size=16)
    lose(parts, runner, listener)
    runner.problem = KvGone("big-memory: refused the connection for 30 s")
    runner.may_recover.set()
    listener.wait_ends(1)
    parts.engine.thread.join(WAIT_S)
    assert parts.engine.failure is runner.problem
    assert "refused the connection" in listener.ends[1].detail


class NeverHolds(SlowRunner):
    """Recovers every time, and loses the keys and values at once."""

    num_recovered = 0

    def recover(self) -> None:
        self.num_recovered += 1


def test_recoveries_that_no_step_follows_come_to_an_end(make_engine: Any) -> None:
    runner, listener = NeverHolds(), Listener()
    runner.error = KvGone("big-memory: closed its connection")
    runner.gate.release(100)
    parts = make_engine(runner, vocab_size=16)
    parts.engine.submit(listener, 1, submission([3, 4, 5], max_tokens=6))
    listener.wait_ends(1)
    assert listener.ends[1].end is EndReason.FAILED and runner.num_recovered == 5


def test_a_recovery_without_an_end_ends_the_engine(make_engine: Any) -> None:
    now_s = [0.0]
    runner, listener = Recovers(), Listener()
    parts = make_engine(runner, vocab_size=16, clock=lambda: now_s[0])
    lose(parts, runner, listener)
    now_s[0] = 1000.0
    listener.wait_ends(1)
    assert "closed its connection" in listener.ends[1].detail
    runner.may_recover.set()


def test_a_runner_that_cannot_recover_ends_the_engine_with_the_loss(make_engine: Any) -> None:
    runner, listener = SlowRunner(), Listener()
    parts = make_engine(runner, vocab_size=16)
    parts.engine.submit(listener, 1, submission([3, 4, 5], max_tokens=6))
    assert runner.entered.acquire(timeout=WAIT_S)
    runner.error = KvGone("big-memory: closed its connection")
    runner.gate.release(100)
    listener.wait_ends(1)
    assert listener.ends[1].detail == "KvGone: big-memory: closed its connection"
    parts.engine.thread.join(WAIT_S)
    assert parts.engine.failure is runner.error


def test_the_noise_that_the_keys_and_values_become_changes_answers(
    directory: Path, make_runner: Any, make_engine: Any
) -> None:
    """Else the other tests would say nothing."""
    model = make_runner(directory)
    runner = Losing(model)
    parts = make_engine(runner)
    listener = answers(parts, runner, [submission(SHARED, max_tokens=NUM_TOKENS)])
    runner.recover()
    again = answers(parts, runner, [submission(SHARED, max_tokens=NUM_TOKENS)])
    assert again.firsts[0].cached_tokens and again.tokens != listener.tokens
    assert torch.isfinite(model._cache.layers[0].keys).all()


class Exchange:
    """Notes what it is asked to do. Nothing comes, and nothing goes."""

    def __init__(self) -> None:
        self.received: queue.SimpleQueue[int] = queue.SimpleQueue()
        self.revoked: list[int] = []
        self.closed: list[bytes] = []

    def receive(self, command: Receive, submission: Submission) -> None:
        self.received.put(command.hold_id)

    def revoke(self, hold_id: int) -> None:
        self.revoked.append(hold_id)

    def close(self, transfer_id: bytes) -> None:
        self.closed.append(transfer_id)


def test_what_was_to_come_is_computed_here_and_what_was_to_go_ends(make_engine: Any) -> None:
    runner, listener, exchange = Recovers(), Listener(), Exchange()
    parts = make_engine(runner, vocab_size=16, start=False)
    parts.engine.use(exchange)
    source = PrefillSource(replica="prefill-0", epoch=1, address="10.0.0.1:1")
    ship = Shipping(transfer_id=b"t" * 16, first_token=0, by_layer=False)
    parts.engine.submit(listener, 2, submission(range(15), max_tokens=4, prefill=source))
    parts.engine.submit(listener, 3, submission(range(1, 15), max_tokens=1, ship=ship))
    parts.engine.thread.start()
    lose(parts, runner, listener)
    hold_id = exchange.received.get(timeout=WAIT_S)
    listener.wait(lambda: 3 in listener.ends)
    assert listener.ends[3].end is EndReason.FAILED and "closed its connection" in listener.ends[3].detail
    assert exchange.closed == [b"t" * 16] and exchange.revoked == [hold_id]
    runner.may_recover.set()
    listener.wait_ends(3)
    assert listener.tokens[1] == [1] * 6 and listener.tokens[2] == [1] * 4
    transfer = listener.firsts[2].transfer
    assert transfer is not None and transfer.num_tokens == 0 and "not wanted any more" in transfer.problem
    late = KvTransfer(num_tokens=14, num_bytes=1)
    parts.engine.kv_came(KvCame(hold_id=hold_id, transfer_id=b"u" * 16, num_tokens=14, transfer=late))
    parts.engine.submit(listener, 4, submission([3], max_tokens=1))
    listener.wait_ends(4)
    parts.idle()
