"""Attention over parts of what queries see, in Triton, against the reference in float32."""

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels import reference
from kernels.attention import LayerCache, PartSpan
from tests.support.triton.triton_cases import ATTENTION_TOLERANCE, DEVICE, DTYPES, REASON, RUNS_HERE, normal

if not RUNS_HERE:
    pytest.skip(REASON, allow_module_level=True)

from kernels.cuda.parts_plan import num_segments
from kernels.cuda.plan import CHUNK, PART
from kernels.cuda.variant import open_kernels

KERNELS = open_kernels(DEVICE)
NUM_SLOTS = 1600


def case(dtype: torch.dtype, head_dim: int = 32, group: int = 3, num_rows: int = 200) -> tuple[Tensor, LayerCache]:
    """Queries [T, H, D] of a wider tensor, as the decoder makes them, and a cache of two KV heads."""
    query = normal(num_rows, 2 * group + 2, head_dim, dtype=dtype)[:, : 2 * group]
    keys, values = (normal(2, NUM_SLOTS, head_dim, dtype=dtype, seed=seed) for seed in (1, 2))
    return query, LayerCache(keys=keys, values=values)


def agrees(spans: list[PartSpan], query: Tensor, cache: LayerCache) -> None:
    found, mass = KERNELS.attend_parts(query, cache, KERNELS.plan_parts(spans), 0.2)
    wide = LayerCache(keys=cache.keys.float(), values=cache.values.float())
    expected, expected_mass = reference.attend_parts(query.float(), wide, reference.plan_parts(spans), 0.2)
    assert found.dtype == query.dtype and found.is_contiguous()
    tolerance = ATTENTION_TOLERANCE[query.dtype]
    torch.testing.assert_close(found.float(), expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(mass, expected_mass, atol=tolerance, rtol=tolerance)


def one(row: int, *runs: tuple[int, int], seen: tuple[int, int]) -> PartSpan:
    return PartSpan(query_start=row, runs=np.array(runs, np.int64).reshape(-1, 2), seen=np.array([seen], np.int64))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_single_queries_over_one_stretch_and_several(dtype: torch.dtype) -> None:
    spans = [
        one(0, (5, 6), seen=(0, 1)),
        one(2, (700, 740), (0, PART - 40), seen=(0, PART)),
        one(3, (0, NUM_SLOTS), seen=(PART + 3, 5 * PART + 7)),
    ]
    agrees(spans, *case(dtype, num_rows=6))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("head_dim", "group"), [(32, 3), (20, 1), (64, 4)])
def test_chunks_each_of_whose_queries_sees_more_than_the_one_before(
    dtype: torch.dtype, head_dim: int, group: int
) -> None:
    count = CHUNK + 9
    stops = np.arange(count) // 2 + 30
    chunk = PartSpan(query_start=8, runs=np.array([(900, 1000)]), seen=np.stack((stops // 3, stops), axis=1))
    small = PartSpan(query_start=2, runs=np.array([(3, 1100)]), seen=np.array([[0, 1090], [0, 1091], [7, 1092]]))
    agrees([small, chunk], *case(dtype, head_dim, group))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_queries_that_see_nothing_weigh_nothing(dtype: torch.dtype) -> None:
    seen = np.stack((np.arange(50) * 3, np.arange(50) * 3 + np.repeat([0, 2], 25)), axis=1)
    spans = [PartSpan(query_start=0, runs=np.array([(100, 300)]), seen=seen), one(60, (0, 9), seen=(0, 0))]
    query, cache = case(dtype)
    agrees(spans, query, cache)
    output, mass = KERNELS.attend_parts(query, cache, KERNELS.plan_parts([]), 0.2)
    assert not output.any() and (mass == -torch.inf).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_a_single_query_is_given_does_not_depend_on_the_chunk_beside_it(dtype: torch.dtype) -> None:
    query, cache = case(dtype)
    single = one(0, (0, NUM_SLOTS), seen=(3, 900))
    chunk = PartSpan(query_start=5, runs=np.array([(3, 1100)]), seen=np.array([[0, 1090], [0, 1091], [7, 1092]]))
    alone, beside = (
        KERNELS.attend_parts(query, cache, KERNELS.plan_parts(s), 0.2) for s in ([single], [single, chunk])
    )
    assert torch.equal(alone[0][0], beside[0][0]) and torch.equal(alone[1][0], beside[1][0])


def test_of_more_queries_stretches_are_longer() -> None:
    assert num_segments(1, 4 * PART) == 4
    assert num_segments(2, 4 * PART + 1) == 3
    assert num_segments(CHUNK, 1 << 20) == num_segments(CHUNK // 2, 1 << 20) == 1
    assert num_segments(1, 0) == 0
