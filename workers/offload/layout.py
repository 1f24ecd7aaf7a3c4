"""Lays steps out for a model rank whose keys and values attention workers hold, wholly or in part."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.attention import PartPlan, PartSpan, Run, SequenceSpan, Window
from kernels.protocol import Kernels
from placement.planning.residency import Residency
from placement.serving.offload.orders import StepOrder
from placement.serving.offload.residents import Chunk, Home, SessionPlace, find_home
from placement.serving.offload.sight import SessionSight, Sight, look
from placement.serving.offload.told import ToldTables
from workers.attention_worker.session import AttentionSession
from workers.host.device import use_device
from workers.offload.attending import LocalRows, MicroBatchAttention, Rows, SessionRows
from workers.step.graphs import StepInputs
from workers.step.layout import Prepared, SideBySide, spans_of
from workers.step.types import Batch, SequenceInput

_MOST_KNOWN = 8192
"""Sequences whose blocks are remembered, so that they are not found anew in each step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OffloadShape:
    """Describes the part of a model rank, as far as offloading its attention needs it.

    Attributes:
        places: its sessions.
        queries_per_kv_head: query heads that share a KV head.
        first_staged: the slot of its cache behind those of local blocks: the first row of a step is staged there.
        staggered: whether steps of several sequences are computed in two micro-batches.
    """

    residency: Residency
    places: tuple[SessionPlace, ...]
    block_size: int
    queries_per_kv_head: int
    first_staged: int
    staggered: bool


@dataclass(frozen=True, slots=True)
class _Known:
    """What was found of a sequence's blocks."""

    runs: tuple[Run, ...]
    blocks: NDArray[np.int64]
    home: Home | None


class OffloadLayout:
    """Lays steps out, which are computed in that order: implements :class:`workers.step.layout.StepLayout`."""

    def __init__(
        self,
        shape: OffloadShape,
        *,
        kernels: Kernels,
        windows: Sequence[Window],
        device: torch.device,
        sessions: Sequence[AttentionSession],
    ) -> None:
        """``sessions`` are those of the shape's places, and ``windows`` those of the rank's layers."""
        self._shape = shape
        self._kernels = kernels
        self._windows = tuple(windows)
        self._device = device
        self._side_by_side = SideBySide(kernels=kernels, windows=windows, device=device)
        self._known: OrderedDict[int, _Known] = OrderedDict()
        self._sessions: tuple[AttentionSession, ...] = ()
        self._told: tuple[ToldTables, ...] = ()
        self.use(sessions)

    def use(self, sessions: Sequence[AttentionSession]) -> None:
        """Goes on with other sessions, which know nothing of any sequence."""
        assert len(sessions) == len(self._shape.places), sessions
        self._sessions = tuple(sessions)
        self._told = tuple(ToldTables() for _ in sessions)

    @torch.inference_mode()
    def lay_out(self, batch: Batch) -> Prepared:
        """Lays a batch out, where that is configured and there are several sequences in two micro-batches."""
        use_device(self._device)
        spans = spans_of(batch)
        middle = self._middle(batch)
        cuts = [slice(0, middle), slice(middle, len(spans))] if middle else [slice(0, len(spans))]
        sights, first_rows = [], []
        for cut in cuts:
            first_row = spans[cut][0].query_start
            first_rows.append(first_row)
            sights.append(self._look(batch.sequences[cut], spans[cut], first_row))
        slots = np.concatenate([sight.slots for sight in sights]).tolist()
        inputs = self._side_by_side.flatten(batch, spans, plans=False, own_slots=slots)
        attends = [self._attention(sight, batch if not place else None) for place, sight in enumerate(sights)]
        if not middle:
            prepared = self._side_by_side.prepared(batch, spans, inputs)
            return replace(prepared, attend=attends[0], computed=self._flush)
        cut_at = first_rows[1]
        micro_batches = tuple(_rows_of(inputs, rows) for rows in (slice(0, cut_at), slice(cut_at, len(slots))))
        prepared = self._side_by_side.prepared(batch, spans, inputs, micro_batches)
        return replace(prepared, attends=tuple(attends), computed=self._flush)

    def _middle(self, batch: Batch) -> int:
        """Returns the place of the second micro-batch's first sequence; 0 where the step is computed as one."""
        asking = [place for place, sequence in enumerate(batch.sequences) if sequence.start]
        if not self._shape.staggered or len(asking) < 2:
            return 0
        return asking[len(asking) // 2]

    def _look(self, sequences: Sequence[SequenceInput], spans: Sequence[SequenceSpan], first_row: int) -> Sight:
        chunks = [
            self._chunk(sequence, span.query_start - first_row) for sequence, span in zip(sequences, spans, strict=True)
        ]
        shape = self._shape
        return look(
            chunks,
            shape.residency,
            shape.places,
            self._windows,
            block_size=shape.block_size,
            first_staged=shape.first_staged + first_row,
        )

    def _chunk(self, sequence: SequenceInput, first_row: int) -> Chunk:
        known = self._find(sequence)
        return Chunk(
            sequence=sequence.sequence_id,
            first_row=first_row,
            start=sequence.start,
            num_tokens=sequence.num_tokens,
            blocks=known.blocks,
            home=known.home,
        )

    def _find(self, sequence: SequenceInput) -> _Known:
        """Returns the blocks of a sequence, as they were found before where it has no new one."""
        size = self._shape.block_size
        runs = tuple((start // size, -(-stop // size)) for start, stop in sequence.runs)
        known = self._known.get(sequence.sequence_id)
        if known is not None and known.runs == runs:
            return known
        # A run may begin or end within a block, where the next one goes on.
        blocks: list[int] = []
        for start, stop in runs:
            blocks.extend(range(start + (bool(blocks) and blocks[-1] == start), stop))
        found = np.array(blocks, np.int64)
        known = _Known(runs, found, find_home(found, self._shape.residency, size))
        self._known[sequence.sequence_id] = known
        if len(self._known) > _MOST_KNOWN:
            self._known.popitem(last=False)
        return known

    def _attention(self, sight: Sight, named: Batch | None) -> MicroBatchAttention:
        """Plans the attention of a micro-batch; the first one of a step tells of ``named`` blocks."""
        place_of = np.full(len(sight.slots), -1)
        place_of[sight.part_rows] = np.arange(len(sight.part_rows))
        sessions = [
            self._session(place, session, told, own, sight, place_of, named)
            for place, session, told, own in zip(
                self._shape.places, self._sessions, self._told, sight.sessions, strict=True
            )
        ]
        local = LocalRows(
            plans=self._local_plans(sight) if sight.local else None,
            rows=self._rows(sight.local_rows),
            part_rows=self._rows(sight.part_rows),
        )
        return MicroBatchAttention(
            kernels=self._kernels, sessions=sessions, local=local, num_parts=len(sight.part_rows)
        )

    def _session(
        self,
        place: SessionPlace,
        session: AttentionSession,
        told: ToldTables,
        own: SessionSight,
        sight: Sight,
        place_of: NDArray[np.int64],
        named: Batch | None,
    ) -> SessionRows:
        group, heads = self._shape.queries_per_kv_head, place.kv_heads
        order = StepOrder(
            tables=told.update(own.tables),
            spans=own.spans,
            num_whole=own.num_whole,
            slots=tuple(own.slots.tolist()),
            names=() if named is None else named.names,
            forgotten=() if named is None else named.forgotten,
        )
        return SessionRows(
            session=session,
            heads=slice(heads.start * group, heads.stop * group),
            kv_heads=slice(heads.start, heads.stop),
            order=None if order == StepOrder() else order,
            query_rows=self._rows(own.query_rows),
            staged=self._rows(sight.slots[own.kv_rows]),
            whole_rows=self._rows(own.query_rows[: own.num_whole]),
            part_places=self._tensor(place_of[own.query_rows[own.num_whole :]]),
        )

    def _local_plans(self, sight: Sight) -> dict[Window, PartPlan]:
        return {
            window: self._kernels.plan_parts(
                [PartSpan(query_start=it.first_row, runs=it.runs, seen=it.seen[index]) for it in sight.local]
            )
            for index, window in enumerate(self._windows)
        }

    def _rows(self, rows: NDArray[np.int64]) -> Rows:
        if len(rows) and (np.diff(rows) == 1).all():
            return slice(int(rows[0]), int(rows[-1]) + 1)
        return self._tensor(rows)

    def _tensor(self, rows: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(rows.astype(np.int64)).to(self._device)

    def _flush(self) -> None:
        for session in self._sessions:
            session.flush()


def _rows_of(inputs: StepInputs, rows: slice) -> StepInputs:
    """Returns some rows of a step, which share its memory."""
    return StepInputs(
        token_ids=inputs.token_ids[rows], positions=inputs.positions[rows], slots=inputs.slots[rows], attention={}
    )
