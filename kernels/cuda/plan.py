"""Plans of a step's attention, as tables that the host makes, sends in one copy, and every layer reads.

All sequences' tokens are numbered in one list for the whole step, and ``slots`` has the slot of each. A sequence with
one query is a decode. Its tokens are cut into parts by their positions alone, so that its result depends neither on its
batch nor on where its blocks lie, and decodes that share a prompt's beginning share whole parts of it. Shared parts are
attended to once for all their decodes; partial results are merged in the same way whether a part is shared or not. A
sequence with more queries is a chunk, which is cut into tasks of neighbouring queries.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.attention import AttentionPlan, SequenceSpan

PART = 256  # the tokens of a part; each begins at a multiple of it
CHUNK = 128  # the most queries of a task
MEMBERS = 64  # the most decodes of a task of a shared part
# How many parts of a decode a recorded launch is laid out for, and in how many groups of decodes one may be.
_LIKELY_PARTS, _LIKELY_GROUPS = 64, 4

Integers = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedParts:
    """Parts that several decodes have in common: the same tokens at the same positions, in the same slots.

    Attributes:
        members: the indices of the decodes' spans in the step, two or more.
        first: the number of the first part, which begins at position ``first * PART``.
        stop: the number after the last part. All members see all tokens of all parts.
    """

    members: tuple[int, ...]
    first: int
    stop: int

    def __post_init__(self) -> None:
        assert len(self.members) > 1 and 0 <= self.first < self.stop, self


@dataclass(frozen=True, slots=True, kw_only=True)
class DevicePlan(AttentionPlan):
    """Tables in int32. Those of decodes may have more rows than are in use, which ``counts`` tells.

    Attributes:
        slots: the slots of all sequences' tokens, sequence after sequence.
        counts: how many rows of ``decodes``, ``merges`` and ``shared`` are in use, and a zero, [4].
        merges: for each decode of several parts [., 4]: its row in the batch, its first partial result, how many it
            has, and 0.
        decodes: for each part of a decode [., 8]: its row, where its sequence's slots begin, first token and end of the
            part, its partial result (-1 where there is no other part), and zeros.
        shared: for each part that decodes share [., 8]: the first of them in ``members``, how many there are, where the
            slots of one of their sequences begin, first token and end of the part, its number, and zeros.
        members: for each decode that shares [., 2]: its row, and the number that a part's number is added to for the
            number of its partial result.
        chunks: for each task of a chunk [., 8]: its first row, how many queries it has, where its sequence's slots
            begin, the position of the first query, and zeros. Tasks that see most tokens come first.
        num_partials: the most partial results that the tables may name.
        num_parts: the rows of ``decodes`` that a launch is laid out for; it computes all that are in use.
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
    """The tables of a step's decodes: see :class:`DevicePlan`."""

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
    """Lays a step out on ``device``, without waiting for it. No two of ``shared`` may share a decode's part."""
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
    """Makes an empty plan with room for ``num_decodes`` decodes of ``num_tokens`` tokens together.

    Kernels that were recorded with it (in a CUDA graph) compute the plan that :func:`put` copied into it last.
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
    """Returns the same memory for at most ``num_decodes``, with smaller launches; a single decode shares nothing."""
    return replace(
        room,
        merges=room.merges[:num_decodes],
        shared=room.shared[: 0 if num_decodes == 1 else None],
        num_parts=min(len(room.decodes), num_decodes * _LIKELY_PARTS),
    )


def fits(plan: DevicePlan, room: DevicePlan) -> bool:
    """Tells whether the plan fits into ``room``."""
    return (
        not len(plan.chunks)
        and plan.num_partials <= room.num_partials
        and all(len(table) <= len(target) for table, target in _tables(plan, room))
    )


def put(plan: DevicePlan, room: DevicePlan) -> None:
    """Copies a plan that fits into ``room``."""
    room.counts.copy_(plan.counts)
    for table, target in _tables(plan, room):
        target[: len(table)].copy_(table)


def _tables(plan: DevicePlan, room: DevicePlan) -> tuple[tuple[Tensor, Tensor], ...]:
    """Returns the pairs of tables that may be shorter in the plan than in ``room``."""
    return (
        (plan.slots, room.slots),
        (plan.decodes, room.decodes),
        (plan.merges, room.merges),
        (plan.shared, room.shared),
        (plan.members, room.members),
    )


def _by_decode(shared: Sequence[SharedParts], is_decode: NDArray[np.bool_]) -> list[tuple[Integers, Integers]]:
    """Returns, for each group, its members' numbers among the decodes, and the numbers of its parts."""
    number = is_decode.cumsum() - 1
    assert all(is_decode[list(parts.members)].all() for parts in shared), shared
    return [(number[list(parts.members)], np.arange(parts.first, parts.stop)) for parts in shared]


def _cut_decodes(sequences: Integers, window: int | None, shared: Sequence[tuple[Integers, Integers]]) -> _Decodes:
    """Makes the tables of decodes, given as [B, 4]: row, number of queries (one), first slot, number of tokens."""
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
    """Makes the table ``shared`` of groups, given by their number of members, a first slot, and their parts."""
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
    """Makes the table ``chunks`` of sequences [n, 4]: first row, number of queries, first slot, number of tokens."""
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
    """Sends arrays to the device as int32, in one copy from pinned memory."""
    size = sum(array.size for array in arrays)
    host = torch.empty(size, dtype=torch.int32, pin_memory=device.type == "cuda")
    np.concatenate([array.ravel() for array in arrays], out=host.numpy(), casting="same_kind")
    parts = host.to(device, non_blocking=True).split([array.size for array in arrays])
    return [part.view(array.shape) for part, array in zip(parts, arrays, strict=True)]
