"""Checks that rows are sampled as if each were alone, bit for bit, and that the sums behind it are exact."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from workers.sampling.draw import scale, weights
from workers.sampling.rows import copy_rows, first, highest, in_parts
from workers.sampling.sampling import SampledToken, SamplerState, SamplingFailed, SamplingParams, sample
from workers.sampling.search import prefix

PARAMS = (
    SamplingParams(logprobs=4),
    SamplingParams(repetition_penalty=1.3),
    SamplingParams(temperature=1.0, logprobs=0),
    SamplingParams(temperature=0.7, min_p=0.02),
    SamplingParams(temperature=1.3, top_k=20, top_p=0.8, logprobs=7),
    SamplingParams(temperature=0.8, top_p=0.9),
    SamplingParams(temperature=2.0, top_p=0.95, min_p=0.001),
    SamplingParams(temperature=1.0, top_k=700, top_p=0.99, frequency_penalty=0.1),
    SamplingParams(temperature=1.0, bias=((3, 4.0), (5, -4.0)), presence_penalty=0.3),
)


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def states_of(rows: range) -> list[SamplerState]:
    """Makes different states for neighbouring rows, and the same for the same row."""
    return [
        SamplerState(
            PARAMS[row % len(PARAMS)],
            [row, 2 * row],
            emitted_ids=[row] * (row % 3),
            stop_token_ids=frozenset({row, 1}),
            min_tokens=row % 4,
        )
        for row in rows
    ]


def sampled(logits: Tensor, rows: range) -> list[SampledToken | SamplingFailed]:
    return sample(logits[list(rows)], states_of(rows))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [100, 257, 1000, 4096, 9999, 32_000])
def test_a_row_is_sampled_the_same_in_any_batch(size: int, dtype: torch.dtype, threads: int) -> None:
    spread = torch.tensor([0.3, 1.0, 5.0])[torch.arange(70) % 3, None]
    logits = (torch.randn(70, size, generator=torch.Generator().manual_seed(size)) * spread).to(dtype)
    alone = [sampled(logits, range(row, row + 1))[0] for row in range(70)]
    assert all(isinstance(token, SampledToken) for token in alone)
    assert sampled(logits, range(70)) == alone
    assert sampled(logits, range(69, 0, -2)) == alone[69:0:-2]
    for start, stop in ((0, 2), (1, 4), (30, 38), (7, 69)):
        assert sampled(logits, range(start, stop)) == alone[start:stop]


def test_logits_need_not_be_contiguous() -> None:
    logits = torch.randn(40, 12_000, generator=torch.Generator().manual_seed(6))
    wide = torch.zeros(40, 3, 12_100)
    wide[:, 1, 50:12_050] = logits
    states = states_of(range(40))
    assert sample(wide[:, 1, 50:12_050], states) == sampled(logits, range(40))


def test_threads_do_not_change_what_is_sampled() -> None:
    logits = torch.randn(40, 20_001, generator=torch.Generator().manual_seed(8))
    before, results = torch.get_num_threads(), []
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        results.append(sampled(logits, range(40)))
    torch.set_num_threads(before)
    assert results[0] == results[1] == results[2]


def test_a_large_vocabulary_is_sampled_the_same_in_any_batch(threads: int) -> None:
    logits = 2 * torch.randn(9, 128_256, generator=torch.Generator().manual_seed(9))
    alone = [sampled(logits, range(row, row + 1))[0] for row in range(9)]
    assert sampled(logits, range(9)) == alone


@settings(deadline=None, max_examples=60)
@given(size=st.integers(1, 700), num_rows=st.integers(2, 40), seed=st.integers(0, 2**32))
def test_a_row_of_any_size_is_sampled_the_same_in_any_batch(size: int, num_rows: int, seed: int) -> None:
    logits = torch.randn(num_rows, size + num_rows * 2, generator=torch.Generator().manual_seed(seed))
    row = seed % num_rows
    assert sampled(logits, range(num_rows))[row] == sampled(logits, range(row, row + 1))[0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device here")
@pytest.mark.parametrize("size", [257, 9999, 32_000, 128_256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_sampled_the_same_in_any_batch_on_a_gpu(size: int, dtype: torch.dtype) -> None:
    logits = torch.randn(36, size, generator=torch.Generator().manual_seed(size)).to("cuda", dtype)
    alone = [sampled(logits, range(row, row + 1))[0] for row in range(36)]
    assert all(isinstance(token, SampledToken) for token in alone)
    assert sampled(logits, range(36)) == alone
    assert sampled(logits, range(5, 20)) == alone[5:20]
    # Exponentials may differ from a CPU's by a rounding, which seldom moves a draw and never a greedy token.
    here = sampled(logits.cpu(), range(36))
    same = [one.token_id == other.token_id for one, other in zip(alone, here, strict=True)]  # type: ignore[union-attr]
    assert sum(same) >= 34 and all(same[:: len(PARAMS)])


def test_exp_gives_the_same_bits_wherever_a_number_lies(threads: int) -> None:
    """Everything else relies on this, since no other operation on whole rows is inexact."""
    values = -16 * torch.rand(3000, generator=torch.Generator().manual_seed(4))
    alone = torch.cat([value.exp() for value in values.split(1)])
    for offset in range(17):
        for size in (*range(1, 40), 255, 1000, 3000 - offset):
            part = values[offset : offset + size].clone()
            assert torch.equal(part.exp(), alone[offset : offset + size])
    assert torch.equal(values.repeat(100).exp(), alone.repeat(100))


@pytest.mark.parametrize("size", [256, 32_000, 128_256, 262_144])
def test_sums_of_weights_are_exact_in_any_order(size: int) -> None:
    """There are at most V whole weights of at most the scale each, so float64 holds their sum exactly."""
    quanta = scale(size)
    assert size * quanta <= 2**53
    found = weights(-5 * torch.rand(size), quanta)
    assert torch.equal(found, found.round())
    exact = sum(int(weight) for weight in found.tolist())
    assert int(found.sum(dtype=torch.float64)) == int(found.flip(0).sum(dtype=torch.float64)) == exact
    assert int(torch.full((size,), quanta).sum(dtype=torch.float64)) == size * int(quanta)


@settings(deadline=None, max_examples=150)
@given(
    size=st.sampled_from([256, 1024, 4096]),
    k=st.integers(1, 80),
    levels=st.sampled_from([2, 10, 10**6]),
    allowed=st.sampled_from([0.001, 0.1, 1.0]),
    seed=st.integers(0, 2**32),
)
def test_the_first_tokens_are_those_of_a_stable_sort(size: int, k: int, levels: int, allowed: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    numbers = (rng.integers(-levels, levels, (3, size)) / np.float32(8)).astype(np.float32) * np.float32(-1.0)
    numbers[rng.random((3, size)) > allowed] = -np.inf
    values, ids = first(torch.from_numpy(numbers), k)
    order = np.argsort(-numbers, axis=1, kind="stable")[:, :k]
    assert np.array_equal(ids.numpy(), order)
    assert np.array_equal(values.numpy(), np.take_along_axis(numbers, order, axis=1))


@settings(deadline=None, max_examples=150)
@given(
    levels=st.sampled_from([2, 10, 10**6]),
    spread=st.sampled_from([1e-3, 1.0, 35.0]),
    share=st.sampled_from([1e-9, 0.01, 0.5, 0.9, 0.99999, 1.0, 2.0, float("inf")]),
    guess=st.sampled_from([0.0, 5.0, 80.0, float("inf"), float("-inf")]),
    by_count=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_a_prefix_ends_where_a_stable_sort_says(
    levels: int, spread: float, share: float, guess: float, by_count: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    numbers = (-rng.integers(0, levels, (2, 500)) / levels * spread).astype(np.float32)
    numbers[:, 3] = 0
    scaled = torch.from_numpy(numbers)
    measure = torch.ones_like(scaled) if by_count else weights(scaled, scale(500))
    target = measure.sum(-1, keepdim=True, dtype=torch.float64) * share
    kept = prefix(scaled, measure, target, torch.full((2, 1), guess))
    for row in range(2):
        order = np.argsort(-numbers[row], kind="stable")
        ordered = measure[row].double().numpy()[order]
        preceded = np.cumsum(ordered) - ordered < float(target[row])
        assert set(order[preceded]) == set(kept[row].nonzero().flatten().tolist())
        assert set(kept[row].unique().tolist()) <= {0.0, 1.0}


@settings(deadline=None, max_examples=60)
@given(size=st.sampled_from([1, 5, 48, 250, 256, 4096]), levels=st.sampled_from([1, 3, 10**6]), seed=st.integers(0, 99))
def test_the_highest_is_the_first_of_the_highest(size: int, levels: int, seed: int) -> None:
    numbers = np.random.default_rng(seed).integers(-levels, levels, (4, size)).astype(np.float32)
    for dtype in (torch.float32, torch.bfloat16):
        logits = torch.from_numpy(numbers).to(dtype)
        values, ids = highest(logits)
        assert np.array_equal(ids.numpy(), logits.float().numpy().argmax(1))
        assert torch.equal(values, logits.float().amax(1))


def test_a_nan_is_above_all() -> None:
    for size in (10, 512):
        logits = torch.randn(3, size)
        logits[1, 5] = torch.nan
        logits[1, 7] = torch.inf
        assert highest(logits)[0].isnan().tolist() == [False, True, False]


def test_parts_cover_all_rows_and_stay_small() -> None:
    logits = torch.empty(100, 32_000, dtype=torch.bfloat16)
    parts = list(in_parts(range(0, 100, 3), logits))
    assert [row for part in parts for row in part] == list(range(0, 100, 3))
    assert 1 < len(parts) < 10


@pytest.mark.parametrize("rows", [[4, 1], [0, 1, 2], [0, 4, 2], [3], [2, 2]])
def test_copied_rows_are_padded_with_what_cannot_be_drawn(rows: list[int]) -> None:
    logits = torch.randn(5, 300).bfloat16()
    copy = copy_rows(logits, rows)
    assert copy.shape == (len(rows), 512) and copy.dtype == torch.float32
    assert torch.equal(copy[:, :300], logits[rows].float())
    assert bool((copy[:, 300:] == -torch.inf).all())
