"""Checks what changes a sequence's logits, and the log-probabilities that it is given."""

import math

import pytest
import torch

from tests.support.sampling import LOGITS, OnlyIds, next_token
from workers.sampling.sampling import SampledToken, SamplerState, SamplingParams, sample

# ---- what changes the logits ----


def test_penalties_follow_the_answer_as_it_grows() -> None:
    state = SamplerState(SamplingParams(frequency_penalty=0.3), [3, 3, 3])
    # 2.0 against 1.5: after two times the third is 1.4. Then 1.5, 1.4, 1.2 and 1.1.
    assert [next_token(LOGITS, state).token_id for _ in range(4)] == [3, 3, 6, 3]


def test_a_bias_forbids_forces_and_ignores_ids_outside_the_vocabulary() -> None:
    def greedy(*bias: tuple[int, float]) -> int:
        return next_token(LOGITS, SamplerState(SamplingParams(bias=bias), ())).token_id

    assert greedy((3, -100.0)) == 6
    assert greedy((5, 100.0)) == 5
    assert greedy((10, 100.0), (300, 100.0)) == 3


def test_a_stop_id_waits_for_the_minimum_of_tokens() -> None:
    state = SamplerState(SamplingParams(bias=((6, 50.0),)), (), stop_token_ids=frozenset({3, 6, 999}), min_tokens=3)
    assert [next_token(LOGITS, state).token_id for _ in range(4)] == [0, 0, 0, 6]


def test_a_mask_allows_its_tokens_and_hears_of_each() -> None:
    mask = OnlyIds(2, 8)
    state = SamplerState(SamplingParams(temperature=2.0), (), emitted_ids=[8], grammar=mask)
    tokens = [next_token(LOGITS, state).token_id for _ in range(20)]
    assert set(tokens) == {2, 8}
    assert mask.accepted == [8, *tokens]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_is_forbidden_is_not_brought_back(temperature: float) -> None:
    logits = LOGITS.clone()
    logits[4] = -math.inf
    params = SamplingParams(
        temperature=temperature,
        repetition_penalty=0.01,
        presence_penalty=-2.0,
        frequency_penalty=-2.0,
        bias=((3, 100.0), (4, 100.0), (5, 100.0)),
    )
    state = SamplerState(
        params,
        range(10),
        emitted_ids=[3, 4, 5] * 9,
        stop_token_ids=frozenset({5}),
        min_tokens=100,
        grammar=OnlyIds(0, 1, 4, 5),
    )
    assert {next_token(logits, state).token_id for _ in range(30)} <= {0, 1}


# ---- log-probabilities ----


def test_logprobs_are_of_the_raw_logits() -> None:
    params = SamplingParams(temperature=0.3, top_k=2, seed=9, bias=((6, 1.0),), presence_penalty=1.0, logprobs=3)
    token = next_token(LOGITS.bfloat16(), SamplerState(params, (), emitted_ids=[3]))
    expected = LOGITS.bfloat16().double().log_softmax(0)
    assert token.token_id in (3, 6)
    assert token.logprob == pytest.approx(float(expected[token.token_id]), abs=1e-6)
    assert [token_id for token_id, _ in token.top] == [3, 6, 0]
    assert [logprob for _, logprob in token.top] == pytest.approx(expected[[3, 6, 0]].tolist(), abs=1e-6)


@pytest.mark.parametrize("spread", [0.01, 1.0, 10.0])
def test_logprobs_of_a_large_vocabulary_are_those_of_log_softmax(spread: float) -> None:
    logits = spread * torch.randn(3, 20_000, generator=torch.Generator().manual_seed(2)) - 50
    counts = [20, 0, 5]
    states = [SamplerState(SamplingParams(temperature=1.0, seed=i, logprobs=n), ()) for i, n in enumerate(counts)]
    for row, num_top, token in zip(logits, counts, sample(logits, states), strict=True):
        assert isinstance(token, SampledToken)
        expected = row.double().log_softmax(0)
        best = expected.topk(num_top)
        assert token.logprob == pytest.approx(float(expected[token.token_id]), abs=1e-6)
        assert [token_id for token_id, _ in token.top] == best.indices.tolist()
        assert [logprob for _, logprob in token.top] == pytest.approx(best.values.tolist(), abs=1e-6)


def test_more_logprobs_than_tokens_are_all_of_them() -> None:
    token = next_token(LOGITS, SamplerState(SamplingParams(logprobs=50), ()))
    assert [token_id for token_id, _ in token.top] == LOGITS.argsort(descending=True).tolist()


def test_zero_logprobs_report_the_chosen_token_alone() -> None:
    token = next_token(LOGITS, SamplerState(SamplingParams(logprobs=0), ()))
    assert token.logprob is not None
    assert token.top == ()


def test_no_logprobs_unless_asked_for() -> None:
    assert sample(LOGITS[None], [SamplerState(SamplingParams(), ())]) == [SampledToken(token_id=3)]


# ---- the edges ----


def test_no_rows_give_no_tokens() -> None:
    assert sample(torch.empty(0, 10), []) == []


def test_logits_are_left_as_they_are() -> None:
    logits = LOGITS.expand(2, -1).clone()
    states = [
        SamplerState(SamplingParams(temperature=0.7, bias=((1, 2.0),), logprobs=2), (), grammar=OnlyIds(1, 2)),
        SamplerState(SamplingParams(repetition_penalty=2.0), [1, 2]),
    ]
    sample(logits, states)
    assert torch.equal(logits, LOGITS.expand(2, -1))


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -1.0},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_k": -1},
        {"top_p": 0.0},
        {"min_p": 1.1},
        {"min_p": math.nan},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": math.inf},
        {"presence_penalty": math.nan},
        {"frequency_penalty": math.inf},
        {"bias": ((1, math.inf),)},
        {"bias": ((1, 1.0), (1, 2.0))},
        {"bias": ((-1, 1.0),)},
        {"logprobs": -1},
    ],
)
def test_impossible_params_are_caught(bad: dict[str, float]) -> None:
    with pytest.raises(AssertionError):
        SamplingParams(**bad)  # type: ignore[arg-type]
