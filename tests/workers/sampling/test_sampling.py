import math
from collections import Counter
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor

from placement.errors import HeterodyneError
from workers.sampling import sampling
from workers.sampling.sampling import SampledToken, SamplerState, SamplingFailed, SamplingParams, sample, uniform

NUM_DRAWS = 8000
LOGITS = torch.tensor([1.0, 0.3, -0.5, 2.0, 0.0, -3.0, 1.5, 0.9, -1.0, 0.2])


class OnlyIds:
    """A mask that allows the same tokens always, and notes what it is told."""

    done = False

    def __init__(self, *allowed: int) -> None:
        self.allowed = allowed
        self.accepted: list[int] = []

    def fill(self, row: Tensor) -> bool:
        row[0] = sum(1 << token_id for token_id in self.allowed)
        return True

    def accept(self, token_id: int) -> None:
        self.accepted.append(token_id)


def next_token(logits: Tensor, state: SamplerState) -> SampledToken:
    (result,) = sample(logits[None], [state])
    assert isinstance(result, SampledToken), result
    return result


def drawn_with(logits: Tensor, params: Iterable[SamplingParams]) -> list[int]:
    """One token for each of many parameters, of the same logits."""
    states = [SamplerState(each, ()) for each in params]
    results = sample(logits.expand(len(states), -1), states)
    return [result.token_id for result in results if isinstance(result, SampledToken)]


def draw_many(logits: Tensor, num_draws: int = NUM_DRAWS, **params: float) -> Counter[int]:
    return Counter(drawn_with(logits, (SamplingParams(seed=i, **params) for i in range(num_draws))))  # type: ignore[arg-type]


def assert_drawn_from(counts: Counter[int], expected: Tensor) -> None:
    """Pearson's chi-square below its 99.99 % point (Wilson and Hilferty 1931); the seeds fix the draws."""
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
    """First outputs of the published generator from state 0."""
    assert [sampling._mix(i * 0x9E3779B97F4A7C15 & (2**64 - 1)) for i in range(3)] == [
        0xE220A8397B1DCDAF,
        0x6E789E6AA1B965F4,
        0x06C45D188009454F,
    ]


def test_draws_of_neighbouring_seeds_do_not_correlate() -> None:
    draws = torch.tensor([[uniform(seed, index) for index in range(2000)] for seed in range(4)])
    assert (torch.corrcoef(draws) - torch.eye(4)).abs().max() < 0.08
    assert torch.corrcoef(torch.stack((draws[0, 1:], draws[0, :-1])))[0, 1].abs() < 0.08


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


# ---- failures ----

WAYS = (
    {},
    {"temperature": 1.0},
    {"temperature": 1.0, "top_k": 3},
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 1.0, "top_k": 1000, "top_p": 0.9, "min_p": 0.1},
    {"repetition_penalty": 1.1},
    {"bias": ((7, -5.0),)},
    {"logprobs": 3},
)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("size", [10, 4096, 10_000])
def test_damaged_logits_fail_their_own_sequence(bad: float, size: int) -> None:
    logits = torch.randn(2 * len(WAYS), size, generator=torch.Generator().manual_seed(3))
    healthy = sample(logits, [SamplerState(SamplingParams(**way), (1,)) for way in WAYS * 2])  # type: ignore[arg-type]
    logits[: len(WAYS), 7] = bad
    states = [SamplerState(SamplingParams(**way), (1,)) for way in WAYS * 2]  # type: ignore[arg-type]
    results = sample(logits, states)
    for row, (result, state) in enumerate(zip(results[: len(WAYS)], states, strict=False)):
        assert isinstance(result, SamplingFailed)
        assert isinstance(result, HeterodyneError)
        assert result.row == row and f"logits[{row}]" in str(result)
        assert state.num_tokens == 0 and state.last_token_id is None
    assert results[len(WAYS) :] == healthy[len(WAYS) :]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_damaged_row_fails_even_where_the_damage_is_masked(temperature: float) -> None:
    logits = LOGITS.clone()
    logits[9] = math.nan
    mask = OnlyIds(1, 2)
    (result,) = sample(logits[None], [SamplerState(SamplingParams(temperature=temperature), (), grammar=mask)])
    assert isinstance(result, SamplingFailed)
    assert mask.accepted == []


@pytest.mark.parametrize("way", WAYS)
def test_a_row_that_allows_nothing_fails_its_own_sequence(way: dict[str, float]) -> None:
    nothing = torch.full((10,), -math.inf)
    params = SamplingParams(**way)  # type: ignore[arg-type]
    states = [
        SamplerState(params, ()),
        SamplerState(params, (), grammar=OnlyIds()),
        SamplerState(params, (), grammar=OnlyIds(2), stop_token_ids=frozenset({2}), min_tokens=1),
        SamplerState(params, (), grammar=OnlyIds(2)),
    ]
    *failed, token = sample(torch.stack((nothing, LOGITS, LOGITS, LOGITS)), states)
    assert all(isinstance(failure, SamplingFailed) and "allow no token" in str(failure) for failure in failed)
    assert isinstance(token, SampledToken) and token.token_id == 2


class Broken(OnlyIds):
    """A mask that gives up, at once or at the first token."""

    def __init__(self, *, at_once: bool) -> None:
        super().__init__(1)
        self.at_once = at_once

    def fill(self, row: Tensor) -> bool:
        if self.at_once:
            raise HeterodyneError("the grammar is too deep")
        return super().fill(row)

    def accept(self, token_id: int) -> None:
        raise HeterodyneError("the grammar is too deep")


@pytest.mark.parametrize("at_once", [True, False])
def test_a_mask_that_raises_fails_its_own_sequence(at_once: bool) -> None:
    state = SamplerState(SamplingParams(frequency_penalty=1.0), (), grammar=Broken(at_once=at_once))
    failure, token = sample(LOGITS.expand(2, -1), [state, SamplerState(SamplingParams(), ())])
    assert isinstance(failure, SamplingFailed) and "too deep" in str(failure)
    assert (state.num_tokens, state.last_token_id) == (0, None)
    assert token == SampledToken(token_id=3)


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
