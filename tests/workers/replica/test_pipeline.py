"""Engines over pipelines: several steps on their way at once, and every answer that of transformers."""

import itertools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from placement.serving.events import EndReason
from tests.support.engine import WAIT_S, Listener, engines, submission
from tests.support.oracle import greedy_each
from tests.support.ranks import Ranks, ranks
from workers.replica.followers import StepPart
from workers.replica.pipeline import ComputeOrder
from workers.step.layout import Prepared
from workers.transport.errors import PeerFailed

NUM_TOKENS = 24
ENDS_S = 10.0  # far more than it takes to end a wait
PROMPTS = [[(37 * i + 11 * n) % 509 for i in range(length)] for n, length in enumerate((1, 70, 33, 5, 70, 9, 120, 2))]
LAYOUTS = {
    "2 stages": ([(1,), (1,)], (3, 1)),
    "3 stages": ([(1,), (1,), (1,)], (1, 1, 2)),
    "2 ranks, then 1": ([(2, 1), (1,)], (2, 2)),
    "1 rank, then 2": ([(1,), (1, 1)], (1, 3)),
    "2 ranks, then 2": ([(1, 1), (3, 1)], (2, 2)),
}


@pytest.fixture(scope="module")
def path(checkpoint: Callable[..., Path]) -> Path:
    return checkpoint("mistral", sliding_window=24, head_dim=32, num_hidden_layers=4)


@pytest.fixture(scope="module")
def answers(path: Path) -> list[list[int]]:
    oracle = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    return greedy_each(oracle, PROMPTS, NUM_TOKENS)


@pytest.fixture(params=LAYOUTS)
def pipeline(request: pytest.FixtureRequest, path: Path) -> Iterator[Ranks]:
    stages, num_layers = LAYOUTS[request.param]
    with ranks(path, *stages, num_layers=num_layers) as made:
        yield made


@pytest.mark.parametrize(
    ("token_budget", "num_blocks"), [(1024, 256), (24, 256), (40, 20)], ids=["whole", "chunks", "preempted"]
)
def test_answers_are_those_of_transformers(
    pipeline: Ranks, answers: list[list[int]], token_budget: int, num_blocks: int
) -> None:
    with engines() as make:
        parts = make(pipeline, num_stages=pipeline.num_stages, token_budget=token_budget, num_blocks=num_blocks)
        for repeat in range(2):  # the second time much is cached
            listener = Listener()
            for i, prompt in enumerate(PROMPTS):
                wanted = 2 if repeat else None
                parts.engine.submit(listener, i, submission(prompt, max_tokens=NUM_TOKENS, prompt_logprobs=wanted))
            listener.wait_ends(len(PROMPTS))
            assert [listener.tokens[i] for i in range(len(PROMPTS))] == answers
        if num_blocks < 100:
            assert parts.core.load().num_preemptions
        parts.idle()


def test_decodes_are_dealt_out_among_the_steps_in_flight(pipeline: Ranks) -> None:
    with engines() as make:
        parts, listener = make(pipeline, num_stages=pipeline.num_stages), Listener()
        for i in range(6):
            parts.engine.submit(listener, i, submission([i + 1], max_tokens=40))
        listener.wait_ends(6)
        most = -(-6 // pipeline.num_stages)
        late = [stats.load.num_decodes for stats in listener.steps if stats.step > 20]
        assert late and max(late) <= most
        parts.idle()


def test_cancelled_sequences_give_their_blocks_back(pipeline: Ranks) -> None:
    with engines() as make:
        parts, listener = make(pipeline, num_stages=pipeline.num_stages), Listener()
        for i in range(8):
            parts.engine.submit(listener, i, submission([i + 1] * 30, max_tokens=200))
        listener.wait(lambda: len(listener.steps) > 10)
        for i in range(8):
            parts.engine.cancel(listener, i)
        listener.wait_ends(8)
        again = Listener()
        parts.engine.submit(again, 0, submission([5, 6], max_tokens=3))
        again.wait_ends(1)
        parts.idle()


def test_a_step_that_fails_between_its_parts_ends_the_engine_with_the_cause(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also the step behind it ends, which has computed its first part and waits to receive."""
    is_behind, num_calls = threading.Event(), itertools.count()
    with ranks(path, (1,), (1,), num_layers=(3, 1), checks=False) as made, engines() as make:
        find_masks = made.runner(0).find_masks

        def fail(step: Prepared) -> Future[None] | None:
            if next(num_calls):
                is_behind.set()
                return find_masks(step)
            assert is_behind.wait(WAIT_S)
            raise RuntimeError("knows no grammar")

        monkeypatch.setattr(made.runner(0), "find_masks", fail)
        parts, listener = make(made, num_stages=made.num_stages, token_budget=24), Listener()
        for i in range(4):
            parts.engine.submit(listener, i, submission(PROMPTS[1], max_tokens=NUM_TOKENS))
        listener.wait_ends(4)
        assert {(end.end, end.detail) for end in listener.ends.values()} == {
            (EndReason.FAILED, "RuntimeError: knows no grammar")
        }
        parts.engine.thread.join(ENDS_S)
        assert not parts.engine.thread.is_alive()


@pytest.mark.parametrize("wait", ["turn", "reception"])
def test_a_wait_of_a_step_ends_where_a_rank_is_lost(wait: str) -> None:
    lost: list[PeerFailed] = []

    def alive() -> None:
        if lost:
            raise lost[0]

    order = ComputeOrder(alive)

    def step() -> None:
        awaited = order.turn(StepPart.FORWARD, 1) if wait == "turn" else order.reception(1)
        with order.step(), awaited:  # step 0 never comes
            raise AssertionError("a step goes on before the one before it")

    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(step)
        with pytest.raises(TimeoutError):
            waiting.result(0.3)
        lost.append(PeerFailed(1, "is frozen"))
        with pytest.raises(PeerFailed, match="rank 1: is frozen"):
            waiting.result(ENDS_S)
