"""A step's attention as tables on the device: made on the host, sent in one copy, read by every layer.

A sequence's tokens are numbered in one list for the whole step; ``slots`` says where each lies. One query of a
sequence is a decode: its tokens are cut into parts by their number alone, so that what it is given depends neither on
its batch nor on where its blocks lie. More queries are a chunk, cut into tasks of neighbours.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.attention import AttentionPlan, SequenceSpan

PART = 256  # tokens of a part, in decodes that have no more than MAX_PARTS of them
MAX_PARTS = 64
CHUNK = 128  # queries of a task
_GRAIN = 64  # parts are multiples of it, so that all tiles but a sequence's last are full

Integers = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class DevicePlan(AttentionPlan):
    """Tables in int32. Those of decodes may have room for more than is in use: ``counts`` says how much is.

    Attributes:
        slots: [tokens of all sequences, one list after the other].
        counts: [4]: rows of ``decodes`` and of ``merges`` in use, and two zeros.
        merges: [., 4]: a decode of several parts: its row in the batch, first partial result, number of them, 0.
        decodes: [., 8]: a part of a decode: its row, where its sequence's slots begin, first token and end of the
            part, its partial result or -1 where there is no other part, and zeros.
        chunks: [., 8]: queries of a chunk: first row, how many, where its sequence's slots begin, position of the
            first, and zeros. Those that see most come first.
        num_partials: partial results that ``decodes`` may name.
    """

    slots: Tensor
    counts: Tensor
    merges: Tensor
    decodes: Tensor
    chunks: Tensor
    num_partials: int


def plan_step(spans: Sequence[SequenceSpan], window: int | None, device: torch.device) -> DevicePlan:
    """Lays a step out on ``device``. Does not wait for it."""
    runs = np.fromiter(chain.from_iterable(chain.from_iterable(span.runs for span in spans)), np.int64).reshape(-1, 2)
    run_lengths = runs[:, 1] - runs[:, 0]
    run_ends = run_lengths.cumsum()
    last_runs = np.fromiter((len(span.runs) for span in spans), np.int64, len(spans)).cumsum() - 1
    ends = run_ends[last_runs]  # of each sequence, in the list of all tokens
    lengths = np.diff(ends, prepend=0)
    fields = np.array([(span.query_start, span.num_queries) for span in spans], np.int64)
    sequences = np.column_stack((fields, ends - lengths, lengths))
    is_decode = fields[:, 1] == 1
    decodes, merges = _cut_decodes(sequences[is_decode], window)
    chunks = _cut_chunks(sequences[~is_decode])
    shifts = runs[:, 0] - (run_ends - run_lengths)  # from a token's place in the list to its slot
    counts = np.array([len(decodes), len(merges), 0, 0])
    tables = _send((counts, merges, decodes, chunks, np.stack((shifts, run_lengths))), device)
    num_tokens = int(ends[-1])
    shift = tables[4][0].repeat_interleave(tables[4][1], output_size=num_tokens)
    return DevicePlan(
        spans=tuple(spans),
        window=window,
        slots=shift + torch.arange(num_tokens, dtype=torch.int32, device=device),
        counts=tables[0],
        merges=tables[1],
        decodes=tables[2],
        chunks=tables[3],
        num_partials=int(merges[:, 2].sum()),
    )


def room_for_decodes(num_decodes: int, num_tokens: int, window: int | None, device: torch.device) -> DevicePlan:
    """A plan of no decodes, with room for ``num_decodes`` of ``num_tokens`` together: kernels that were launched with
    it once (a CUDA graph) compute what :func:`put` has last put there.
    """
    num_parts = num_tokens // PART + num_decodes
    return DevicePlan(
        spans=(),
        window=window,
        slots=torch.zeros(num_tokens, dtype=torch.int32, device=device),
        counts=torch.zeros(4, dtype=torch.int32, device=device),
        merges=torch.zeros(num_decodes, 4, dtype=torch.int32, device=device),
        decodes=torch.zeros(num_parts, 8, dtype=torch.int32, device=device),
        chunks=torch.zeros(0, 8, dtype=torch.int32, device=device),
        num_partials=num_parts,
    )


def narrowed(room: DevicePlan, num_decodes: int) -> DevicePlan:
    """The same memory for no more than ``num_decodes``, whose kernels then look through less of it."""
    num_parts = min(len(room.decodes), num_decodes * MAX_PARTS)
    return replace(room, merges=room.merges[:num_decodes], decodes=room.decodes[:num_parts], num_partials=num_parts)


def fits(plan: DevicePlan, room: DevicePlan) -> bool:
    """Whether there is room for the plan."""
    tables = ((plan.slots, room.slots), (plan.decodes, room.decodes), (plan.merges, room.merges))
    return not len(plan.chunks) and all(len(table) <= len(target) for table, target in tables)


def put(plan: DevicePlan, room: DevicePlan) -> None:
    """Copies a plan that fits."""
    room.counts.copy_(plan.counts)
    room.slots[: len(plan.slots)].copy_(plan.slots)
    room.decodes[: len(plan.decodes)].copy_(plan.decodes)
    room.merges[: len(plan.merges)].copy_(plan.merges)


def _cut_decodes(sequences: Integers, window: int | None) -> tuple[Integers, Integers]:
    """Tables ``decodes`` and ``merges`` of sequences [B, 4]: row, queries (one), first slot, tokens."""
    row, _, first_slot, end = sequences.T
    begin = np.zeros_like(end) if window is None else np.maximum(0, end - window)
    size = np.maximum(PART, -(-(end - begin) // (MAX_PARTS * _GRAIN)) * _GRAIN)
    num_parts = -(-(end - begin) // size)
    owner = np.arange(len(row)).repeat(num_parts)
    first = begin[owner] + (np.arange(len(owner)) - (num_parts.cumsum() - num_parts)[owner]) * size[owner]
    several = num_parts > 1
    partial = np.where(several[owner], several[owner].cumsum() - 1, -1)
    decodes = np.zeros((len(owner), 8), np.int64)
    decodes[:, :5] = np.column_stack(
        (row[owner], first_slot[owner], first, np.minimum(first + size[owner], end[owner]), partial)
    )
    counts = num_parts[several]
    merges = np.zeros((len(counts), 4), np.int64)
    merges[:, :3] = np.column_stack((row[several], counts.cumsum() - counts, counts))
    return decodes, merges


def _cut_chunks(sequences: Integers) -> Integers:
    """Table ``chunks`` of sequences [n, 4]: first row, queries, first slot, tokens."""
    row, num_queries, first_slot, length = sequences.T
    num_tasks = -(-num_queries // CHUNK)
    owner = np.arange(len(row)).repeat(num_tasks)
    skipped = (np.arange(len(owner)) - (num_tasks.cumsum() - num_tasks)[owner]) * CHUNK
    queries = np.minimum(CHUNK, num_queries[owner] - skipped)
    position = (length - num_queries)[owner] + skipped
    chunks = np.zeros((len(owner), 8), np.int64)
    chunks[:, :4] = np.column_stack((row[owner] + skipped, queries, first_slot[owner], position))
    order: Integers = (-position).argsort(kind="stable")
    return chunks[order]


def _send(arrays: Sequence[Integers], device: torch.device) -> list[Tensor]:
    """The arrays as int32 on the device, in one copy from memory that it reads by itself."""
    size = sum(array.size for array in arrays)
    host = torch.empty(size, dtype=torch.int32, pin_memory=device.type == "cuda")
    np.concatenate([array.ravel() for array in arrays], out=host.numpy(), casting="same_kind")
    parts = host.to(device, non_blocking=True).split([array.size for array in arrays])
    return [part.view(array.shape) for part, array in zip(parts, arrays, strict=True)]
