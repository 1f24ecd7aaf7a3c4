"""Checks how many bytes KV blocks, steps and ranks take."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.config.types import parse_bytes
from placement.model.part import Part, Span
from placement.model.specs import DType, ModelSpec, RopeSpec
from placement.model.striping import Stripe
from placement.model.weights import num_parameters
from placement.planning.limits import ReplicaLimits
from placement.planning.memory import (
    CPU_PROCESS_BYTES,
    CUDA_PROCESS_BYTES,
    MOST_GRAPHED,
    SAMPLED_ON_CPU,
    SAMPLED_ON_GPU,
    SCORED_ROWS,
    footprint,
    format_bytes,
    graph_bytes,
    graphed_tokens,
    kv_bytes_per_block,
    most_kv_tokens,
    most_own_tokens,
    num_blocks_for,
    num_blocks_of,
    rounded_size,
    sampling_bytes,
    size_words,
    workspace_bytes,
)

LEAST = ReplicaLimits(block_size=16, token_budget=1, max_num_seqs=1)

MODEL = ModelSpec(
    architecture="llama",
    num_layers=4,
    hidden_size=64,
    num_heads=8,
    num_kv_heads=2,
    head_dim=8,
    ffn_size=128,
    vocab_size=100,
    max_context_tokens=512,
    rms_norm_eps=1e-5,
    rope=RopeSpec(),
    tied_embeddings=False,
)
WHOLE = Part.whole(MODEL)


def test_block_holds_keys_and_values_of_its_layers_and_heads() -> None:
    whole = kv_bytes_per_block(MODEL, WHOLE, dtype=DType.FLOAT32, block_size=16)
    assert whole == 2 * 4 * 16 * 2 * 8 * 4
    part = replace(WHOLE, layers=Span(1, 3), kv_heads=Span(1, 2))
    assert kv_bytes_per_block(MODEL, part, dtype=DType.BFLOAT16, block_size=16) == whole // 8


@given(st.integers(0, 2**40), st.integers(1, 2**24))
def test_blocks_fit_and_one_more_would_not(size: int, bytes_per_block: int) -> None:
    num_blocks = num_blocks_for(size, bytes_per_block=bytes_per_block)
    assert num_blocks * bytes_per_block <= size < (num_blocks + 1) * bytes_per_block


@given(st.integers(1, 10**6), st.integers(1, 1024))
def test_blocks_of_a_sequence_hold_all_its_tokens(num_tokens: int, block_size: int) -> None:
    num_blocks = num_blocks_of(num_tokens, block_size=block_size)
    assert (num_blocks - 1) * block_size < num_tokens <= num_blocks * block_size


def test_workspace_follows_its_formula() -> None:
    per_token = 5 * 64 + (24 + 4) * 8 + 3 * 128 + 2 * 128
    size = workspace_bytes(MODEL, WHOLE, dtype=DType.FLOAT32, max_num_seqs=50, token_budget=10)
    assert size == 10 * per_token * 4 + 50 * 100 * 4 + sampling_bytes(50, 100, on_cpu=True)
    few = workspace_bytes(MODEL, WHOLE, dtype=DType.FLOAT32, max_num_seqs=3, token_budget=10)
    assert few == 10 * per_token * 4 + SCORED_ROWS * 100 * 4 + sampling_bytes(SCORED_ROWS, 100, on_cpu=True)


@given(st.integers(1, 4096), st.integers(1, 300_000), st.booleans())
def test_sampling_takes_more_for_more_rows_until_it_takes_them_in_turn(rows: int, vocab: int, on_cpu: bool) -> None:
    at_once = max(1, (SAMPLED_ON_CPU if on_cpu else SAMPLED_ON_GPU) // vocab)
    one, several = (sampling_bytes(count, vocab, on_cpu=on_cpu) for count in (1, rows))
    assert several == min(rows, at_once) * one
    assert one >= 56 * vocab


LARGE = replace(
    MODEL,
    num_layers=32,
    hidden_size=4096,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    ffn_size=14336,
    vocab_size=128_256,
    max_context_tokens=8192,
)


def test_graphs_take_what_their_largest_does() -> None:
    """An 8 B Llama has logits of 256 rows twice, partial results of two million tokens twice, and activations."""
    found = graph_bytes(LARGE, dtype=DType.BFLOAT16, max_num_seqs=256)
    logits = 2 * 256 * 128_256 * 2
    partials = 2 * (2**21 // 256 + 256) * 32 * 129 * 4
    tables = 4 * 2**21 + 48 * (2**21 // 256 + 256) + 72 * 256
    activations = 256 * (5 * 4096 + 112 * 128 + 5 * 14336) * 2
    assert found == logits + partials + tables + activations + 128 * 2**20
    assert graph_bytes(LARGE, dtype=DType.BFLOAT16, max_num_seqs=4096) == found
    assert graph_bytes(LARGE, dtype=DType.BFLOAT16, max_num_seqs=8) < found / 2


@pytest.mark.parametrize(
    ("max_num_seqs", "max_context_tokens", "tokens"),
    [(4, 500, 2000), (128, 16384, 2**21), (129, 16384, 2**21), (4096, 100, MOST_GRAPHED * 100)],
)
def test_steps_of_so_many_tokens_are_graphs(max_num_seqs: int, max_context_tokens: int, tokens: int) -> None:
    assert graphed_tokens(max_num_seqs, max_context_tokens) == tokens


def test_only_a_gpu_needs_memory_for_graphs() -> None:
    sizes: dict[str, Any] = {"dtype": DType.BFLOAT16, "max_num_seqs": 64, "token_budget": 512}
    for on_cpu in (True, False):
        limits = ReplicaLimits(block_size=16, max_num_seqs=64, token_budget=512)
        need = footprint(LARGE, Part.whole(LARGE), dtype=DType.BFLOAT16, kv_bytes=0, on_cpu=on_cpu, limits=limits)
        graphs = 0 if on_cpu else graph_bytes(LARGE, dtype=DType.BFLOAT16, max_num_seqs=64)
        assert need.workspace_bytes == workspace_bytes(LARGE, Part.whole(LARGE), on_cpu=on_cpu, **sizes) + graphs


@pytest.mark.parametrize(
    ("tied", "dtype", "on_cpu", "copies"),
    [(True, DType.BFLOAT16, True, 1), (True, DType.FLOAT32, True, 0), (True, DType.BFLOAT16, False, 0),
     (False, DType.BFLOAT16, True, 0)],
)  # fmt: skip
def test_a_tied_head_is_held_twice_where_it_is_packed(tied: bool, dtype: DType, on_cpu: bool, copies: int) -> None:
    model = replace(MODEL, tied_embeddings=tied)
    need = footprint(
        model,
        Part.whole(model),
        dtype=dtype,
        kv_bytes=0,
        limits=LEAST,
        on_cpu=on_cpu,
    )
    embedding = model.vocab_size * model.hidden_size * dtype.itemsize
    assert need.weight_bytes == num_parameters(model) * dtype.itemsize + copies * embedding


@pytest.mark.parametrize(("on_cpu", "process_bytes"), [(True, CPU_PROCESS_BYTES), (False, CUDA_PROCESS_BYTES)])
def test_footprint_adds_up_and_says_so(on_cpu: bool, process_bytes: int) -> None:
    need = footprint(
        MODEL,
        WHOLE,
        dtype=DType.FLOAT32,
        kv_bytes=2**20,
        limits=LEAST,
        on_cpu=on_cpu,
    )
    parts = (need.weight_bytes, need.kv_bytes, need.workspace_bytes, need.process_bytes)
    assert need.process_bytes == process_bytes
    assert need.total_bytes == sum(parts)
    assert str(need).startswith(f"{format_bytes(need.weight_bytes)} weights + 1 MiB KV blocks + ")


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (2**20 - 1, "1 MiB"),
        (256 * 2**20, "256 MiB"),
        (999 * 2**20, "999 MiB"),
        (1000 * 2**20, "0.977 GiB"),
        (9 * 2**28, "2.25 GiB"),
        (3 * 2**40, "3 TiB"),
    ],
)
def test_sizes_are_written_for_people(size: int, text: str) -> None:
    assert format_bytes(size) == text


@given(st.integers(1, 2**45), st.integers(0, 2**32), st.integers(0, 2**32))
def test_a_size_to_set_is_never_on_the_wrong_side_and_is_read_as_it_was_meant(
    size: int, below: int, above: int
) -> None:
    least, most = max(1, size - below), size + above
    down = rounded_size(size, up=False, least=least)
    up = rounded_size(size, up=True, most=most)
    assert least <= down <= size <= up <= most
    assert rounded_size(size, up=False) > size / 2 and rounded_size(size, up=True) < max(2 * size, 2)
    for rounded in (down, up):
        assert parse_bytes(size_words(rounded)) == rounded


@pytest.mark.parametrize(
    ("size", "up", "text"),
    [
        (418 * 2**20 - 5, True, "418 MiB"),
        (418 * 2**20 - 5, False, "417 MiB"),
        (2**30, True, "1 GiB"),
        (15 * 2**30 + 5, True, "15361 MiB"),
        (15 * 2**30 + 5, False, "15 GiB"),
        (150 * 2**30 + 5, True, "151 GiB"),
        (2**20 - 1, False, "1023 KiB"),
        (5, True, "5 B"),
    ],
)
def test_sizes_to_set_have_few_digits(size: int, up: bool, text: str) -> None:
    assert size_words(rounded_size(size, up=up)) == text


def test_a_rank_of_several_reckons_with_its_part_and_what_others_send() -> None:
    part = Part(layers=Span(0, 4), kv_heads=Span(0, 1), ffn_columns=Span(0, 32), vocab_rows=Span(0, 40))
    sizes: dict[str, Any] = {"dtype": DType.FLOAT32, "max_num_seqs": 50, "token_budget": 10}
    per_token = (5 * 64 + (3 * 4 + 2) * 8 + 3 * 32 + 2 * 64) * 4
    follower = workspace_bytes(MODEL, part, num_ranks=2, leads=False, **sizes)
    assert follower == 10 * (per_token + 64 * 4) + 50 * 40 * 4
    leader = workspace_bytes(MODEL, part, num_ranks=2, **sizes)
    assert leader == 10 * (per_token + 64 * 4) + 50 * 200 * 4 + sampling_bytes(50, 100, on_cpu=True)
    three = workspace_bytes(MODEL, part, num_ranks=3, leads=False, **sizes)
    assert three - follower == 10 * 64 * (4 + 4)


def test_a_rank_that_shares_sequences_reckons_with_its_tokens_and_what_is_exchanged() -> None:
    part = replace(Part.whole(MODEL), vocab_rows=Span(0, 40), stripe=Stripe(0, 4, 16))
    sizes: dict[str, Any] = {"dtype": DType.FLOAT32, "max_num_seqs": 3, "token_budget": 100}
    whole = workspace_bytes(MODEL, Part.whole(MODEL), leads=False, **sizes)
    shared = workspace_bytes(MODEL, part, num_ranks=3, leads=False, **sizes)
    per_token = (whole - 32 * 100 * 4) // 100
    width = MODEL.num_heads * MODEL.head_dim
    exchanged = 125 * width * 2 * 4 + 73 * width * (3 * 4 + 12)
    assert shared == (25 + 3 * 16) * per_token + exchanged + 32 * 40 * 4


@pytest.mark.parametrize(("stripe", "most"), [(Stripe(0, 4, 16), 73), (Stripe(0, 8, 16), 98), (Stripe(0, 32, 64), 100)])
def test_a_rank_computes_its_share_and_the_ends_of_every_sequence(stripe: Stripe, most: int) -> None:
    assert most_own_tokens(stripe, max_num_seqs=3, token_budget=100) == most


def test_no_more_kv_moves_than_queries_and_their_answers_take() -> None:
    query_bytes, kv_bytes = MODEL.num_heads * MODEL.head_dim, 2 * MODEL.num_kv_heads * MODEL.head_dim
    assert most_kv_tokens(MODEL, 100) * kv_bytes == 100 * 2 * query_bytes
