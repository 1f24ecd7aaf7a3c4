"""The engine with a real model: whatever a step is made of, a sequence's tokens are those that transformers gives."""

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from placement.blocks import BlockPool
from placement.errors import FieldError, HeterodyneError
from placement.scheduling import Scheduler, SchedulerLimits
from workers.engine import Engine
from workers.engine_types import Draining, EndReason, Limits, Output, Submission
from workers.runner import SequenceInput
from workers.sampling import SampledToken, SamplingParams

BLOCK_SIZE = 8
NUM_TOKENS = 64
WAIT_S = 60.0


@dataclass(eq=False)
class Listener:
    """A sink that collects, and says when all the sequences it waits for have ended."""

    tokens: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    ends: dict[int, Output] = field(default_factory=dict)
    refusals: dict[int, HeterodyneError] = field(default_factory=dict)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def step(self, step: int, outputs: Seq[Output]) -> None:
        with self.changed:
            for output in outputs:
                if output.token is not None:
                    assert output.index == len(self.tokens[output.sequence_id])
                    self.tokens[output.sequence_id].append(output.token.token_id)
                if output.end is not None:
                    assert output.sequence_id not in self.ends
                    self.ends[output.sequence_id] = output
            self.changed.notify_all()

    def refused(self, sequence_id: int, error: HeterodyneError) -> None:
        with self.changed:
            self.refusals[sequence_id] = error
            self.changed.notify_all()

    def wait(self, done: Callable[[], bool]) -> None:
        with self.changed:
            assert self.changed.wait_for(done, WAIT_S), (self.ends, self.refusals)


@dataclass(eq=False)
class Parts:
    engine: Engine
    pool: BlockPool
    scheduler: Scheduler

    def idle(self) -> None:
        """Stop, then see that nothing was kept."""
        self.engine.stop()
        self.engine.thread.join(WAIT_S)
        assert not self.engine.thread.is_alive()
        assert self.engine.failure is None
        self.scheduler.check()
        assert self.pool.num_free == self.pool.num_total
        assert self.scheduler.num_running == self.scheduler.num_waiting == 0


@pytest.fixture
def make_engine() -> Iterator[Callable[..., Parts]]:
    engines: list[Engine] = []

    def make(
        runner: Any, *, num_blocks: int = 256, token_budget: int = 64, max_num_seqs: int = 16, vocab_size: int = 509
    ) -> Parts:
        pool = BlockPool(num_blocks, BLOCK_SIZE)
        scheduler = Scheduler(pool, SchedulerLimits(token_budget=token_budget, max_num_seqs=max_num_seqs))
        limits = Limits(max_context_tokens=512, vocab_size=vocab_size, block_size=BLOCK_SIZE)
        engine = Engine(runner=runner, scheduler=scheduler, pool=pool, limits=limits)
        engine.thread.start()
        engines.append(engine)
        return Parts(engine=engine, pool=pool, scheduler=scheduler)

    yield make
    for engine in engines:
        engine.stop()
        engine.thread.join(WAIT_S)


def submission(prompt: Seq[int], *, max_tokens: int = NUM_TOKENS, stop: Seq[int] = (), priority: int = 0) -> Submission:
    return Submission(
        prompt_ids=tuple(prompt),
        sampling=SamplingParams(),
        max_tokens=max_tokens,
        stop_token_ids=frozenset(stop),
        priority=priority,
    )


@dataclass(frozen=True)
class Oracle:
    """What transformers generates, greedily and one prompt at a time."""

    directory: Path
    prompts: list[list[int]]
    answers: list[list[int]]


@pytest.fixture(scope="module")
def oracle(llama_checkpoint: Callable[..., Path]) -> Oracle:
    from transformers import LlamaForCausalLM

    directory = llama_checkpoint(
        num_hidden_layers=7, num_attention_heads=15, num_key_value_heads=5, hidden_size=120, head_dim=16, vocab_size=509
    )
    model = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32)
    generator = torch.Generator().manual_seed(3)
    lengths = [1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 40, 64, 65, 100, 127, 150]
    prompts = [torch.randint(3, 509, (length,), generator=generator).tolist() for length in lengths]
    answers = []
    for prompt in prompts:
        with torch.inference_mode():
            ids = model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=NUM_TOKENS,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        answers.append(ids[0, len(prompt) :].tolist())
    return Oracle(directory=directory, prompts=prompts, answers=answers)


@pytest.mark.parametrize("token_budget", [16, 64, 4096])
def test_sixteen_sequences_together_give_the_tokens_of_transformers(
    oracle: Oracle, make_runner: Any, make_engine: Any, token_budget: int
) -> None:
    parts = make_engine(make_runner(oracle.directory), token_budget=token_budget)
    listener = Listener()
    for i, prompt in enumerate(oracle.prompts):
        parts.engine.submit(listener, i, submission(prompt))
    listener.wait(lambda: len(listener.ends) == len(oracle.prompts))
    assert [listener.tokens[i] for i in range(len(oracle.prompts))] == oracle.answers
    assert {output.end for output in listener.ends.values()} == {EndReason.LENGTH}
    parts.idle()


def test_alone_gives_the_tokens_of_transformers(oracle: Oracle, make_runner: Any, make_engine: Any) -> None:
    parts = make_engine(make_runner(oracle.directory))
    for i, (prompt, answer) in enumerate(zip(oracle.prompts, oracle.answers, strict=True)):
        listener = Listener()
        parts.engine.submit(listener, i, submission(prompt))
        listener.wait(lambda listener=listener: bool(listener.ends))
        assert listener.tokens[i] == answer
    parts.idle()


def test_preempted_sequences_give_the_tokens_of_transformers(
    oracle: Oracle, make_runner: Any, make_engine: Any
) -> None:
    # Blocks for about four of the sixteen, all of which grow: someone is always preempted.
    parts = make_engine(make_runner(oracle.directory), num_blocks=60)
    listener = Listener()
    for i, prompt in enumerate(oracle.prompts):
        parts.engine.submit(listener, i, submission(prompt, priority=i % 3))
    listener.wait(lambda: len(listener.ends) == len(oracle.prompts))
    assert [listener.tokens[i] for i in range(len(oracle.prompts))] == oracle.answers
    assert sum(output.num_preemptions for output in listener.ends.values()) > 0
    parts.idle()
    assert parts.engine.load.num_preemptions > 0


def test_a_stop_id_ends_the_sequence_and_is_its_last_token(oracle: Oracle, make_runner: Any, make_engine: Any) -> None:
    answer = oracle.answers[5]
    stop = answer[20]
    parts = make_engine(make_runner(oracle.directory))
    listener = Listener()
    parts.engine.submit(listener, 0, submission(oracle.prompts[5], stop=[stop]))
    listener.wait(lambda: bool(listener.ends))
    assert listener.tokens[0] == answer[: answer.index(stop) + 1]
    assert listener.ends[0].end is EndReason.STOP
    parts.idle()


class SlowRunner:
    """Counts steps, so that a test can say within which one something happened."""

    def __init__(self, vocab_size: int = 16) -> None:
        self.gate = threading.Semaphore(0)
        self.batches: list[list[SequenceInput]] = []
        self.entered = threading.Semaphore(0)
        self.error: Exception | None = None

    def run(self, batch: Seq[SequenceInput]) -> list[SampledToken | None]:
        self.entered.release()
        assert self.gate.acquire(timeout=WAIT_S)
        if self.error is not None:
            raise self.error
        self.batches.append(list(batch))
        return [SampledToken(token_id=1) if item.params is not None else None for item in batch]


def test_cancel_frees_the_blocks_before_the_next_step(make_engine: Any) -> None:
    runner = SlowRunner()
    parts = make_engine(runner, vocab_size=16)
    listener = Listener()
    parts.engine.submit(listener, 1, submission([3, 4, 5], max_tokens=100))
    parts.engine.submit(listener, 2, submission([3, 4, 5], max_tokens=100))
    assert runner.entered.acquire(timeout=WAIT_S)
    parts.engine.cancel(listener, 1)
    runner.gate.release(3)
    listener.wait(lambda: 1 in listener.ends)
    assert listener.ends[1].end is EndReason.CANCELLED
    assert len(listener.tokens[1]) <= 1, "nothing was computed after the step in which the cancel came"
    parts.engine.cancel(listener, 2)
    runner.gate.release(3)
    listener.wait(lambda: 2 in listener.ends)
    parts.idle()


def test_an_abandoned_sink_loses_its_sequences_and_others_go_on(make_engine: Any) -> None:
    runner = SlowRunner()
    parts = make_engine(runner, vocab_size=16)
    gone, stays = Listener(), Listener()
    parts.engine.submit(gone, 1, submission([3, 4], max_tokens=100))
    parts.engine.submit(stays, 1, submission([3, 4], max_tokens=5))
    assert runner.entered.acquire(timeout=WAIT_S)
    parts.engine.abandon(gone)
    runner.gate.release(20)
    stays.wait(lambda: 1 in stays.ends)
    assert stays.tokens[1] == [1] * 5
    assert not gone.ends
    parts.idle()


def test_a_step_that_raises_ends_every_sequence_with_the_cause(make_engine: Any) -> None:
    runner = SlowRunner()
    runner.error = RuntimeError("the device is on fire\nand so is the house")
    parts = make_engine(runner, vocab_size=16)
    listener, later = Listener(), Listener()
    parts.engine.submit(listener, 0, submission([3, 4], max_tokens=5))
    assert runner.entered.acquire(timeout=WAIT_S)
    for i in (1, 2):  # these are in the inbox when the step raises
        parts.engine.submit(listener, i, submission([3, 4], max_tokens=5))
    runner.gate.release()
    listener.wait(lambda: len(listener.ends) == 3)
    parts.engine.ended.result(WAIT_S)
    assert parts.engine.failure is runner.error
    assert {output.end for output in listener.ends.values()} == {EndReason.FAILED}
    assert {output.detail for output in listener.ends.values()} == {"RuntimeError: the device is on fire"}
    parts.engine.submit(later, 3, submission([3, 4], max_tokens=5))
    assert later.ends[3].end is EndReason.FAILED, "answered at once"


def test_a_draining_engine_finishes_what_it_has_and_refuses_what_comes(make_engine: Any) -> None:
    runner = SlowRunner()
    parts = make_engine(runner, vocab_size=16)
    listener = Listener()
    parts.engine.submit(listener, 1, submission([3], max_tokens=3))
    assert runner.entered.acquire(timeout=WAIT_S)
    parts.engine.submit(listener, 2, submission([3], max_tokens=3))
    parts.engine.drain()
    parts.engine.submit(listener, 3, submission([3], max_tokens=3))
    runner.gate.release(20)
    listener.wait(lambda: len(listener.ends) == 2 and bool(listener.refusals))
    assert listener.tokens == {1: [1, 1, 1], 2: [1, 1, 1]}
    assert isinstance(listener.refusals[3], Draining)
    parts.idle()


@pytest.mark.parametrize(
    ("bad", "name"),
    [
        (submission([]), "prompt"),
        (submission([16]), "prompt_ids"),
        (submission([-1]), "prompt_ids"),
        (submission([1], max_tokens=0), "max_tokens"),
        (submission([1], max_tokens=512), "max_tokens"),
        (submission([1] * 512, max_tokens=1), "max_tokens"),
        (submission([1] * 100, max_tokens=300), "max_tokens"),  # more than the pool holds
    ],
)
def test_an_impossible_submission_is_refused_and_named(make_engine: Any, bad: Submission, name: str) -> None:
    parts = make_engine(SlowRunner(), vocab_size=16, num_blocks=40)
    listener = Listener()
    parts.engine.submit(listener, 7, bad)
    listener.wait(lambda: 7 in listener.refusals)
    refusal = listener.refusals[7]
    assert isinstance(refusal, FieldError) and refusal.field == name
    parts.idle()


def test_a_sequence_id_in_use_is_refused_and_the_first_goes_on(make_engine: Any) -> None:
    runner = SlowRunner()
    parts = make_engine(runner, vocab_size=16)
    listener = Listener()
    parts.engine.submit(listener, 1, submission([3], max_tokens=3))
    assert runner.entered.acquire(timeout=WAIT_S)
    parts.engine.submit(listener, 1, submission([3], max_tokens=3))
    runner.gate.release(10)
    listener.wait(lambda: 1 in listener.ends)
    refusal = listener.refusals[1]
    assert isinstance(refusal, FieldError) and refusal.field == "sequence_id"
    assert listener.tokens[1] == [1, 1, 1]
    parts.idle()
