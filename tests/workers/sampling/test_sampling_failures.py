"""Checks that a sequence whose logits or mask give no token fails alone, while the others of its batch get theirs."""

import math

import pytest
import torch
from torch import Tensor

from placement.errors import HeterodyneError
from tests.support.sampling import LOGITS, OnlyIds
from workers.sampling.sampling import SampledToken, SamplerState, SamplingFailed, SamplingParams, sample

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
        assert result.grammar_problem is None
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
    assert [failure.grammar_problem for failure in failed if isinstance(failure, SamplingFailed)] == [
        None, "the grammar allows no token of this model", "the grammar ends the answer before it has min_tokens",
    ]  # fmt: skip
    assert isinstance(token, SampledToken) and token.token_id == 2


class Broken(OnlyIds):
    """A mask that raises, at once or at the first token."""

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
    assert failure.grammar_problem == "the grammar is too deep"
    assert (state.num_tokens, state.last_token_id) == (0, None)
    assert token == SampledToken(token_id=3)
