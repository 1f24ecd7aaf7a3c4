"""Data of attention, and the CPU variant against the reference."""

import itertools
import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function

from kernels import reference
from kernels.attention import LayerCache, Run, SequenceSpan, num_slots, split_runs
from kernels.cpu import variant as cpu
from kernels.protocol import Kernels

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}


@st.composite
def runs_and_cut(draw: st.DrawFn) -> tuple[tuple[Run, ...], int]:
    lengths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=6))
    runs = tuple((100 * i, 100 * i + length) for i, length in enumerate(lengths))
    return runs, draw(st.integers(0, sum(lengths)))


@given(runs_and_cut())
def test_split_runs_keeps_every_slot_in_order(case: tuple[tuple[Run, ...], int]) -> None:
    runs, num_first = case
    first, rest = ([slot for run in part for slot in range(*run)] for part in split_runs(runs, num_first))
    assert len(first) == num_first
    assert first + rest == [slot for run in runs for slot in range(*run)]


@pytest.mark.parametrize(
    ("num_queries", "runs"), [(0, ((0, 4),)), (5, ((0, 4),)), (1, ((4, 4),)), (1, ((4, 2),)), (1, ())]
)
def test_impossible_spans_are_caught(num_queries: int, runs: tuple[Run, ...]) -> None:
    with pytest.raises(AssertionError):
        SequenceSpan(query_start=0, num_queries=num_queries, runs=runs)


class Batch:
    """Random sequences whose tokens are scattered over a cache, every one already written."""

    def __init__(
        self,
        *,
        lengths: list[tuple[int, int]],
        num_kv_heads: int,
        group: int,
        head_dim: int,
        dtype: torch.dtype,
        seed: int,
    ) -> None:
        """``lengths``: context tokens and queries of each sequence."""
        rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        capacity = 4 * sum(map(sum, lengths)) + 8 * len(lengths)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(dtype)

        num_tokens = sum(queries for _, queries in lengths)
        # As the decoder makes them: query and keys are views of one tensor.
        turned = normal(num_tokens, (group + 1) * num_kv_heads, head_dim)
        self.query, self.keys = turned.split([group * num_kv_heads, num_kv_heads], dim=1)
        self.values = normal(num_tokens, num_kv_heads, head_dim)
        self.cache = LayerCache(
            keys=normal(num_kv_heads, capacity, head_dim), values=normal(num_kv_heads, capacity, head_dim)
        )
        self.spans = []
        free, row = 0, 0
        for context, queries in lengths:
            runs: list[Run] = []
            while (missing := context + queries - num_slots(tuple(runs))) > 0:
                free += rng.randint(0, 3)
                taken = rng.randint(1, missing)
                runs.append((free, free + taken))
                free += taken
            rng.shuffle(runs)
            span = SequenceSpan(query_start=row, num_queries=queries, runs=tuple(runs))
            self.spans.append(span)
            slots = torch.tensor([slot for run in span.query_runs for slot in range(*run)])
            rows = slice(row, row + queries)
            reference.write_kv(self.cache, slots, self.keys[rows], self.values[rows])
            row += queries
        self.scale = head_dim**-0.5

    def attend(self, kernels: Kernels, window: int | None = None) -> Tensor:
        plan = kernels.plan(self.spans, window=window)
        return kernels.attention(self.query, self.keys, self.values, self.cache, plan, self.scale)


def lengths(max_context: int, max_queries: int) -> st.SearchStrategy[list[tuple[int, int]]]:
    return st.lists(st.tuples(st.integers(0, max_context), st.integers(1, max_queries)), min_size=1, max_size=5)


@settings(max_examples=120, deadline=None)
@given(
    lengths=lengths(40, 1) | lengths(40, 20) | lengths(600, 70),
    num_kv_heads=st.sampled_from([1, 2, 5]),
    group=st.sampled_from([1, 3, 4, 8]),
    head_dim=st.sampled_from([16, 32, 64]),
    window=st.none() | st.integers(1, 60) | st.integers(1, 700),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**20),
)
def test_cpu_attention_agrees_with_the_reference(
    lengths: list[tuple[int, int]],
    num_kv_heads: int,
    group: int,
    head_dim: int,
    window: int | None,
    dtype: torch.dtype,
    seed: int,
) -> None:
    batch = Batch(lengths=lengths, num_kv_heads=num_kv_heads, group=group, head_dim=head_dim, dtype=dtype, seed=seed)
    got, expected = batch.attend(cpu, window), batch.attend(reference, window)
    torch.testing.assert_close(got, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.every_target
@pytest.mark.parametrize("window", [None, 256, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_contexts_in_many_runs_agree(dtype: torch.dtype, window: int | None) -> None:
    lengths = [(1500, 1), (1100, 70), (0, 600), (5000, 1), (300, 257)]
    batch = Batch(lengths=lengths, num_kv_heads=5, group=3, head_dim=64, dtype=dtype, seed=3)
    got, expected = batch.attend(cpu, window), batch.attend(reference, window)
    torch.testing.assert_close(got, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("window", [None, 1, 5, 64, 400])
@pytest.mark.parametrize("context", [0, 7, 300])
@pytest.mark.parametrize("kernels", [cpu, reference])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_window_is_that_of_transformers(
    dtype: torch.dtype, kernels: Kernels, context: int, window: int | None
) -> None:
    """Against torch's own attention with the mask that transformers gives Mistral."""
    num_queries = 90
    batch = Batch(lengths=[(context, num_queries)], num_kv_heads=2, group=4, head_dim=32, dtype=dtype, seed=1)
    sees = sliding_window_causal_mask_function(window) if window else causal_mask_function
    position = torch.arange(context + num_queries)
    mask = sees(0, 0, position[context:, None], position)
    slots = [slot for run in batch.spans[0].runs for slot in range(*run)]
    expected = torch.nn.functional.scaled_dot_product_attention(
        batch.query.transpose(0, 1),
        batch.cache.keys[:, slots].repeat_interleave(4, dim=0),
        batch.cache.values[:, slots].repeat_interleave(4, dim=0),
        attn_mask=mask,
    )
    got = batch.attend(kernels, window).transpose(0, 1)
    torch.testing.assert_close(got, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("num_queries", [1, 40])
def test_a_window_hides_what_it_passed(num_queries: int) -> None:
    """Whatever lies in the slots of tokens that no query sees any more, they may have been given away."""
    batch = Batch(lengths=[(500, num_queries)], num_kv_heads=2, group=2, head_dim=32, dtype=torch.float32, seed=2)
    before = batch.attend(cpu, 100)
    gone = [slot for run in split_runs(batch.spans[0].runs, 500 - 99)[0] for slot in range(*run)]
    batch.cache.keys[:, gone] = torch.nan
    batch.cache.values[:, gone] = torch.nan
    assert torch.equal(batch.attend(cpu, 100), before)


@pytest.mark.every_target
def test_bits_do_not_depend_on_how_a_prompt_is_cut_into_chunks() -> None:
    whole = Batch(lengths=[(0, 700)], num_kv_heads=2, group=4, head_dim=64, dtype=torch.bfloat16, seed=4)
    before = whole.attend(cpu)
    for edges in ([0, 1, 700], [0, 333, 334, 700], [0, 256, 512, 700]):
        parts = []
        for start, stop in itertools.pairwise(edges):
            runs, _ = split_runs(whole.spans[0].runs, stop)
            plan = cpu.plan([SequenceSpan(query_start=0, num_queries=stop - start, runs=runs)])
            rows = slice(start, stop)
            fresh = whole.query[rows], whole.keys[rows], whole.values[rows]
            parts.append(cpu.attention(*fresh, whole.cache, plan, whole.scale))
        assert torch.equal(torch.cat(parts), before)


def test_the_reference_is_textbook_attention() -> None:
    """One token at a time, one head at a time, in float64."""
    batch = Batch(lengths=[(6, 4)], num_kv_heads=2, group=3, head_dim=16, dtype=torch.float32, seed=1)
    slots = [slot for run in batch.spans[0].runs for slot in range(*run)]
    expected = torch.empty_like(batch.query)
    for row, head in itertools.product(range(4), range(6)):
        seen = slots[: 6 + row + 1]
        keys, values = (
            batch.cache.keys[head // 3, seen].double(),
            batch.cache.values[head // 3, seen].double(),
        )
        weights = torch.exp(keys @ batch.query[row, head].double() / 4.0)
        expected[row, head] = ((weights / weights.sum()) @ values).float()
    torch.testing.assert_close(batch.attend(reference), expected, atol=1e-6, rtol=1e-6)


class _CountBytes(TorchDispatchMode):
    """Adds up the bytes of every tensor an operation creates; views of existing memory are free."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        known = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)}
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in known:
                self.num_bytes += tensor.untyped_storage().nbytes()
        return out


@pytest.mark.parametrize("num_queries", [1, 16])
def test_attention_copies_no_context_however_many_runs_it_lies_in(num_queries: int) -> None:
    context = 12_000
    batch = Batch(lengths=[(context, num_queries)], num_kv_heads=5, group=3, head_dim=64, dtype=torch.bfloat16, seed=0)
    assert len(batch.spans[0].runs) > 3
    with _CountBytes() as made:
        batch.attend(cpu)
    with _CountBytes() as made_by_reference:
        batch.attend(reference)
    context_bytes = 2 * context * 5 * 64 * 2
    assert made.num_bytes < context_bytes / 10  # outputs, partial sums and little else
    assert made_by_reference.num_bytes > context_bytes  # the count does see copies


@settings(deadline=None, max_examples=40)
@given(
    num_tokens=st.integers(2, 700),
    cuts=st.lists(st.integers(1, 699), max_size=20),
    num_queries=st.sampled_from([1, 1, 9, 80]),
    window=st.none() | st.integers(1, 300),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_bits_do_not_depend_on_where_the_blocks_lie(
    num_tokens: int, cuts: list[int], num_queries: int, window: int | None, dtype: torch.dtype, seed: int
) -> None:
    """What lets a sequence go on with the very same tokens from other blocks, or another replica."""
    num_queries = min(num_queries, num_tokens)
    lengths = [(num_tokens - num_queries, num_queries)]
    batch = Batch(lengths=lengths, num_kv_heads=2, group=4, head_dim=64, dtype=dtype, seed=seed)
    slots = [slot for run in batch.spans[0].runs for slot in range(*run)]
    edges = sorted({0, num_tokens, *(cut for cut in cuts if cut < num_tokens)})
    pieces = list(itertools.pairwise(edges))
    random.Random(seed).shuffle(pieces)
    moved, at = {}, 3
    for start, stop in pieces:
        moved[start] = (at, at + stop - start)
        at += stop - start + 2
    elsewhere = [slot for start in sorted(moved) for slot in range(*moved[start])]
    cache = LayerCache(keys=torch.zeros(2, at, 64, dtype=dtype), values=torch.zeros(2, at, 64, dtype=dtype))
    cache.keys[:, elsewhere] = batch.cache.keys[:, slots]
    cache.values[:, elsewhere] = batch.cache.values[:, slots]
    before = batch.attend(cpu, window)
    batch.cache = cache
    batch.spans = [replace(batch.spans[0], runs=tuple(moved[start] for start in sorted(moved)))]
    assert torch.equal(batch.attend(cpu, window), before)
