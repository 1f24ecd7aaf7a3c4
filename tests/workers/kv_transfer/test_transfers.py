"""Keys and values arrive whole and in their places, whichever shapes the two replicas have."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from placement.errors import InvalidRequest
from placement.model.part import Span
from placement.model.specs import DType
from placement.serving.kv.peers import KvFormat
from tests.workers.kv_transfer.replicas import (
    NUM_LAYERS,
    SHAPES,
    Kind,
    Pair,
    Replica,
    dense_kv,
    pair,
    part,
    wait_until,
)
from workers.kv_transfer.awaited import Expected
from workers.model.progress import LayerProgress

TOKENS = 37
_PAIRINGS = list(itertools.product(SHAPES, SHAPES))
_FIRSTS = (0, 4, 7, 36)
_CUTS = ((), (16,), (9, 10, 30))
_BLOCKS = ((4, 4), (16, 4), (4, 16), (16, 16), (6, 16))
_TYPES = list(itertools.product(DType, DType))


def move(it: Pair, first: int, cuts: tuple[int, ...], kv_format: KvFormat = KvFormat.NATIVE) -> int:
    """Sends a sequence in portions, and returns the bytes that came, at all ranks."""
    tokens = Span(first, TOKENS)
    transfer = it.expect(tokens, kv_format)
    it.open(transfer, tokens, kv_format)
    edges = [first, *(cut for cut in cuts if cut > first), TOKENS]
    for start, stop in itertools.pairwise(edges):
        it.ship(transfer, Span(start, stop))
    ends = it.outcomes()
    assert [(rank, name, problem) for rank, name, problem, _ in ends] == [
        (rank, transfer, "") for rank in range(len(it.receivers))
    ]
    return sum(num_bytes for *_, num_bytes in ends)


def assert_has(target: Replica, dense: torch.Tensor, first: int) -> None:
    """Checks that the caches have these numbers from a token on, and nothing else."""
    wanted = Replica(target.ranks, target.num_tokens)
    dense = dense.clone()
    dense[..., :first, :] = 0
    wanted.fill(dense)
    for got, expected in zip(target.copy(), wanted.copy(), strict=True):
        np.testing.assert_array_equal(got.float().numpy(), expected.float().numpy())


@pytest.mark.parametrize(("source", "target"), _PAIRINGS)
@pytest.mark.parametrize("variant", range(4))
def test_every_number_arrives_in_its_place(source: str, target: str, variant: int) -> None:
    turn = _PAIRINGS.index((source, target)) + variant  # every value of each meets every other in time
    blocks, first, cuts = _BLOCKS[turn % 5], _FIRSTS[variant], _CUTS[turn % 3]
    types = _TYPES[(turn + variant) % 4]
    dense = dense_kv(TOKENS)
    kinds = Kind(source, blocks[0], types[0]), Kind(target, blocks[1], types[1])
    with pair(*kinds, num_tokens=TOKENS, shared_memory=bool(turn % 2)) as it:
        it.source.fill(dense)
        num_bytes = move(it, first, cuts)
        wait_until(lambda: sum(sender.num_sent_bytes for sender in it.senders) == num_bytes)
        rounded = dense.bfloat16().float() if DType.BFLOAT16 in types else dense
        assert_has(it.target, rounded, first)


@pytest.mark.parametrize(("source", "target"), _PAIRINGS)
def test_integers_differ_from_the_numbers_by_half_a_scale_of_their_group_at_most(source: str, target: str) -> None:
    block_size = 6
    first, cuts = 5, (16, 17)
    dense = dense_kv(TOKENS)
    dense[:, :, :, 12:18] = 0.0  # a group of zeros
    dense[1, :, 2] *= 1000.0
    with pair(Kind(source, block_size), Kind(target, 4), num_tokens=TOKENS) as it:
        it.source.fill(dense)
        move(it, first, cuts, KvFormat.INT8)
        wanted, slack = Replica(it.target.ranks, TOKENS), Replica(it.target.ranks, TOKENS)
        dense[..., :first, :] = 0
        wanted.fill(dense)
        slack.fill(half_scales(dense, block_size))
        for got, right, most in zip(it.target.copy(), wanted.copy(), slack.copy(), strict=True):
            assert ((got - right).abs() <= most).all()


def half_scales(dense: torch.Tensor, block_size: int) -> torch.Tensor:
    """The largest error of each number, where a block of tokens has one scale for each layer and head."""
    bounds = torch.zeros_like(dense)
    for start in range(0, TOKENS, block_size):
        block = dense[..., start : start + block_size, :]
        bounds[..., start : start + block_size, :] = block.abs().amax(dim=(3, 4), keepdim=True) / 127 / 2 * 1.001
    return bounds


@pytest.mark.parametrize("shared_memory", [False, True])
def test_what_is_large_goes_in_pieces_and_in_portions(shared_memory: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("placement.serving.kv.portions", "workers.kv_transfer.arrivals"):
        monkeypatch.setattr(f"{module}.PORTION_TOKENS", 8)
    monkeypatch.setattr("workers.kv_transfer.outbound.MAX_BODY_BYTES", 100)
    dense = dense_kv(TOKENS)
    with pair(Kind("copies"), Kind("stripes", 16), num_tokens=TOKENS, shared_memory=shared_memory) as it:
        it.source.fill(dense)
        assert move(it, 3, (11,)) == dense[..., 3:, :].numel() * 4
        assert_has(it.target, dense, 3)


def test_each_layer_is_sent_as_soon_as_it_is_written() -> None:
    dense = dense_kv(TOKENS)
    tokens = Span(0, TOKENS)
    layer_bytes = dense[0].numel() * 4
    with pair(num_tokens=TOKENS) as it:
        transfer = it.expect(tokens)
        it.open(transfer, tokens)
        progress = LayerProgress()
        it.ship(transfer, tokens, progress)
        for layer in range(NUM_LAYERS):
            assert it.senders[0].num_sent_bytes == layer * layer_bytes
            it.source.fill(dense, [layer])
            progress.advance(layer + 1)
            wait_until(lambda sent=(layer + 1) * layer_bytes: it.senders[0].num_sent_bytes >= sent)
        assert it.outcomes() == [(0, transfer, "", dense.numel() * 4)]
        assert_has(it.target, dense, 0)


def test_sequences_of_one_step_go_layer_by_layer_together() -> None:
    # The second is not behind the whole of the first, which waits for a layer.
    dense = dense_kv(TOKENS)
    tokens = Span(0, TOKENS)
    layer_bytes = dense[0].numel() * 4
    with pair(num_tokens=TOKENS) as it:
        it.source.fill(dense)
        transfers = [it.expect(tokens) for _ in range(2)]
        progress = LayerProgress()
        for transfer in transfers:
            it.open(transfer, tokens)
            it.ship(transfer, tokens, progress)
        progress.advance(1)
        wait_until(lambda: it.senders[0].num_sent_bytes == 2 * layer_bytes)
        progress.finish()
        assert {it.ends.get(timeout=60)[1:3] for _ in transfers} == {(transfer, "") for transfer in transfers}


def test_a_rank_that_needs_nothing_is_done_at_once() -> None:
    with pair(target=Kind("copies")) as it:
        transfer = it.expect(Span(0, 21))
        assert it.ends.get(timeout=60) == (3, transfer, "", 0)  # it has no heads
        nothing = it.expect(Span(5, 5))
        assert sorted(it.ends.get(timeout=60) for _ in range(4)) == [(rank, nothing, "", 0) for rank in range(4)]


def test_a_source_that_lacks_something_is_refused() -> None:
    with pair() as it:
        ranks = it.source.ranks
        lacking = replace(ranks, parts=(part((0, NUM_LAYERS), (0, 3)),))
        expected = Expected(
            transfer_id=bytes(16), source=lacking, tokens=Span(0, 9), runs=it.target.runs(9), format=KvFormat.NATIVE
        )
        with pytest.raises(InvalidRequest, match="KV heads"):
            it.receivers[0].expect(expected)
