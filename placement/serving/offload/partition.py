"""Decides which attention worker attends to what of a sequence: by KV heads, by request, or by ranges of tokens.

    KV heads      every worker has some heads of all sequences: balanced whatever the sequences, as far as heads divide
    requests      every worker has all heads of some sequences: balanced where there are many sequences
    token ranges  every worker has some blocks of all sequences: balanced where sequences are long. Queries go to all
                  workers, and their answers are merged by log-sum-exp

Lamina (Chen et al. 2024) partitions by heads or by request; parts of attention over ranges of tokens are merged as in
flash decoding. Heads and blocks are dealt out by the rule of :mod:`placement.planning.splitting`.
"""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from placement.model.part import Span
from placement.planning.splitting import Dimension, deal, spans


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionShare:
    """Says what an attention worker attends to of one sequence, in all layers. It is never empty.

    Attributes:
        worker: the index of the worker.
        kv_heads: KV heads of the model.
        tokens: runs of positions, in ascending order and apart.
    """

    worker: int
    kv_heads: Span
    tokens: tuple[Span, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestLoad:
    """Counts what an attention worker has to do, where it has whole sequences.

    Attributes:
        num_tokens: tokens of its sequences, all of which are read in every step.
        free_blocks: KV blocks that it can still give away.
        shared_blocks: how many of the blocks that are asked for it has already, as other sequences begin alike.
    """

    num_tokens: int
    free_blocks: int
    shared_blocks: int = 0


def head_spans(num_kv_heads: int, weights: Sequence[float]) -> tuple[Span, ...]:
    """Returns the KV heads of each worker, empty for some where there are many workers.

    Args:
        weights: how fast each worker attends, in any unit; not all 0.
    """
    return spans(Dimension(name="KV heads", size=num_kv_heads), deal(num_kv_heads, weights))


def head_shares(num_kv_heads: int, weights: Sequence[float], num_tokens: int) -> tuple[AttentionShare, ...]:
    """Divides a sequence by KV heads."""
    tokens = (Span(0, num_tokens),)
    return tuple(
        AttentionShare(worker=worker, kv_heads=heads, tokens=tokens)
        for worker, heads in enumerate(head_spans(num_kv_heads, weights))
        if heads and num_tokens
    )


def assigned_worker(loads: Sequence[RequestLoad], weights: Sequence[float], *, tokens: int, blocks: int) -> int | None:
    """Returns the worker that a new sequence goes to as a whole; None where nobody has room.

    That is the one whose tokens, with those of the sequence, are fewest for its weight, and so read soonest; of equals,
    the one that shares most blocks, and then the first. A worker of weight 0 gets nothing.

    Args:
        tokens: tokens that the sequence has.
        blocks: KV blocks that it needs, those that a worker shares included.
    """
    fitting = [
        worker
        for worker, load in enumerate(loads)
        if weights[worker] and blocks - min(blocks, load.shared_blocks) <= load.free_blocks
    ]
    return min(
        fitting,
        key=lambda worker: (
            (loads[worker].num_tokens + tokens) / weights[worker],
            -min(blocks, loads[worker].shared_blocks),
            worker,
        ),
        default=None,
    )


def assigned_workers(num_tokens: Mapping[int, int], weights: Sequence[float]) -> dict[int, int]:
    """Assigns many sequences at once, such as those of a worker that is lost: the longest first.

    That is the rule of Graham (1969), by which the greatest load is soon near the least there can be. Room is not
    looked at.

    Args:
        num_tokens: tokens of each sequence, by its id.

    Returns:
        the worker of each sequence, by its id.
    """
    assert any(weights), weights
    loads = [0] * len(weights)
    workers: dict[int, int] = {}
    for sequence, tokens in sorted(num_tokens.items(), key=lambda item: (-item[1], item[0])):
        able = (worker for worker, weight in enumerate(weights) if weight)
        worker = min(able, key=lambda it: ((loads[it] + tokens) / weights[it], it))
        loads[worker] += tokens
        workers[sequence] = worker
    return workers


def request_shares(worker: int, num_kv_heads: int, num_tokens: int) -> tuple[AttentionShare, ...]:
    """Gives a sequence to one worker as a whole."""
    if not num_tokens:
        return ()
    return (AttentionShare(worker=worker, kv_heads=Span(0, num_kv_heads), tokens=(Span(0, num_tokens),)),)


def block_owners(num_blocks: int, weights: Sequence[float]) -> tuple[int, ...]:
    """Returns the worker of each of a sequence's blocks, by the place of the block in the sequence.

    The owner depends on the place alone, so that a sequence can grow without a block that moves, and sequences that
    begin alike share blocks. Any number of leading blocks is dealt out as :func:`placement.planning.splitting.deal`
    does it. Equal workers take turns.
    """
    rounded = 1 << max(0, num_blocks - 1).bit_length()
    return _owners(rounded, tuple(weights))[:num_blocks]


@lru_cache(maxsize=64)
def _owners(num_blocks: int, weights: tuple[float, ...]) -> tuple[int, ...]:
    assert any(weights), weights
    queue = [(1 / weight, worker, 1) for worker, weight in enumerate(weights) if weight]
    heapq.heapify(queue)
    owners: list[int] = []
    for _ in range(num_blocks):
        _, worker, count = queue[0]
        owners.append(worker)
        heapq.heapreplace(queue, ((count + 1) / weights[worker], worker, count + 1))
    return tuple(owners)


def own_blocks(block_table: Sequence[int], weights: Sequence[float], worker: int) -> tuple[int, ...]:
    """Selects the blocks of a table that a worker has, where sequences are divided by ranges of tokens."""
    owners = block_owners(len(block_table), weights)
    return tuple(block for block, owner in zip(block_table, owners, strict=True) if owner == worker)


def token_runs_of(num_tokens: int, block_size: int, weights: Sequence[float]) -> tuple[tuple[Span, ...], ...]:
    """Returns the runs of positions that each worker has of a sequence, cut at the ends of blocks alone."""
    runs: list[list[Span]] = [[] for _ in weights]
    for block, worker in enumerate(block_owners(-(-num_tokens // block_size), weights)):
        start, stop = block * block_size, min((block + 1) * block_size, num_tokens)
        own = runs[worker]
        if own and own[-1].stop == start:
            start = own.pop().start
        own.append(Span(start, stop))
    return tuple(map(tuple, runs))


def token_shares(
    num_kv_heads: int, weights: Sequence[float], num_tokens: int, *, block_size: int
) -> tuple[AttentionShare, ...]:
    """Divides a sequence by ranges of tokens. The parts of attention are to be merged by their log-sum-exp."""
    heads = Span(0, num_kv_heads)
    return tuple(
        AttentionShare(worker=worker, kv_heads=heads, tokens=tokens)
        for worker, tokens in enumerate(token_runs_of(num_tokens, block_size, weights))
        if tokens
    )
