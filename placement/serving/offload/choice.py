"""Chooses how attention is partitioned over its workers: whichever is expected to take the least time in a layer.

Each worker reads the keys and values that it has of all sequences, and its messages pass its link. Everybody waits for
the slowest. KV heads are the usual partition, since they are balanced whatever the sequences are; another one has to be
clearly faster: requests, where heads cannot be divided as the workers are fast; token ranges, where there are so few
long sequences that whole ones would leave workers idle.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import assert_never

from placement.model.layers import Gqa
from placement.model.specs import DType
from placement.planning.residency import Partition, head_spans, slot_spans
from placement.serving.offload.wire_bytes import token_range_bytes, whole_head_bytes

LEAST_GAIN = 0.05
"""The share of the time that another partition than KV heads must save."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionWorker:
    """Holds what was measured of an attention worker.

    Attributes:
        kv_bytes_per_s: bytes of keys and values that it attends to in a second, above 0.
        link_bytes_per_s: bytes that its network interface carries in a second, above 0.
        kv_cache_bytes: the memory that it has for keys and values.
    """

    kv_bytes_per_s: float
    link_bytes_per_s: float
    kv_cache_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Counts what a partition gives one worker in a layer.

    Attributes:
        kv_bytes: bytes of keys and values that it attends to.
        wire_bytes: payload of its messages.
    """

    kv_bytes: float
    wire_bytes: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PartitionChoice:
    """The partition that is used.

    Attributes:
        layer_s: the seconds that a layer is expected to take at the slowest worker, by partition.
        idle: the workers that have nothing to do with it.
        reason: a sentence for people, with the numbers.
    """

    partition: Partition
    layer_s: dict[Partition, float]
    idle: tuple[int, ...]
    reason: str


def choose_partition(
    workers: Sequence[AttentionWorker],
    attention: Gqa,
    dtype: DType,
    contexts: Sequence[int],
    *,
    block_size: int,
    asked: Partition | None = None,
) -> PartitionChoice:
    """Chooses the partition, or explains the one that was asked for.

    Args:
        contexts: the tokens of each sequence of a typical step, at least one sequence.
        block_size: the tokens of a KV block.
        asked: the partition that the configuration names; None: none.
    """
    assert workers and contexts, (workers, contexts)
    loads = {it: partition_loads(it, workers, attention, dtype, contexts, block_size=block_size) for it in Partition}
    layer_s = {it: _slowest_s(workers, loads[it]) for it in Partition}
    fastest = min(Partition, key=lambda it: layer_s[it])
    clearly = layer_s[fastest] < (1 - LEAST_GAIN) * layer_s[Partition.KV_HEADS]
    chosen = asked or (fastest if clearly else Partition.KV_HEADS)
    idle = tuple(index for index, load in enumerate(loads[chosen]) if not load.wire_bytes)
    return PartitionChoice(
        partition=chosen, layer_s=layer_s, idle=idle, reason=_reason(chosen, asked, layer_s, idle, len(contexts))
    )


def partition_loads(
    partition: Partition,
    workers: Sequence[AttentionWorker],
    attention: Gqa,
    dtype: DType,
    contexts: Sequence[int],
    *,
    block_size: int,
) -> tuple[Load, ...]:
    """Returns what a partition gives each worker in a layer of a decode of sequences with those contexts."""
    weights = [worker.kv_bytes_per_s for worker in workers]
    whole = whole_head_bytes(attention, dtype)
    token_kv_bytes = whole.key + whole.value
    seen = [context if attention.window is None else min(context, attention.window) for context in contexts]
    match partition:
        case Partition.KV_HEADS:
            shares = [len(heads) / attention.num_kv_heads for heads in head_spans(attention.num_kv_heads, weights)]
            return tuple(
                Load(kv_bytes=share * token_kv_bytes * sum(seen), wire_bytes=share * whole.total * len(seen))
                for share in shares
            )
        case Partition.REQUESTS:
            owners = assigned_workers(dict(enumerate(seen)), weights)
            tokens = [sum(seen[it] for it, owner in owners.items() if owner == index) for index in range(len(workers))]
            counts = Counter(owners.values())
            return tuple(
                Load(kv_bytes=token_kv_bytes * tokens[index], wire_bytes=whole.total * counts[index])
                for index in range(len(workers))
            )
        case Partition.TOKEN_RANGES:
            return _range_loads(weights, attention, dtype, seen, block_size)
        case _:
            assert_never(partition)


def typical_shares(
    partition: Partition,
    workers: Sequence[AttentionWorker],
    attention: Gqa,
    dtype: DType,
    context: int,
    *,
    block_size: int,
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns each worker's share of the keys and values, and its payload of a token and layer, over many sequences.

    Requests are divided as the workers are fast, which many sequences come near to.
    """
    whole = whole_head_bytes(attention, dtype)
    if partition is Partition.REQUESTS:
        total = sum(worker.kv_bytes_per_s for worker in workers)
        shares = tuple(worker.kv_bytes_per_s / total for worker in workers)
        return shares, tuple(share * whole.total for share in shares)
    loads = partition_loads(partition, workers, attention, dtype, [context], block_size=block_size)
    read = sum(load.kv_bytes for load in loads)
    return tuple(load.kv_bytes / read for load in loads), tuple(load.wire_bytes for load in loads)


def _range_loads(
    weights: Sequence[float], attention: Gqa, dtype: DType, seen: Sequence[int], block_size: int
) -> tuple[Load, ...]:
    """Returns what each worker gets where it has some slots of each block."""
    whole = whole_head_bytes(attention, dtype)
    token_kv_bytes = whole.key + whole.value
    shares = [len(slots) / block_size for slots in slot_spans(block_size, weights)]
    num_holders = sum(1 for share in shares if share)
    sent = token_range_bytes(attention, dtype, num_holders=num_holders)
    return tuple(
        Load(
            kv_bytes=share * token_kv_bytes * sum(seen),
            wire_bytes=len(seen) * ((sent.query + sent.result) / num_holders + share * token_kv_bytes)
            if share
            else 0.0,
        )
        for share in shares
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


def _slowest_s(workers: Sequence[AttentionWorker], loads: Sequence[Load]) -> float:
    return max(
        load.kv_bytes / worker.kv_bytes_per_s + load.wire_bytes / worker.link_bytes_per_s
        for worker, load in zip(workers, loads, strict=True)
    )


def _reason(
    chosen: Partition, asked: Partition | None, layer_s: dict[Partition, float], idle: Sequence[int], num_sequences: int
) -> str:
    words = {Partition.KV_HEADS: "KV heads", Partition.REQUESTS: "requests", Partition.TOKEN_RANGES: "token ranges"}
    times = ", ".join(f"{1e3 * layer_s[it]:.3g} ms by {words[it]}" for it in Partition)
    why = "as the configuration says" if asked else "as is expected to be fastest"
    if not asked and layer_s[chosen] > min(layer_s.values()):
        why = f"as nothing else is expected to save {LEAST_GAIN:.0%}"
    unused = f"; {len(idle)} of the workers have nothing to do" if idle else ""
    return f"attention is divided by {words[chosen]}, {why}: a layer of {num_sequences} sequences takes {times}{unused}"
