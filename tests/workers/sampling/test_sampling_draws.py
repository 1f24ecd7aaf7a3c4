"""Checks that draws follow the distribution that temperature and filters leave, and that seeds repeat them."""

import math
from collections import Counter
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor

from tests.support.sampling import LOGITS, next_token
from workers.sampling import sampling
from workers.sampling.sampling import SampledToken, SamplerState, SamplingParams, sample, uniform

NUM_DRAWS = 8000


def drawn_with(logits: Tensor, params: Iterable[SamplingParams]) -> list[int]:
    """Samples a token from the same logits for each of many parameters."""
    states = [SamplerState(each, ()) for each in params]
    results = sample(logits.expand(len(states), -1), states)
    return [result.token_id for result in results if isinstance(result, SampledToken)]


def draw_many(logits: Tensor, num_draws: int = NUM_DRAWS, **params: float) -> Counter[int]:
    return Counter(drawn_with(logits, (SamplingParams(seed=i, **params) for i in range(num_draws))))  # type: ignore[arg-type]


def assert_drawn_from(counts: Counter[int], expected: Tensor) -> None:
    """Checks that Pearson's chi-square is below its 99.99 % point (Wilson and Hilferty 1931)."""
    support = expected.nonzero().flatten().tolist()
    assert set(counts) <= set(support)
    total = sum(counts.values())
    statistic = sum((counts[i] - total * float(expected[i])) ** 2 / (total * float(expected[i])) for i in support)
    freedom = len(support) - 1
    variance = 2 / (9 * freedom)
    assert statistic < freedom * (1 - variance + 3.719 * math.sqrt(variance)) ** 3


def filtered(logits: Tensor, *, temperature: float, keep: list[int]) -> Tensor:
    kept = torch.full_like(logits, -math.inf)
    kept[keep] = logits[keep] / temperature
    return kept.softmax(0)


# ---- draws ----


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_draws_follow_the_softmax(temperature: float) -> None:
    assert_drawn_from(draw_many(LOGITS, temperature=temperature), (LOGITS / temperature).softmax(0))


def test_the_draws_of_one_sequence_follow_the_softmax() -> None:
    state = SamplerState(SamplingParams(temperature=1.0, seed=11), ())
    assert_drawn_from(Counter(next_token(LOGITS, state).token_id for _ in range(4000)), LOGITS.softmax(0))


def test_the_check_of_draws_notices_a_wrong_temperature() -> None:
    with pytest.raises(AssertionError):
        assert_drawn_from(draw_many(LOGITS, temperature=1.1), LOGITS.softmax(0))


def test_draws_from_a_large_vocabulary_follow_the_softmax() -> None:
    """Tokens are counted by which twentieth of the ids they are in."""
    logits = torch.randn(12_000, generator=torch.Generator().manual_seed(1))
    for top_p in (1.0, 0.9):
        probabilities = logits.double().softmax(0)
        ordered, order = probabilities.sort(descending=True)
        probabilities[order[ordered.cumsum(0) - ordered >= top_p]] = 0
        counts = Counter(i // 600 for i in draw_many(logits, 2000, temperature=1.0, top_p=top_p).elements())
        assert_drawn_from(counts, (probabilities / probabilities.sum()).view(20, 600).sum(1))


def test_top_k_keeps_the_k_most_likely() -> None:
    counts = draw_many(LOGITS, temperature=1.0, top_k=3)
    assert_drawn_from(counts, filtered(LOGITS, temperature=1.0, keep=[3, 6, 0]))


def test_of_equally_likely_tokens_top_k_keeps_those_with_lower_ids() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, 1.0, 1.0])
    assert set(draw_many(logits, 500, temperature=1.0, top_k=3)) == {1, 2, 3}
    assert set(draw_many(torch.zeros(5), 500, temperature=1.0, top_k=1)) == {0}


def test_top_p_keeps_the_fewest_that_reach_the_mass() -> None:
    # Softmax of these is exactly what is written.
    logits = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15]).log()
    for top_p, keep in (
        (0.39, [1]),
        (0.41, [1, 3]),
        (0.69, [1, 3]),
        (0.71, [1, 3, 4]),
        (0.96, [0, 1, 2, 3, 4]),
    ):
        counts = draw_many(logits, 2000, temperature=1.0, top_p=top_p)
        if len(keep) == 1:
            assert set(counts) == set(keep)
        else:
            assert_drawn_from(counts, filtered(logits, temperature=1.0, keep=keep))


def test_top_p_counts_mass_within_top_k_after_temperature() -> None:
    # After temperature 2 and top-k 3 the masses are 3/6, 2/6, 1/6, so two reach 0.75; of all tokens they would not.
    logits = 2 * torch.tensor([1.0, 3.0, 2.0, 0.5, 0.5]).log()
    counts = draw_many(logits, temperature=2.0, top_k=3, top_p=0.75)
    assert_drawn_from(counts, filtered(logits, temperature=2.0, keep=[1, 2]))


def test_min_p_is_measured_against_the_most_likely_after_temperature() -> None:
    # At temperature 2 the weights are the roots: 1, 0.5, 0.25 and 0.1 of the highest.
    logits = torch.tensor([1.0, 0.25, 0.0625, 0.01]).log()
    for min_p, keep in ((0.51, [0]), (0.49, [0, 1]), (0.2, [0, 1, 2]), (0.0, [0, 1, 2, 3])):
        counts = draw_many(logits, 3000, temperature=2.0, min_p=min_p)
        assert set(counts) == set(keep)
        if len(keep) > 1:
            assert_drawn_from(counts, filtered(logits, temperature=2.0, keep=keep))


def test_a_huge_top_k_is_no_limit() -> None:
    assert draw_many(LOGITS, 200, temperature=1.0, top_k=2**31) == draw_many(LOGITS, 200, temperature=1.0)


def test_temperature_zero_is_argmax_whatever_the_seed() -> None:
    logits = torch.randn(6, 101)
    states = [SamplerState(SamplingParams(seed=seed, top_k=5, top_p=0.5), ()) for seed in range(6)]
    tokens = [result.token_id for result in sample(logits, states) if isinstance(result, SampledToken)]
    assert tokens == logits.argmax(-1).tolist()


@pytest.mark.parametrize("size", [10, 101, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_of_equally_likely_tokens_the_greedy_one_has_the_lowest_id(size: int, dtype: torch.dtype) -> None:
    logits = torch.zeros(size, dtype=dtype)
    logits[[3, 5, size - 1]] = 1
    assert next_token(logits, SamplerState(SamplingParams(), ())).token_id == 3
    assert next_token(logits, SamplerState(SamplingParams(bias=((3, -1.0),)), ())).token_id == 5


@pytest.mark.parametrize("temperature", [1e-30, 1e-300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tiny_temperature_is_argmax_and_no_nan(dtype: torch.dtype, temperature: float) -> None:
    assert set(draw_many(1e4 * LOGITS.to(dtype), 50, temperature=temperature)) == {3}


@pytest.mark.parametrize("draw", [0.0, 1 - 2.0**-53])
@pytest.mark.parametrize("limits", [{}, {"top_p": 0.9999}, {"top_k": 4}, {"min_p": 0.01}])
def test_extreme_draws_never_pick_an_impossible_token(
    draw: float, limits: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "uniform", lambda seed, index: draw)
    for size in (5, 3000):
        logits = torch.full((size,), -math.inf)
        logits[1:4] = torch.tensor([0.0, 0.1, 0.2])
        params = SamplingParams(temperature=1.0, **limits)  # type: ignore[arg-type]
        assert next_token(logits, SamplerState(params, ())).token_id == (1 if draw == 0 else 3)


# ---- seeds ----


def test_a_sequence_draws_the_same_again_and_goes_on_where_another_stopped() -> None:
    params = SamplingParams(temperature=1.5, seed=7, repetition_penalty=1.2, frequency_penalty=0.3)
    whole = SamplerState(params, [1, 2])
    tokens = [next_token(LOGITS, whole).token_id for _ in range(12)]
    resumed = SamplerState(params, [1, 2], emitted_ids=tokens[:5])
    assert (resumed.num_tokens, resumed.last_token_id) == (5, tokens[4])
    assert [next_token(LOGITS, resumed).token_id for _ in range(7)] == tokens[5:]


def test_seeds_and_indices_give_different_draws() -> None:
    draws = {uniform(seed, index) for seed in range(50) for index in range(50)}
    assert len(draws) == 2500
    assert all(0 <= draw < 1 for draw in draws)


def test_uniform_is_splitmix64() -> None:
    """The numbers are the first outputs of the published generator from state 0."""
    assert [sampling._mix(i * 0x9E3779B97F4A7C15 & (2**64 - 1)) for i in range(3)] == [
        0xE220A8397B1DCDAF,
        0x6E789E6AA1B965F4,
        0x06C45D188009454F,
    ]


def test_draws_of_neighbouring_seeds_do_not_correlate() -> None:
    draws = torch.tensor([[uniform(seed, index) for index in range(2000)] for seed in range(4)])
    assert (torch.corrcoef(draws) - torch.eye(4)).abs().max() < 0.08
    assert torch.corrcoef(torch.stack((draws[0, 1:], draws[0, :-1])))[0, 1].abs() < 0.08
