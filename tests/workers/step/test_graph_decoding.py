"""Checks that a runner with graphs gives what it gives without, for every family. The graphs compute again each time by
the tables that a GPU's kernels read. The tokens are also those of transformers.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from kernels.attention import SharedSpan
from kernels.cuda import shared
from kernels.cuda.plan import DevicePlan
from tests.support.engine import Listener, engines, submission
from tests.support.oracle import CHECKPOINTS, Runs, Slots, chunk, continue_greedily, first, greedy_each
from tests.support.steps import greedy_sampler, run
from tests.support.triton.table_kernels import TableKernels
from workers.sampling.sampling import SampledToken, SamplerState, SamplingParams
from workers.step.graphs import Replay, graph_sizes
from workers.step.runner import ModelRunner
from workers.step.scoring import ScoredPrompt
from workers.step.types import Batch, SequenceInput

MAX_DECODES = 9
PROMPTS = [[(7 * i + 31 * length) % 509 for i in range(length)] for length in (1, 300, 17, 33, 5, 2, 50, 64, 97)]


@dataclass
class Recorder:
    """A capture that computes again, and counts how often for each size of graph."""

    sizes: list[int] = field(default_factory=lambda: list(reversed(graph_sizes(MAX_DECODES))))
    replays: Counter[int] = field(default_factory=Counter)

    def __call__(self, compute: Callable[[], None]) -> Replay:
        size = self.sizes.pop(0)
        compute()

        def replay() -> None:
            self.replays[size] += 1
            compute()

        return replay


@dataclass(frozen=True)
class Case:
    path: Path
    eager: ModelRunner
    graphed: ModelRunner
    recorder: Recorder

    def replays(self, calls: Callable[[], object]) -> dict[int, int]:
        """Counts how often a graph of each size runs meanwhile."""
        self.recorder.replays.clear()
        calls()
        return dict(self.recorder.replays)


@pytest.fixture(scope="module")
def make_case(checkpoint: Callable[..., Path], make_runner: Callable[..., ModelRunner]) -> Callable[..., Case]:
    def make(name: str, max_tokens: int) -> Case:
        family, config = CHECKPOINTS[name]
        path, recorder = checkpoint(family, **config), Recorder()
        eager, graphed = (make_runner(path, kernels=TableKernels()) for _ in range(2))
        graphed.capture_decodes(recorder, max_decodes=MAX_DECODES, max_tokens=max_tokens)
        assert not recorder.sizes
        return Case(path=path, eager=eager, graphed=graphed, recorder=recorder)

    return make


@pytest.fixture(scope="module", params=CHECKPOINTS)
def case(request: pytest.FixtureRequest, make_case: Callable[..., Case]) -> Case:
    return make_case(request.param, max_tokens=2000)


@pytest.fixture(scope="module")
def plain(make_case: Callable[..., Case]) -> Case:
    return make_case("plain", max_tokens=400)


def fill(case: Case) -> None:
    """Fills both caches with the same keys and values, as if other tokens had come before."""
    for ours, theirs in zip(case.graphed._cache.layers, case.eager._cache.layers, strict=True):
        theirs.keys.copy_(ours.keys.normal_())
        theirs.values.copy_(ours.values.normal_())


def decode(ids: list[int], runs: Runs, **more: Any) -> SequenceInput:
    """Decodes the last of some tokens, while the others are in the cache. Its result shows the logits."""
    fields = {"sampler": SamplerState(SamplingParams(logprobs=20), ()), "samples": True} | more
    return SequenceInput(token_ids=ids[-1:], start=len(ids) - 1, runs=first(runs, len(ids)), **fields)


def assert_alike(found: list[SampledToken | None], expected: list[SampledToken | None]) -> None:
    for token, wanted in zip(found, expected, strict=True):
        assert (token is None) == (wanted is None)
        if token is None or wanted is None:
            continue
        assert token.token_id == wanted.token_id
        assert token.logprob == pytest.approx(wanted.logprob, abs=1e-4)
        assert dict(token.top) == pytest.approx(dict(wanted.top), abs=1e-4)


def test_decodes_of_every_number_are_as_without_graphs_and_write_the_same_kv(case: Case) -> None:
    slots = Slots(num_slots=2000)
    runs = [slots.take(len(prompt) + MAX_DECODES) for prompt in PROMPTS]
    fill(case)
    prefill = [chunk(prompt, 0, len(prompt), where) for prompt, where in zip(PROMPTS, runs, strict=True)]
    ids = [list(prompt) for prompt in PROMPTS]
    assert case.replays(lambda: run(case.graphed, prefill)) == {}
    for index, token in enumerate(run(case.eager, prefill)):
        assert token is not None
        ids[index].append(token.token_id)
    for count in range(MAX_DECODES, 0, -1):
        found, expected = (
            run(runner, [decode(ids[i], runs[i]) for i in range(count)]) for runner in (case.graphed, case.eager)
        )
        assert_alike(found, expected)
        for i, token in enumerate(expected):
            assert token is not None
            ids[i].append(token.token_id)
    for ours, theirs in zip(case.graphed._cache.layers, case.eager._cache.layers, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours.values, theirs.values, atol=1e-5, rtol=1e-5)
    assert case.recorder.replays == {9: 1, 8: 4, 4: 2, 2: 1, 1: 1}


def test_capturing_writes_no_kv(make_case: Callable[..., Case]) -> None:
    layers = make_case("plain", max_tokens=100).graphed._cache.layers
    assert not any(bool(layer.keys.any() or layer.values.any()) for layer in layers)


def test_tokens_are_those_of_transformers(case: Case) -> None:
    oracle = AutoModelForCausalLM.from_pretrained(case.path, dtype=torch.float32).eval()
    prompts = [PROMPTS[0], PROMPTS[2], PROMPTS[7]]
    expected = greedy_each(oracle, prompts)
    answers: list[list[int]] = []
    replays = case.replays(lambda: answers.extend(continue_greedily(case.graphed, prompts, 40)))
    assert answers == expected
    assert replays[4] >= 60  # three decodes at a time


def test_other_steps_run_without_a_graph(plain: Case) -> None:
    fill(plain)
    one = PROMPTS[2]
    scored = ScoredPrompt(first_index=len(one), token_ids=[5], num_top=0)
    steps = {
        "too many": [decode(one, ((40 * i, 40 * i + 17),)) for i in range(MAX_DECODES + 1)],
        "too long together": [
            decode(PROMPTS[1], ((0, 300),)),
            decode(PROMPTS[8], ((300, 400),)),
            decode(one, ((400, 420),)),
        ],
        "a prompt beside": [decode(one, ((0, 17),)), chunk(one, 0, len(one), ((100, 117),))],
        "a prompt that goes on": [decode(one, ((0, 17),), samples=False)],
        "scored": [decode(one, ((0, 17),), scored=scored, samples=False), decode(one, ((40, 57),))],
    }
    for name, sequences in steps.items():
        assert plain.replays(partial(run, plain.graphed, sequences)) == {}, name


def test_sequences_that_want_no_token_get_none_beside_those_that_do(plain: Case) -> None:
    fill(plain)
    prompts = PROMPTS[2:5]

    def step(runner: ModelRunner) -> list[SampledToken | None]:
        return run(runner, [decode(ids, ((40 * i, 40 * i + 40),), samples=i != 1) for i, ids in enumerate(prompts)])

    found: list[SampledToken | None] = []
    assert plain.replays(lambda: found.extend(step(plain.graphed))) == {4: 1}
    assert found[1] is None
    assert_alike(found, step(plain.eager))


def test_decodes_that_share_a_prompts_beginning_attend_to_it_together(
    make_case: Callable[..., Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared, "PASS_BYTES", 0)  # else so little is not worth it
    case, found = make_case("plain", max_tokens=2000), list[SampledToken | None]()
    fill(case)
    prompts = [PROMPTS[1], [*PROMPTS[1][:260], 7, 8], PROMPTS[2]]
    runs = [((0, 300),), ((0, 260), (300, 310)), ((400, 500),)]
    common = SharedSpan(members=(0, 1), first_token=0, num_tokens=256, runs=((0, 256),))

    def step(runner: ModelRunner, *spans: SharedSpan) -> list[SampledToken | None]:
        decodes = tuple(decode(ids, where) for ids, where in zip(prompts, runs, strict=True))
        return [*runner.prepare(Batch(sequences=decodes, shared=spans))().tokens]  # type: ignore[list-item]

    assert case.replays(lambda: found.extend(step(case.graphed, common))) == {4: 1}
    for plan in case.graphed._graphs._inputs.step(4).attention.values():  # type: ignore[union-attr]
        assert isinstance(plan, DevicePlan) and plan.counts.tolist() == [3, 2, 1, 0]
    assert_alike(found, step(case.eager))
    found.clear()
    assert case.replays(lambda: found.extend(step(case.graphed))) == {4: 1}  # nothing of it is left
    assert_alike(found, step(case.eager))


def test_a_token_that_is_awaited_reaches_the_graph(plain: Case) -> None:
    def tokens(runner: ModelRunner) -> list[object]:
        one, prompt = greedy_sampler(), PROMPTS[2]
        size = len(prompt)
        steps = [runner.prepare(Batch(sequences=(chunk(prompt, 0, size - 1, ((0, size - 1),)),)))]
        for ids, stop in ((prompt[-1:], size), ([], size + 1), ([], size + 2)):
            sequence = SequenceInput(
                token_ids=ids, start=stop - 1, runs=((0, stop),), awaits_token=not ids, sampler=one, samples=True
            )
            steps.append(runner.prepare(Batch(sequences=(sequence,))))  # all before the first executes
        return [step().tokens[0] for step in steps]

    found: list[object] = []
    assert plain.replays(lambda: found.extend(tokens(plain.graphed))) == {1: 3}
    assert found == tokens(plain.eager)


def test_preempted_sequences_go_on_with_the_same_tokens(plain: Case) -> None:
    oracle = AutoModelForCausalLM.from_pretrained(plain.path, dtype=torch.float32).eval()
    prompts = [PROMPTS[2], PROMPTS[4], PROMPTS[3], PROMPTS[6]]
    expected = dict(enumerate(greedy_each(oracle, prompts, 30)))
    listener = Listener()
    with engines() as make:
        parts = make(plain.graphed, num_blocks=17, max_num_seqs=MAX_DECODES)
        plain.recorder.replays.clear()
        for index, prompt in enumerate(prompts):
            parts.engine.submit(listener, index, submission(prompt, max_tokens=30))
        listener.wait_ends(len(prompts))
        parts.idle()
    assert sum(end.num_preemptions for end in listener.ends.values()) > 0
    assert dict(listener.tokens) == expected
    assert sum(plain.recorder.replays.values()) > 30
