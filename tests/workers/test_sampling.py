import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from workers.sampling import SampledToken, SamplingParams, sample, uniform

NUM_DRAWS = 8000
LOGITS = torch.tensor([1.0, 0.3, -0.5, 2.0, 0.0, -3.0, 1.5, 0.9, -1.0, 0.2])


def draw_many(logits: Tensor, params: SamplingParams, num_draws: int = NUM_DRAWS) -> Counter[int]:
    return Counter(sample(logits[None], [params], [index])[0].token_id for index in range(num_draws))


def assert_drawn_from(counts: Counter[int], expected: Tensor) -> None:
    """Pearson's chi-square below its 99.99 % point (Wilson and Hilferty 1931); the seed fixes the draws."""
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


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_draws_follow_the_softmax(temperature: float) -> None:
    counts = draw_many(LOGITS, SamplingParams(temperature=temperature, seed=11))
    assert_drawn_from(counts, (LOGITS / temperature).softmax(0))


def test_the_check_of_draws_notices_a_wrong_temperature() -> None:
    counts = draw_many(LOGITS, SamplingParams(temperature=1.1, seed=11))
    with pytest.raises(AssertionError):
        assert_drawn_from(counts, LOGITS.softmax(0))


def test_top_k_keeps_the_k_most_likely() -> None:
    counts = draw_many(LOGITS, SamplingParams(temperature=1.0, top_k=3, seed=2))
    assert_drawn_from(counts, filtered(LOGITS, temperature=1.0, keep=[3, 6, 0]))


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
        counts = draw_many(logits, SamplingParams(temperature=1.0, top_p=top_p, seed=3), 2000)
        if len(keep) == 1:
            assert set(counts) == set(keep)
        else:
            assert_drawn_from(counts, filtered(logits, temperature=1.0, keep=keep))


def test_top_p_counts_mass_within_top_k_after_temperature() -> None:
    # After temperature 2 and top-k 3 the masses are 3/6, 2/6, 1/6, so two reach 0.75; of all tokens they would not.
    logits = 2 * torch.tensor([1.0, 3.0, 2.0, 0.5, 0.5]).log()
    counts = draw_many(logits, SamplingParams(temperature=2.0, top_k=3, top_p=0.75, seed=4))
    assert_drawn_from(counts, filtered(logits, temperature=2.0, keep=[1, 2]))


def test_a_huge_top_k_is_no_limit() -> None:
    wide, open_ = (SamplingParams(temperature=1.0, top_k=k, seed=5) for k in (2**31, 0))
    assert draw_many(LOGITS, wide, 200) == draw_many(LOGITS, open_, 200)


def test_temperature_zero_is_argmax_whatever_the_seed() -> None:
    logits = torch.randn(6, 101)
    params = [SamplingParams(seed=seed, top_k=5, top_p=0.5) for seed in range(6)]
    assert [token.token_id for token in sample(logits, params, range(6))] == logits.argmax(-1).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tiny_temperature_is_argmax_and_no_nan(dtype: torch.dtype) -> None:
    params = SamplingParams(temperature=1e-30, seed=1)
    assert set(draw_many(1e4 * LOGITS.to(dtype), params, 50)) == {3}


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**64 - 1),
    index=st.integers(0, 2**20),
    num_mates=st.integers(0, 4),
    temperature=st.floats(0.1, 3),
    top_k=st.integers(0, 60),
    top_p=st.floats(0.05, 1),
)
def test_a_draw_depends_on_seed_and_index_not_on_the_batch(
    seed: int, index: int, num_mates: int, temperature: float, top_k: int, top_p: float
) -> None:
    generator = torch.Generator().manual_seed(index)
    logits = torch.randn(num_mates + 1, 50, generator=generator)
    chosen = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, logprobs=2)
    mates = [SamplingParams(temperature=1.0, seed=mate) for mate in range(num_mates)]
    alone = sample(logits[-1:], [chosen], [index])
    assert sample(logits, [*mates, chosen], [*range(num_mates), index])[-1:] == alone


def test_seeds_and_indices_give_different_draws() -> None:
    draws = {uniform(seed, index) for seed in range(50) for index in range(50)}
    assert len(draws) == 2500
    assert all(0 <= draw < 1 for draw in draws)


def test_uniform_is_splitmix64() -> None:
    """First outputs of the published generator from state 0."""
    from workers.sampling import _mix

    assert [_mix(i * 0x9E3779B97F4A7C15 & (2**64 - 1)) for i in range(3)] == [
        0xE220A8397B1DCDAF,
        0x6E789E6AA1B965F4,
        0x06C45D188009454F,
    ]


def test_draws_of_neighbouring_seeds_do_not_correlate() -> None:
    draws = torch.tensor([[uniform(seed, index) for index in range(2000)] for seed in range(4)])
    assert (torch.corrcoef(draws) - torch.eye(4)).abs().max() < 0.08
    assert torch.corrcoef(torch.stack((draws[0, 1:], draws[0, :-1])))[0, 1].abs() < 0.08


@pytest.mark.parametrize("draw", [0.0, 1 - 2.0**-53])
def test_extreme_draws_never_pick_an_impossible_token(draw: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.sampling.uniform", lambda seed, index: draw)
    logits = torch.tensor([-math.inf, 0.0, 0.1, 0.2, -math.inf])
    (token,) = sample(logits[None], [SamplingParams(temperature=1.0)], [0])
    assert token.token_id == (1 if draw == 0 else 3)


def test_logprobs_are_of_the_raw_logits() -> None:
    params = SamplingParams(temperature=0.3, top_k=2, seed=9, logprobs=3)
    (token,) = sample(LOGITS[None].bfloat16(), [params], [4])
    expected = LOGITS.bfloat16().float().log_softmax(0)
    assert token.token_id in (3, 6)
    assert token.logprob == pytest.approx(float(expected[token.token_id]), abs=1e-6)
    assert [token_id for token_id, _ in token.top] == [3, 6, 0]
    assert [logprob for _, logprob in token.top] == pytest.approx(expected[[3, 6, 0]].tolist(), abs=1e-6)


def test_zero_logprobs_report_the_chosen_token_alone() -> None:
    (token,) = sample(LOGITS[None], [SamplingParams(logprobs=0)], [0])
    assert token.logprob is not None
    assert token.top == ()


def test_no_logprobs_unless_asked_for() -> None:
    assert sample(LOGITS[None], [SamplingParams()], [0]) == [SampledToken(token_id=3)]


def test_no_rows_give_no_tokens() -> None:
    assert sample(torch.empty(0, 10), [], []) == []


@pytest.mark.parametrize(
    "bad", [{"temperature": -1.0}, {"temperature": math.nan}, {"top_k": -1}, {"top_p": 0.0}, {"logprobs": -1}]
)
def test_impossible_params_are_caught(bad: dict[str, float]) -> None:
    with pytest.raises(AssertionError):
        SamplingParams(**bad)  # type: ignore[arg-type]
