"""Paged attention in Triton: decodes, chunks, windows, and partial results, against the reference in float32."""

from dataclasses import replace

import pytest
import torch

from kernels import reference
from kernels.attention import LayerCache, SequenceSpan
from tests.support.triton.triton_cases import (
    ATTENTION_TOLERANCE,
    DEVICE,
    DTYPES,
    REASON,
    RUNS_HERE,
    AttentionCase,
    attention_case,
    normal,
)

if not RUNS_HERE:
    pytest.skip(REASON, allow_module_level=True)

from kernels.cuda.attention import MERGED_AT_ONCE
from kernels.cuda.attention_kernels import merge_kernel
from kernels.cuda.plan import PART
from kernels.cuda.variant import open_kernels

KERNELS = open_kernels(DEVICE)
TYPES = pytest.mark.parametrize("dtype", DTYPES, ids=str)
# Lengths about the edges of tiles, parts and tasks; sequences of one token; chunks with and without a context.
DECODES = [(0, 1), (1, 1), (62, 1), (63, 1), (PART - 1, 1), (PART, 1), (2 * PART + 9, 1)]
CHUNKS = [(0, 2), (5, 70), (0, 130), (200, 3)]


def agrees(case: AttentionCase, window: int | None = None, *, times: float = 1.0) -> None:
    tolerance = times * ATTENTION_TOLERANCE[case.query.dtype]
    found = case.attend(KERNELS, window)
    assert found.shape == case.query.shape and found.dtype == case.query.dtype
    torch.testing.assert_close(found, case.expected(window), atol=tolerance, rtol=tolerance)


@TYPES
@pytest.mark.parametrize("lengths", [DECODES, [*DECODES[:2], *CHUNKS, DECODES[-1]]], ids=len)
def test_attention_agrees(dtype: torch.dtype, lengths: list[tuple[int, int]]) -> None:
    agrees(attention_case(lengths, dtype=dtype))


@TYPES
@pytest.mark.parametrize("window", [1, 63, 100])
def test_attention_in_a_window_agrees(dtype: torch.dtype, window: int) -> None:
    agrees(attention_case([(40, 1), (600, 1), (3, 80), (200, 40)], dtype=dtype), window)


@TYPES
@pytest.mark.parametrize("group", [1, 5, 17])
def test_attention_of_any_group_agrees(dtype: torch.dtype, group: int) -> None:
    agrees(attention_case([(300, 1), (20, 40)], group=group, dtype=dtype))


@TYPES
@pytest.mark.parametrize("head_dim", [10, 48, 256])
def test_attention_of_any_head_dimension_agrees(dtype: torch.dtype, head_dim: int) -> None:
    agrees(attention_case([(300, 1), (20, 40)], head_dim=head_dim, num_kv_heads=1, dtype=dtype))


def test_scores_far_apart_do_not_overflow() -> None:
    case = attention_case([(600, 1), (9, 70)])
    agrees(replace(case, query=60 * case.query), times=60)  # so much is a score's rounding worth


def test_a_decode_has_the_same_bits_in_every_batch_and_wherever_its_blocks_lie() -> None:
    case = attention_case([(700, 1), (3, 1), (80, 40)], dtype=torch.bfloat16)
    alone = replace(case, query=case.query[:1], spans=case.spans[:1])
    slots = [slot for run in case.spans[0].runs for slot in range(*run)]
    dense = LayerCache(keys=case.cache.keys[:, slots], values=case.cache.values[:, slots])
    elsewhere = replace(alone, cache=dense, spans=(SequenceSpan(query_start=0, num_queries=1, runs=((0, 701),)),))
    found = case.attend(KERNELS)[:1]
    assert torch.equal(alone.attend(KERNELS), found)
    assert torch.equal(elsewhere.attend(KERNELS), found)


def test_partial_results_are_merged_as_the_reference_merges_them() -> None:
    num_heads, head_dim, parts = 3, 24, [2, 2 * MERGED_AT_ONCE + 3, 5]
    first = [0, 2, sum(parts[:2])]
    rows = [4, 0, 2]
    partials = normal(sum(parts), num_heads, head_dim, dtype=torch.float32)
    masses = 30 * normal(sum(parts), num_heads, dtype=torch.float32, seed=1)
    merges = torch.tensor([(r, f, n, 0) for r, f, n in zip(rows, first, parts, strict=True)], dtype=torch.int32)
    output = torch.full((6, num_heads, head_dim), 7.0, device=DEVICE)
    counts = torch.tensor([0, 2, 0, 0], dtype=torch.int32, device=DEVICE)  # the third is not in use
    merge_kernel[(3, num_heads)](counts, merges.to(DEVICE), partials, masses, output, head_dim, 32, MERGED_AT_ONCE)
    for row, start, count in zip(rows[:2], first, parts, strict=False):
        some = slice(start, start + count)
        expected, _ = reference.merge_partials([*partials[some]], [*(masses[some] * torch.tensor(2.0).log())])
        torch.testing.assert_close(output[row], expected, atol=1e-5, rtol=1e-5)
    assert (output[[1, 2, 3, 5]] == 7.0).all()
