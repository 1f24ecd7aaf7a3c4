"""The engine with a real model: whatever a step is made of, a sequence's tokens are those that transformers gives."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from placement.errors import FieldError, cause_of
from placement.serving.admission import Draining
from placement.serving.events import EndReason
from protos.codec.log_record import record_of
from tests.support.engine import WAIT_S, Gated, Listener, Parts, SlowRunner, engines, submission
from tests.support.oracle import greedy_each
from workers.engine.types import Submission
from workers.transport.errors import PeerFailed

NUM_TOKENS = 64


@pytest.fixture
def make_engine() -> Iterator[Callable[..., Parts]]:
    with engines() as make:
        yield make


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
    return Oracle(directory=directory, prompts=prompts, answers=greedy_each(model, prompts, NUM_TOKENS))


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
    runner = Gated(make_runner(oracle.directory))
    parts = make_engine(runner, num_blocks=60)
    listener = Listener()
    for i, prompt in enumerate(oracle.prompts):
        parts.engine.submit(listener, i, submission(prompt, priority=i % 3))
    runner.gate.set()
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


def test_cancel_takes_the_sequence_out_of_the_next_step(make_engine: Any) -> None:
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
    assert len(listener.tokens[1]) <= 1, "nothing was given after the step in which the cancel came"
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


@pytest.mark.parametrize(("error", "has_traceback"), [(PeerFailed(1, "closed"), False), (RuntimeError("odd"), True)])
def test_a_lost_peer_is_a_line_in_the_log_and_what_nobody_expects_has_its_traceback(
    make_engine: Any, caplog: pytest.LogCaptureFixture, error: Exception, has_traceback: bool
) -> None:
    caplog.set_level(logging.DEBUG, logger="workers")
    runner = SlowRunner()
    runner.error = error
    parts = make_engine(runner, vocab_size=16)
    with caplog.at_level("DEBUG"):
        parts.engine.submit(Listener(), 0, submission([3, 4], max_tokens=5))
        runner.gate.release()
        parts.engine.ended.result(WAIT_S)
    (found,) = [
        said for said in (record_of(each, "worker") for each in caplog.records) if said.event == "engine_failed"
    ]
    assert found.fields["cause"] == cause_of(error) and ("traceback" in found.fields) == has_traceback
    assert found.level == ("error" if has_traceback else "debug")


def test_a_draining_engine_finishes_what_it_has_and_refuses_what_comes(make_engine: Any) -> None:
    runner = SlowRunner()
    parts = make_engine(runner, vocab_size=16)
    listener = Listener()
    parts.engine.submit(listener, 1, submission([3], max_tokens=3))
    assert runner.entered.acquire(timeout=WAIT_S)
    parts.engine.admit()
    parts.engine.drain()
    parts.engine.submit(listener, 2, submission([3], max_tokens=3))  # it was admitted before
    with pytest.raises(Draining):
        parts.engine.admit()
    runner.gate.release(20)
    listener.wait_ends(2)
    assert listener.tokens == {1: [1, 1, 1], 2: [1, 1, 1]}
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
