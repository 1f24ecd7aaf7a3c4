"""Lays a batch of sequences side by side, as a rank that has all their tokens computes it.

A step is laid out on one thread while the step before it computes on another. What a sequence was given by that step
is not known yet; its place is kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from kernels.attention import Attend, SequenceSpan, SharedSpan, Window, split_runs
from kernels.protocol import Kernels
from placement.measured.overlap import MICRO_BATCH_TOKENS, first_micro_batch
from workers.host.device import use_device
from workers.model.kv_cache import KVCache
from workers.sampling.sampling import SamplerState
from workers.step.graphs import StepInputs
from workers.step.scoring import ScoredPrompt
from workers.step.types import Batch


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A step laid out for the device.

    Attributes:
        inputs: all but the tokens that are awaited, which are 0.
        awaiting: samplers that know, when the step begins, the tokens that are awaited. None at followers.
        awaited: which of these tokens the rank computes with, by their order; ``awaiting_rows``: in which rows.
        num_sampled: rows after which a token is sampled.
        samplers: how, one for each. None at followers.
        scored: place of its sequence and prompt of what is scored.
        needed: the hidden states that give logits: those that tokens are sampled after, then those of each of
            ``scored``.
        attend: attends to KV that other ranks hold too, where ranks share sequences.
        micro_batches: ``inputs``, in two parts that are computed in turn, where the step is overlapped.
    """

    batch: Batch
    inputs: StepInputs
    awaiting: tuple[SamplerState, ...]
    awaited: tuple[int, ...]
    awaiting_rows: Tensor
    num_sampled: int
    samplers: tuple[SamplerState, ...]
    scored: tuple[tuple[int, ScoredPrompt], ...]
    needed: "NeededRows"
    attend: Attend | None = None
    micro_batches: tuple[StepInputs, ...] = ()


class NeededRows(Protocol):
    """Rows of a step whose hidden states give logits."""

    def take(self, y: Tensor) -> Tensor:
        """Those [N, E] of a rank's [T, E]. Raises PeerFailed where other ranks have some."""

    def __len__(self) -> int:
        """N."""


@dataclass(frozen=True, slots=True)
class OwnRows:
    """Rows that the rank has itself."""

    rows: Tensor

    def take(self, y: Tensor) -> Tensor:
        """As :class:`NeededRows` says."""
        return y[self.rows]

    def __len__(self) -> int:
        return len(self.rows)


class StepLayout(Protocol):
    """Lays out steps."""

    def lay_out(self, batch: Batch) -> Prepared:
        """May run while another step executes."""


class Sharing(Protocol):
    """The ranks that share sequences with a runner's own."""

    def choose(self, batch: Batch) -> Batch:
        """Adds to the batch how the ranks exchange. Called at the leader, who tells the others."""

    def layout(self, *, windows: Sequence[Window], cache: KVCache) -> StepLayout:
        """The layout of this rank's part of a step, whose KV goes to ``cache``."""


def send_integers(values: Sequence[int] | Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Integers on the device. From pinned memory, or the host would wait for the step that executes."""
    if device.type != "cuda":
        return torch.tensor(values, dtype=torch.int64, device=device)
    return torch.tensor(values, dtype=torch.int64, pin_memory=True).to(device, non_blocking=True)


class SideBySide:
    """The layout of a rank that computes all tokens."""

    def __init__(self, *, kernels: Kernels, windows: Sequence[Window], device: torch.device) -> None:
        """``windows``: those of the rank's layers."""
        self._kernels = kernels
        self._windows = windows
        self._device = device

    @torch.inference_mode()
    def lay_out(self, batch: Batch, *, is_overlapped: bool = False) -> Prepared:
        """As :class:`StepLayout` says; in two micro-batches, where the batch :func:`can_overlap`."""
        use_device(self._device)  # of the calling thread: pinned memory belongs to its current device, too
        spans = _spans(batch)
        last = [span.query_start + span.num_queries - 1 for span in spans]
        placed = list(zip(batch.sequences, spans, last, strict=True))
        rows = [row for s, _, row in placed if s.samples]
        needed = list(rows)
        for s, span, _ in placed:
            if s.scored is not None:
                first = span.query_start + s.scored.first_index - 1 - s.start
                needed += range(first, first + len(s.scored.token_ids))
        awaiting_rows = [row for s, _, row in placed if s.awaits_token]
        inputs = self._flatten(batch, spans, plans=not is_overlapped)
        return Prepared(
            batch=batch,
            inputs=inputs,
            micro_batches=self._micro_batches(batch, spans, inputs) if is_overlapped else (),
            awaiting=awaiting_samplers(batch),
            awaited=tuple(range(len(awaiting_rows))),
            awaiting_rows=send_integers(awaiting_rows, self._device),
            num_sampled=len(rows),
            samplers=samplers(batch),
            scored=scored_prompts(batch),
            needed=OwnRows(send_integers(needed, self._device)),
        )

    def _micro_batches(self, batch: Batch, spans: Sequence[SequenceSpan], inputs: StepInputs) -> tuple[StepInputs, ...]:
        """The first tokens and the others, on the memory of ``inputs``."""
        assert can_overlap(batch), batch
        middle = first_micro_batch(batch.num_tokens)
        micro_batches = []
        for start, stop in ((0, middle), (middle, batch.num_tokens)):
            its_spans = [part for span in spans if (part := _cut_span(span, start, stop)) is not None]
            shared = _within(batch.shared, spans, start, stop)
            rows = slice(start, stop)
            micro_batches.append(
                StepInputs(
                    token_ids=inputs.token_ids[rows],
                    positions=inputs.positions[rows],
                    slots=inputs.slots[rows],
                    attention={w: self._kernels.plan(its_spans, window=w, shared=shared) for w in self._windows},
                )
            )
        return tuple(micro_batches)

    def _flatten(self, batch: Batch, spans: Sequence[SequenceSpan], *, plans: bool) -> StepInputs:
        """The batch's tokens, side by side; one that is awaited is 0."""
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        for sequence, span in zip(batch.sequences, spans, strict=True):
            token_ids.extend(sequence.token_ids)
            if sequence.awaits_token:
                token_ids.append(0)
            positions.extend(range(sequence.start, sequence.start + span.num_queries))
            for run in span.query_runs:
                slots.extend(range(*run))
            assert len(slots) == len(positions) == len(token_ids), sequence
        ids, at, where = send_integers([token_ids, positions, slots], self._device)
        return StepInputs(
            token_ids=ids,
            positions=at,
            slots=where,
            attention={w: self._kernels.plan(spans, window=w, shared=batch.shared) for w in self._windows if plans},
        )


def can_overlap(batch: Batch) -> bool:
    """Whether two micro-batches can share the batch: both have enough tokens."""
    return batch.num_tokens - first_micro_batch(batch.num_tokens) >= MICRO_BATCH_TOKENS


def _within(
    shared: Sequence[SharedSpan], spans: Sequence[SequenceSpan], start: int, stop: int
) -> tuple[SharedSpan, ...]:
    """What sequences of rows ``[start, stop)`` have in common, numbered from the first that has a row there.

    Members compute a single token each, so that all of theirs is in one micro-batch.
    """
    before = sum(span.query_start + span.num_queries <= start for span in spans)
    found = []
    for common in shared:
        assert all(spans[member].num_queries == 1 for member in common.members), common
        members = tuple(member - before for member in common.members if start <= spans[member].query_start < stop)
        if len(members) > 1:
            found.append(replace(common, members=members))
    return tuple(found)


def _cut_span(span: SequenceSpan, start: int, stop: int) -> SequenceSpan | None:
    """Of the queries in rows ``[start, stop)``, in rows from 0; None where the span has none."""
    first = max(span.query_start, start)
    last = min(span.query_start + span.num_queries, stop)
    if first >= last:
        return None
    num_behind = span.query_start + span.num_queries - last
    runs = split_runs(span.runs, span.num_tokens - num_behind)[0] if num_behind else span.runs
    return SequenceSpan(query_start=first - start, num_queries=last - first, runs=runs)


def awaiting_samplers(batch: Batch) -> tuple[SamplerState, ...]:
    """Of the sequences that await a token."""
    return tuple(s.sampler for s in batch.sequences if s.awaits_token and s.sampler is not None)


def samplers(batch: Batch) -> tuple[SamplerState, ...]:
    """Of the sequences that a token is sampled for."""
    return tuple(s.sampler for s in batch.sequences if s.samples and s.sampler is not None)


def scored_prompts(batch: Batch) -> tuple[tuple[int, ScoredPrompt], ...]:
    """Of the sequences that are scored, their places and prompts."""
    return tuple((index, s.scored) for index, s in enumerate(batch.sequences) if s.scored is not None)


def _spans(batch: Batch) -> list[SequenceSpan]:
    """Where each sequence's chunk lies in the batch."""
    spans: list[SequenceSpan] = []
    start = 0
    for sequence in batch.sequences:
        spans.append(SequenceSpan(query_start=start, num_queries=sequence.num_tokens, runs=sequence.runs))
        start += sequence.num_tokens
    return spans
