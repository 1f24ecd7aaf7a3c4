"""Compares sampling with a slow reference in numpy, one row at a time, and with transformers' logits processors."""

import math
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from llguidance.numpy import apply_token_bitmask_inplace_kernel
from numpy.typing import NDArray
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from workers.sampling import draw as sampling_draw
from workers.sampling import sampling
from workers.sampling.adjust import adjust
from workers.sampling.sampling import SampledToken, SamplerState, SamplingParams, sample, uniform


@dataclass
class Case:
    """A row, and everything that decides its token."""

    logits: NDArray[np.float32]
    params: SamplingParams
    prompt_ids: list[int] = field(default_factory=list)
    emitted_ids: list[int] = field(default_factory=list)
    stop_token_ids: frozenset[int] = frozenset()
    min_tokens: int = 0
    allowed: frozenset[int] | None = None

    def state(self) -> SamplerState:
        return SamplerState(
            self.params,
            self.prompt_ids,
            stop_token_ids=self.stop_token_ids,
            min_tokens=self.min_tokens,
            emitted_ids=self.emitted_ids,
            grammar=None if self.allowed is None else Mask(self.allowed),
        )

    def adjusted(self) -> NDArray[np.float32]:
        """Adjusts logits token by token, in float32 as the sampler does, so that equal logits stay equal."""
        counts, params = Counter(self.emitted_ids), self.params
        logits = self.logits.copy()
        for token_id, bias in params.bias:
            logits[token_id] += np.float32(bias)
        for i in range(len(logits)):
            held = len(self.emitted_ids) < self.min_tokens and i in self.stop_token_ids
            if held or (self.allowed is not None and i not in self.allowed):
                logits[i] = -np.inf
            if i in self.prompt_ids or i in counts:
                penalty = np.float32(params.repetition_penalty)
                logits[i] = logits[i] / penalty if logits[i] > 0 else logits[i] * penalty
            if i in counts:
                logits[i] -= np.float32(params.presence_penalty + params.frequency_penalty * counts[i])
        return logits

    def distribution(self) -> tuple[NDArray[np.float64], float]:
        """Computes the probabilities of the draw, and how near a filter's limit came to a token."""
        params, logits = self.params, self.adjusted()
        scaled = ((logits - logits.max()) / np.float32(params.temperature)).astype(np.float64)
        order = sorted(range(len(scaled)), key=lambda i: (-scaled[i], i))
        margin = math.inf
        if params.min_p:
            margin = min(abs(value - math.log(params.min_p)) for value in scaled)
            order = [i for i in order if scaled[i] >= math.log(params.min_p)]
        order = order[: params.top_k] if params.top_k else order
        mass = np.exp(scaled[order]) / np.exp(scaled[order]).sum()
        if params.top_p < 1:
            before = np.cumsum(mass) - mass
            margin = min(margin, *abs(before - np.float64(params.top_p)))
            order = [i for i, preceding in zip(order, before, strict=True) if preceding < params.top_p]
        kept = np.zeros_like(scaled)
        kept[order] = np.exp(scaled[order])
        return kept / kept.sum(), margin


class Mask:
    """A mask that allows given tokens, whatever came before."""

    done = False

    def __init__(self, allowed: frozenset[int]) -> None:
        self.allowed = allowed
        self.accepted: list[int] = []

    def fill(self, row: Tensor) -> bool:
        for token_id in self.allowed:
            row.numpy().view(np.uint32)[token_id // 32] |= np.uint32(1 << token_id % 32)
        return True

    def accept(self, token_id: int) -> None:
        self.accepted.append(token_id)


@st.composite
def cases(draw: st.DrawFn, sizes: tuple[int, ...] = (3, 40, 300, 1500)) -> Case:
    size = draw(st.sampled_from(sizes))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    logits = (rng.standard_normal(size) * draw(st.sampled_from([0.2, 1.0, 4.0]))).astype(np.float32)
    if draw(st.booleans()):  # many ties, as of bfloat16 logits
        logits = np.round(logits * 8) / np.float32(8)
    ids = st.integers(0, size - 1)
    some = st.lists(ids, max_size=8)
    params = SamplingParams(
        temperature=draw(st.sampled_from([0.0, 0.3, 1.0, 2.0])),
        top_k=draw(st.sampled_from([0, 0, 1, 2, 7, 60, 200, 2000])),
        top_p=draw(st.sampled_from([1.0, 0.99, 0.9, 0.5, 0.01])),
        min_p=draw(st.sampled_from([0.0, 0.0, 0.02, 0.5, 1.0])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.3, 0.5])),
        presence_penalty=draw(st.sampled_from([0.0, 0.5, -2.0])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.25, -1.0])),
        bias=tuple(draw(st.dictionaries(ids, st.sampled_from([-100.0, -1.5, 2.0, 5.0]), max_size=5)).items()),
        seed=draw(st.integers(0, 2**64 - 1)),
    )
    return Case(
        logits=logits,
        params=params,
        prompt_ids=draw(some),
        emitted_ids=draw(some),
        stop_token_ids=frozenset(draw(some)),
        min_tokens=draw(st.sampled_from([0, 0, 4, 100])),
        allowed=draw(st.one_of(st.none(), st.frozensets(ids, min_size=1, max_size=30))),
    )


def token_of(case: Case) -> int | None:
    (result,) = sample(torch.from_numpy(case.logits)[None], [case.state()])
    return result.token_id if isinstance(result, SampledToken) else None


def assert_as_reference(case: Case) -> None:
    token_id, adjusted = token_of(case), case.adjusted()
    if adjusted.max() == -np.inf:
        assert token_id is None
        return
    assert token_id is not None
    if case.params.temperature == 0:
        assert token_id == adjusted.argmax()
        return
    probabilities, margin = case.distribution()
    assume(margin > 1e-5)
    assert probabilities[token_id] > 0
    upper = np.cumsum(probabilities)[token_id]
    drawn = uniform(case.params.seed, len(case.emitted_ids))
    assert upper - probabilities[token_id] - 1e-6 <= drawn <= upper + 1e-6


@settings(deadline=None, max_examples=400)
@given(case=cases())
def test_every_combination_draws_what_the_reference_does(case: Case) -> None:
    assert_as_reference(case)


@settings(deadline=None, max_examples=25)
@given(case=cases(sizes=(9001, 20000)))
def test_large_vocabularies_draw_what_the_reference_does(case: Case) -> None:
    assert_as_reference(case)


@settings(deadline=None, max_examples=200)
@given(case=cases(sizes=(300, 1500, 5000)), few=st.sampled_from([1, 3, 20]))
def test_the_token_is_the_same_however_it_is_found(case: Case, few: int) -> None:
    usual = token_of(case)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "FEW", few)
        patch.setattr(sampling_draw, "CANDIDATES", few)
        assert token_of(case) == usual


SPREAD = torch.tensor([1.0, 0.3, -0.5, 2.0, 0.0, -1.3, 1.5, 0.9, -1.0, 0.2, 0.6, -0.1])


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
@pytest.mark.parametrize(
    "limits", [{"min_p": 0.2}, {"top_k": 4}, {"top_p": 0.6}, {"min_p": 0.1, "top_k": 8, "top_p": 0.8}, {"top_p": 0.999}]
)
def test_what_can_be_drawn_is_what_transformers_keeps(
    temperature: float, limits: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if "min_p" in limits:
        warpers.append(MinPLogitsWarper(limits["min_p"]))
    if "top_k" in limits:
        warpers.append(TopKLogitsWarper(int(limits["top_k"])))
    if "top_p" in limits:
        warpers.append(TopPLogitsWarper(limits["top_p"]))
    expected = warpers(torch.empty(1, 0, dtype=torch.int64), SPREAD[None]).softmax(-1)[0]
    # A comb of draws finds every token that has more than one tooth's width of probability.
    teeth = 4000
    monkeypatch.setattr(sampling, "uniform", lambda seed, index: seed / teeth)
    states = [SamplerState(SamplingParams(temperature=temperature, seed=i, **limits), ()) for i in range(teeth)]  # type: ignore[arg-type]
    tokens = [
        result.token_id for result in sample(SPREAD.expand(teeth, -1), states) if isinstance(result, SampledToken)
    ]
    assert set(tokens) == set(expected.nonzero().flatten().tolist())
    shares = torch.bincount(torch.tensor(tokens), minlength=len(SPREAD)) / teeth
    assert torch.allclose(shares, expected, atol=1.5 / teeth)
    assert tokens == sorted(tokens)  # by inverse CDF, in the order of token ids


@settings(deadline=None, max_examples=50)
@given(
    penalty=st.sampled_from([0.5, 1.1, 2.0]),
    prompt_ids=st.lists(st.integers(0, 49), min_size=1, max_size=30),
    emitted_ids=st.lists(st.integers(0, 49), max_size=30),
)
def test_repetition_penalty_is_that_of_transformers(
    penalty: float, prompt_ids: list[int], emitted_ids: list[int]
) -> None:
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(len(prompt_ids)))
    logits[0, ::7] = -math.inf
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([prompt_ids + emitted_ids]), logits.clone())
    state = SamplerState(SamplingParams(repetition_penalty=penalty), prompt_ids, emitted_ids=emitted_ids)
    assert adjust(logits, [state], 50) == {}
    torch.testing.assert_close(logits, expected, rtol=2e-7, atol=0)


def test_presence_and_frequency_penalties_count_the_answer_alone() -> None:
    logits = torch.zeros(2, 6)
    answers = SamplerState(
        SamplingParams(presence_penalty=0.5, frequency_penalty=0.25), [0, 1, 1], emitted_ids=[1, 2, 2, 5]
    )
    adjust(logits, [answers, SamplerState(SamplingParams(), [0, 1])], 6)
    assert logits[0].tolist() == [0, -0.75, -1.0, 0, 0, -0.75]
    assert logits[1].tolist() == [0] * 6


@settings(deadline=None, max_examples=50)
@given(size=st.integers(1, 200), seed=st.integers(0, 2**32), wanted=st.lists(st.booleans(), min_size=1, max_size=5))
def test_masks_are_laid_out_as_llguidance_lays_them_out(size: int, seed: int, wanted: list[bool]) -> None:
    rng = np.random.default_rng(seed)
    words = rng.integers(-(2**31), 2**31, (len(wanted), -(-size // 32)), dtype=np.int32)
    logits = rng.standard_normal((len(wanted), size)).astype(np.float32)
    expected = logits.copy()
    apply_token_bitmask_inplace_kernel(expected, words)
    expected[~np.array(wanted)] = logits[~np.array(wanted)]
    # Rows are padded as the sampler pads them.
    padded = torch.full((len(wanted), 256), -math.inf)
    padded[:, :size] = torch.from_numpy(logits)
    masks = [Words(torch.from_numpy(row), limits) for row, limits in zip(words, wanted, strict=True)]
    states = [SamplerState(SamplingParams(), (), grammar=mask) for mask in masks]
    assert adjust(padded, states, size) == {}
    assert np.array_equal(padded[:, :size].numpy(), expected)
    assert bool((padded[:, size:] == -math.inf).all())


class Words(Mask):
    """A mask that writes given words."""

    def __init__(self, words: Tensor, limits: bool) -> None:
        super().__init__(frozenset())
        self.words, self.limits = words, limits

    def fill(self, row: Tensor) -> bool:
        assert not row.any()
        row.copy_(self.words)
        return self.limits
