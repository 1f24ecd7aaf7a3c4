"""The compiled kernel against the reference, and what its bits and its memory do not depend on."""

import itertools
import random
import tracemalloc
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import reference
from kernels.attention import LayerCache, Run, SequenceSpan
from kernels.cpu.attention import lanes, paged, simd, simd_tile
from kernels.cpu.attention.tasks import plan_tasks
from kernels.cpu.machine import numba_code, threads

TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 1e-2}
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])


@pytest.fixture(autouse=True)
def _keep_the_number_of_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def scatter(num_tokens: int, num_cuts: int, rng: random.Random, first_slot: int = 0) -> tuple[Run, ...]:
    """Runs of ``num_tokens`` slots together, cut at random, in random order, with gaps between."""
    cuts = rng.sample(range(1, num_tokens), min(num_cuts, num_tokens - 1))
    pieces = list(itertools.pairwise(sorted({0, num_tokens, *cuts})))
    rng.shuffle(pieces)
    runs, free = {}, first_slot
    for start, stop in pieces:
        free += rng.randint(0, 3)
        runs[start] = (free, free + stop - start)
        free += stop - start
    return tuple(runs[start] for start in sorted(runs))


def slots_of(runs: tuple[Run, ...]) -> list[int]:
    return [slot for run in runs for slot in range(*run)]


class Decodes:
    """Sequences of given lengths, with random queries and KV kept by token: [K, L, D] each."""

    def __init__(
        self, lengths: list[int], *, num_kv_heads: int, group: int, head_dim: int, dtype: torch.dtype, seed: int
    ) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(dtype)

        self.lengths, self.scale = lengths, head_dim**-0.5
        self.queries = [normal(num_kv_heads * group, head_dim) for _ in lengths]
        self.kv = [(normal(num_kv_heads, n, head_dim), normal(num_kv_heads, n, head_dim)) for n in lengths]

    def lay(
        self, rng: random.Random, chosen: list[int] | None = None, num_cuts: int = 20
    ) -> tuple[Tensor, LayerCache, list[SequenceSpan]]:
        """Queries, cache and spans of the chosen sequences, or all, wherever ``rng`` puts them."""
        chosen = list(range(len(self.lengths))) if chosen is None else chosen
        spans, free = [], 0
        for row, index in enumerate(chosen):
            runs = scatter(self.lengths[index], rng.randint(0, num_cuts), rng, free)
            free = max(stop for _, stop in runs)
            spans.append(SequenceSpan(query_start=row, num_queries=1, runs=runs))
        num_kv_heads, _, head_dim = self.kv[0][0].shape
        empty = torch.full((2, num_kv_heads, free, head_dim), 7.0, dtype=self.queries[0].dtype)
        cache = LayerCache(keys=empty[0], values=empty[1])
        for index, span in zip(chosen, spans, strict=True):
            cache.keys[:, slots_of(span.runs)], cache.values[:, slots_of(span.runs)] = self.kv[index]
        return torch.stack([self.queries[index] for index in chosen]), cache, spans

    def attend(self, rng: random.Random, chosen: list[int] | None = None, num_cuts: int = 20) -> Tensor:
        query, cache, spans = self.lay(rng, chosen, num_cuts)
        return run(query, cache, spans, self.scale)


def run(query: Tensor, cache: LayerCache, spans: list[SequenceSpan], scale: float) -> Tensor:
    output = torch.full(query.shape, torch.nan, dtype=query.dtype)
    paged.attend(query, cache, plan_tasks(spans, None, ()), scale, output)
    return output


def by_reference(query: Tensor, cache: LayerCache, spans: list[SequenceSpan], scale: float) -> Tensor:
    return reference.attention(query, query, query, cache, reference.plan(spans), scale)


@pytest.mark.every_target
@settings(deadline=None, max_examples=120)
@given(
    lengths=st.lists(st.integers(1, 600), min_size=1, max_size=4),
    num_kv_heads=st.integers(1, 5),
    group=st.integers(1, 8),
    head_dim=st.sampled_from([16, 32, 64, 80, 128]),
    dtype=DTYPES,
    seed=st.integers(0, 2**20),
)
def test_decodes_agree_with_the_reference(
    lengths: list[int], num_kv_heads: int, group: int, head_dim: int, dtype: torch.dtype, seed: int
) -> None:
    decodes = Decodes(lengths, num_kv_heads=num_kv_heads, group=group, head_dim=head_dim, dtype=dtype, seed=seed)
    laid = decodes.lay(random.Random(seed))
    got, expected = run(*laid, decodes.scale), by_reference(*laid, decodes.scale)
    torch.testing.assert_close(got, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 900), min_size=2, max_size=5),
    group=st.sampled_from([1, 2, 4, 7]),
    head_dim=st.sampled_from([32, 80]),
    dtype=DTYPES,
    seed=st.integers(0, 2**20),
)
def test_bits_depend_on_the_sequence_alone(
    lengths: list[int], group: int, head_dim: int, dtype: torch.dtype, seed: int
) -> None:
    """Not on where its blocks lie, nor on its batch, nor on the number of threads: what exact resumption needs."""
    decodes = Decodes(lengths, num_kv_heads=2, group=group, head_dim=head_dim, dtype=dtype, seed=seed)
    rng = random.Random(seed)
    torch.set_num_threads(1)
    alone = torch.cat([decodes.attend(rng, [index], num_cuts=0) for index in range(len(lengths))])
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        order = rng.sample(range(len(lengths)), len(lengths))
        assert torch.equal(decodes.attend(rng, order), alone[order])


def test_many_threads_at_once_lose_no_tile() -> None:
    """Tiles far more than threads, again and again: a lost or early merge would leave a NaN or stale sums."""
    decodes = Decodes([1500, 1, 2100, 700], num_kv_heads=3, group=4, head_dim=32, dtype=torch.float32, seed=5)
    laid = decodes.lay(random.Random(5))
    torch.set_num_threads(1)
    expected = run(*laid, decodes.scale)
    torch.set_num_threads(4)
    assert all(torch.equal(run(*laid, decodes.scale), expected) for _ in range(200))


def test_it_runs_on_this_thread_alone_where_torch_has_no_openmp(monkeypatch: pytest.MonkeyPatch) -> None:
    decodes = Decodes([600, 30], num_kv_heads=2, group=3, head_dim=16, dtype=torch.bfloat16, seed=2)
    laid = decodes.lay(random.Random(2))
    torch.set_num_threads(2)
    expected = run(*laid, decodes.scale)
    monkeypatch.setattr(threads, "_openmp_parallel", lambda: None)
    assert torch.equal(run(*laid, decodes.scale), expected)


def test_only_planned_rows_are_written() -> None:
    decodes = Decodes([40, 50, 60], num_kv_heads=2, group=2, head_dim=16, dtype=torch.float32, seed=1)
    query, cache, spans = decodes.lay(random.Random(1))
    output = run(query, cache, [spans[2], spans[0]], decodes.scale)
    assert output[1].isnan().all()
    torch.testing.assert_close(output[[0, 2]], by_reference(query, cache, spans, decodes.scale)[[0, 2]])


@pytest.mark.every_target
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("peak", [-1e4, 1e4])
def test_scores_of_ten_thousand_neither_overflow_nor_vanish(dtype: torch.dtype, peak: float) -> None:
    decodes = Decodes([700], num_kv_heads=1, group=2, head_dim=16, dtype=dtype, seed=3)
    query, cache, spans = decodes.lay(random.Random(3))
    cache.keys.normal_(std=0.1, generator=torch.Generator().manual_seed(3))
    query[:], cache.keys[..., 0] = 0.0, peak
    query[..., 0] = 1.0
    query[..., 1] = 8.0
    got, expected = run(query, cache, spans, 1.0), by_reference(query, cache, spans, 1.0)
    torch.testing.assert_close(got, expected, atol=TOLERANCE[dtype] * 1e3, rtol=0)
    # One token far above the rest takes all the weight, whichever tile it is in.
    best = slots_of(spans[0].runs)[5]
    cache.keys[:, best, 0] = peak + 4096
    assert torch.equal(run(query, cache, spans, 1.0)[0], cache.values[:, best].expand(2, -1))


@pytest.mark.every_target
def test_a_nan_comes_out_as_a_nan() -> None:
    """Not as a number that looks healthy: rounding a NaN's bits to bfloat16 could carry into the sign."""
    for dtype in TOLERANCE:
        decodes = Decodes([20], num_kv_heads=1, group=1, head_dim=16, dtype=dtype, seed=0)
        query, cache, spans = decodes.lay(random.Random(0))
        cache.values[0, slots_of(spans[0].runs)[3], 4] = torch.nan
        assert run(query, cache, spans, 1.0).isnan().flatten().tolist() == [d == 4 for d in range(16)]


def test_memory_does_not_grow_by_the_context() -> None:
    """A thread's buffers depend on the CPU's vectors; what a longer context adds is a row of sums for each part."""
    torch.set_num_threads(1)
    num_tokens = 20_000
    short, long = allocated_bytes(num_tokens), allocated_bytes(2 * num_tokens)
    context_bytes = 2 * num_tokens * 2 * 64 * 2
    assert short > 0
    assert long - short < context_bytes / 50


def test_a_plan_knows_runs_and_not_tokens() -> None:
    _, _, spans = long_decode(20_000)
    plan_tasks(spans, None, ())
    tracemalloc.start()
    plan = plan_tasks(spans, None, ())
    numpy_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert numpy_bytes < 200 * len(spans[0].runs)
    assert plan.runs.nbytes == 16 * len(spans[0].runs)


def long_decode(num_tokens: int) -> tuple[torch.Tensor, LayerCache, list[SequenceSpan]]:
    decodes = Decodes([num_tokens], num_kv_heads=2, group=1, head_dim=64, dtype=torch.bfloat16, seed=0)
    return decodes.lay(random.Random(0), num_cuts=1000)


def allocated_bytes(num_tokens: int) -> int:
    """What attention of one decode over ``num_tokens`` tokens allocates through torch."""
    query, cache, spans = long_decode(num_tokens)
    sizes = []

    class Allocations(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            sizes.append(out.nbytes)
            return out

    plan, output = plan_tasks(spans, None, ()), torch.empty_like(query)
    with Allocations():
        paged.attend(query, cache, plan, 1.0, output)
    return sum(sizes)


@pytest.mark.every_target
def test_exp2_is_within_two_units_in_the_last_place() -> None:
    rng = np.random.default_rng(0)
    edges = [0.0, -0.5, -1.0, -126.0, 126.5, np.nextafter(np.float32(-0.5), np.float32(0.0))]
    x = np.concatenate([rng.uniform(-126, 126, 20_000), rng.uniform(-1, 0, 20_000), edges]).astype(np.float32)
    got = np.array([simd_tile.exp2(one) for one in x], np.float32)
    exact = np.exp2(x.astype(np.float64))
    assert np.max(np.abs(got - exact) / np.spacing(exact.astype(np.float32))) <= 2
    assert simd_tile.exp2(np.float32(0.0)) == 1.0
    assert (
        simd_tile.exp2(np.float32(-127.0))
        == simd_tile.exp2(np.float32(-1e30))
        == simd_tile.exp2(np.float32(-np.inf))
        == 0.0
    )


@pytest.mark.every_target
def test_heads_that_are_no_whole_vectors_are_left_to_others() -> None:
    def cache(head_dim: int, dtype: torch.dtype = torch.float32) -> LayerCache:
        return LayerCache(
            keys=torch.zeros(1, 4, head_dim, dtype=dtype), values=torch.zeros(1, 4, head_dim, dtype=dtype)
        )

    assert paged.supports(cache(64)) and paged.supports(cache(80, torch.bfloat16))
    assert not paged.supports(cache(102)) and not paged.supports(cache(64, torch.float16))


def test_code_is_compiled_even_where_nothing_can_be_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    class Callback:
        address = 4711

    def no_place_to_write(signature: object, cache: bool = False) -> object:
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return lambda work: Callback()

    monkeypatch.setattr(numba_code, "cfunc", no_place_to_write)
    assert simd.compiled(lanes.FLOAT32) == 4711


def test_bfloat16_agrees_where_it_cannot_be_multiplied_in_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    decodes = Decodes([600, 30], num_kv_heads=2, group=8, head_dim=64, dtype=torch.bfloat16, seed=2)
    laid = decodes.lay(random.Random(2))
    monkeypatch.setattr(paged, "HAS_PAIRS", False)
    got, expected = run(*laid, decodes.scale), by_reference(*laid, decodes.scale)
    torch.testing.assert_close(got, expected, atol=TOLERANCE[torch.bfloat16], rtol=TOLERANCE[torch.bfloat16])
