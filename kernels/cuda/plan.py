"""A step's attention as tables on the device: made on the host, sent in one copy, read by every layer.

A sequence's tokens are numbered in one list for the whole step; ``slots`` says where each lies. One query of a
sequence is a decode: its tokens are cut into parts by their positions alone, so that what it is given depends neither
on its batch nor on where its blocks lie, and decodes that share a prompt's beginning share whole parts of it. These
are attended to once for all of them; a decode's results of its parts are merged alike. More queries are a chunk, cut
into tasks of neighbours.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.attention import AttentionPlan, SequenceSpan

PART = 256  # tokens of a part: each begins at a multiple of it
CHUNK = 128  # queries of a task
MEMBERS = 64  # decodes of a task that share a part
# Of a launch that is kept, parts of a decode that it is laid out for, and groups that a decode may be in.
_LIKELY_PARTS, _LIKELY_GROUPS = 64, 4

Integers = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedParts:
    """Parts that several decodes have in common: the same tokens at the same positions, in the same slots.

    Attributes:
        members: which of the step's spans, by index; two or more.
        first: number of the first part, which begins at position ``first * PART``.
        stop: number after the last. All members see all tokens of all parts.
    """

    members: tuple[int, ...]
    first: int
    stop: int

    def __post_init__(self) -> None:
        assert len(self.members) > 1 and 0 <= self.first < self.stop, self


@dataclass(frozen=True, slots=True, kw_only=True)
class DevicePlan(AttentionPlan):
    """Tables in int32. Those of decodes may have room for more than is in use: ``counts`` says how much is.

    Attributes:
        slots: [tokens of all sequences, one list after the other].
        counts: [4]: rows of ``decodes``, ``merges`` and ``shared`` in use, and a zero.
        merges: [., 4]: a decode of several parts: its row in the batch, first partial result, number of them, 0.
        decodes: [., 8]: a part of a decode: its row, where its sequence's slots begin, first token and end of the
            part, its partial result or -1 where there is no other part, and zeros.
        shared: [., 8]: a part that decodes share: the first of them in ``members``, how many, where slots of one of
            their sequences begin, first token and end of the part, its number, and zeros.
        members: [., 2]: a decode that shares: its row, and what a part's number is added to for its partial result.
        chunks: [., 8]: queries of a chunk: first row, how many, where its sequence's slots begin, position of the
            first, and zeros. Those that see most come first.
        num_partials: partial results that the tables may name.
        num_parts: rows of ``decodes`` that a launch is laid out for; it does all that are in use.
    """

    slots: Tensor
    counts: Tensor
    merges: Tensor
    decodes: Tensor
    shared: Tensor
    members: Tensor
    chunks: Tensor
    num_partials: int
    num_parts: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Decodes:
    """A step's decodes: the tables of :class:`DevicePlan`."""

    merges: Integers
    decodes: Integers
    shared: Integers
    members: Integers


def plan_step(
    spans: Sequence[SequenceSpan],
    window: int | None,
    device: torch.device,
    shared: Sequence[SharedParts] = (),
) -> DevicePlan:
    """Lays a step out on ``device``. Does not wait for it. No two of ``shared`` have a decode's part in common."""
    runs = np.fromiter(chain.from_iterable(chain.from_iterable(span.runs for span in spans)), np.int64).reshape(-1, 2)
    run_lengths = runs[:, 1] - runs[:, 0]
    run_ends = run_lengths.cumsum()
    last_runs = np.fromiter((len(span.runs) for span in spans), np.int64, len(spans)).cumsum() - 1
    ends = run_ends[last_runs]  # of each sequence, in the list of all tokens
    lengths = np.diff(ends, prepend=0)
    fields = np.array([(span.query_start, span.num_queries) for span in spans], np.int64)
    sequences = np.column_stack((fields, ends - lengths, lengths))
    is_decode = fields[:, 1] == 1
    decodes = _cut_decodes(sequences[is_decode], window, _by_decode(shared, is_decode))
    chunks = _cut_chunks(sequences[~is_decode])
    shifts = runs[:, 0] - (run_ends - run_lengths)  # from a token's place in the list to its slot
    counts = np.array([len(decodes.decodes), len(decodes.merges), len(decodes.shared), 0])
    tables = send(
        *(counts, decodes.merges, decodes.decodes, decodes.shared, chunks, decodes.members),
        np.stack((shifts, run_lengths)),
        device=device,
    )
    num_tokens = int(ends[-1])
    shift = tables[6][0].repeat_interleave(tables[6][1], output_size=num_tokens)
    return DevicePlan(
        spans=tuple(spans),
        window=window,
        slots=shift + torch.arange(num_tokens, dtype=torch.int32, device=device),
        counts=tables[0],
        merges=tables[1],
        decodes=tables[2],
        shared=tables[3],
        members=tables[5],
        chunks=tables[4],
        num_partials=int(decodes.merges[:, 2].sum()),
        num_parts=len(decodes.decodes),
    )


def room_for_decodes(num_decodes: int, num_tokens: int, window: int | None, device: torch.device) -> DevicePlan:
    """A plan of no decodes, with room for ``num_decodes`` of ``num_tokens`` together: kernels that were launched with
    it once (a CUDA graph) compute what :func:`put` has last put there.
    """
    num_parts = num_tokens // PART + num_decodes

    def table(num_rows: int, *width: int) -> Tensor:
        return torch.zeros(num_rows, *width, dtype=torch.int32, device=device)

    return DevicePlan(
        spans=(),
        window=window,
        slots=table(num_tokens),
        counts=table(4),
        merges=table(num_decodes, 4),
        decodes=table(num_parts, 8),
        shared=table(num_parts // 2, 8),
        members=table(_LIKELY_GROUPS * num_decodes, 2),
        chunks=table(0, 8),
        num_partials=num_parts,
        num_parts=num_parts,
    )


def narrowed(room: DevicePlan, num_decodes: int) -> DevicePlan:
    """The same memory for no more than ``num_decodes``, whose launches are then smaller: one decode shares nothing."""
    return replace(
        room,
        merges=room.merges[:num_decodes],
        shared=room.shared[: 0 if num_decodes == 1 else None],
        num_parts=min(len(room.decodes), num_decodes * _LIKELY_PARTS),
    )


def fits(plan: DevicePlan, room: DevicePlan) -> bool:
    """Whether there is room for the plan."""
    return (
        not len(plan.chunks)
        and plan.num_partials <= room.num_partials
        and all(len(table) <= len(target) for table, target in _tables(plan, room))
    )


def put(plan: DevicePlan, room: DevicePlan) -> None:
    """Copies a plan that fits."""
    room.counts.copy_(plan.counts)
    for table, target in _tables(plan, room):
        target[: len(table)].copy_(table)


def _tables(plan: DevicePlan, room: DevicePlan) -> tuple[tuple[Tensor, Tensor], ...]:
    """Those that may be shorter than there is room for."""
    return (
        (plan.slots, room.slots),
        (plan.decodes, room.decodes),
        (plan.merges, room.merges),
        (plan.shared, room.shared),
        (plan.members, room.members),
    )


def _by_decode(shared: Sequence[SharedParts], is_decode: NDArray[np.bool_]) -> list[tuple[Integers, Integers]]:
    """Members, by their numbers among the decodes, and numbers of the parts."""
    number = is_decode.cumsum() - 1
    assert all(is_decode[list(parts.members)].all() for parts in shared), shared
    return [(number[list(parts.members)], np.arange(parts.first, parts.stop)) for parts in shared]


def _cut_decodes(sequences: Integers, window: int | None, shared: Sequence[tuple[Integers, Integers]]) -> _Decodes:
    """Tables of sequences [B, 4] (row, queries (one), first slot, tokens) of which some share parts."""
    row, _, first_slot, end = sequences.T
    begin = np.zeros_like(end) if window is None else np.maximum(0, end - window)
    num_parts = -(-end // PART) - begin // PART
    owner = np.arange(len(row)).repeat(num_parts)
    before = num_parts.cumsum() - num_parts - begin // PART  # from a part's number to its place among all
    number = np.arange(len(owner)) - before[owner]
    is_own, several = np.ones(len(owner), np.bool_), num_parts > 1
    for members, numbers in shared:
        is_own[np.add.outer(before[members], numbers)] = False
        several[members] = True
    is_partial = several[owner]
    partial = np.where(is_partial, is_partial.cumsum() - 1, -1)
    parts = np.zeros((len(owner), 8), np.int64)
    edge = number * PART
    parts[:, :4] = np.column_stack(
        (row[owner], first_slot[owner], np.maximum(begin[owner], edge), np.minimum(end[owner], edge + PART))
    )
    parts[:, 4] = partial
    counts = num_parts[several]
    merges = np.zeros((len(counts), 4), np.int64)
    merges[:, :3] = np.column_stack((row[several], counts.cumsum() - counts, counts))
    first_partial = np.where(several, (num_parts * several).cumsum() - num_parts, 0)
    entries = [np.column_stack((row[m], (first_partial - begin // PART)[m])) for m, _ in shared]
    return _Decodes(
        merges=merges,
        decodes=parts[is_own],
        shared=_cut_shared([(len(m), first_slot[m[0]], numbers) for m, numbers in shared]),
        members=np.concatenate((np.empty((0, 2), np.int64), *entries)),
    )


def _cut_shared(shared: Sequence[tuple[int, int, Integers]]) -> Integers:
    """Table ``shared`` of groups: how many members, first slot of one of them, numbers of the parts."""
    tasks, first = [np.empty((0, 8), np.int64)], 0
    for num_members, first_slot, numbers in shared:
        block = np.arange(0, num_members, MEMBERS)
        number, start = (grid.ravel() for grid in np.meshgrid(numbers, block, indexing="ij"))
        columns = (first + start, np.minimum(MEMBERS, num_members - start), first_slot, number * PART)
        rows = np.zeros((len(start), 8), np.int64)
        rows[:, :6] = np.stack(np.broadcast_arrays(*columns, (number + 1) * PART, number), axis=1)
        tasks.append(rows)
        first += num_members
    return np.concatenate(tasks)


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


def send(*arrays: Integers, device: torch.device) -> list[Tensor]:
    """Arrays as int32 on the device, in one copy from memory that it reads by itself."""
    size = sum(array.size for array in arrays)
    host = torch.empty(size, dtype=torch.int32, pin_memory=device.type == "cuda")
    np.concatenate([array.ravel() for array in arrays], out=host.numpy(), casting="same_kind")
    parts = host.to(device, non_blocking=True).split([array.size for array in arrays])
    return [part.view(array.shape) for part, array in zip(parts, arrays, strict=True)]
