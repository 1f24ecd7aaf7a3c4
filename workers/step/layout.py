"""Lays a batch of sequences side by side, for a rank that computes all their tokens.

A step is laid out on one thread while the step before it computes on another. The token that the earlier step samples
for a sequence is not known yet, so the layout keeps its place.
"""

from collections.abc import Callable, Sequence
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
        batch: the sequences' chunks.
        inputs: the tokens of the step. Those that are awaited are 0.
        awaiting: the samplers that know the awaited tokens when the step begins; empty at followers.
        awaited: the indices of the awaited tokens that this rank computes with.
        awaiting_rows: the row of each of these.
        num_sampled: the number of rows after which a token is sampled.
        samplers: the sampler of each of these rows; empty at followers.
        scored: the prompts to be scored, with the places of their sequences.
        needed: the rows whose hidden states give logits: those that tokens are sampled after, then those of each of
            ``scored``.
        attend: attends to KV that other ranks hold too; None where ranks do not share sequences.
        micro_batches: ``inputs`` in two parts that are computed in turn; empty where the step is not overlapped.
        attends: attends to KV that others hold, of each of the micro-batches; empty where none do.
        computed: is called once the layers are computed.
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
    attends: tuple[Attend, ...] = ()
    computed: Callable[[], None] | None = None


class NeededRows(Protocol):
    """The rows of a step whose hidden states give logits."""

    def take(self, y: Tensor) -> Tensor:
        """Selects [N, E] of a rank's hidden states [T, E]. Raises PeerFailed where a rank that has some was lost."""

    def __len__(self) -> int:
        """Counts the rows (N)."""


@dataclass(frozen=True, slots=True)
class OwnRows:
    """Rows that the rank computes itself."""

    rows: Tensor

    def take(self, y: Tensor) -> Tensor:
        """Selects [N, E] of the rank's hidden states [T, E]."""
        return y[self.rows]

    def __len__(self) -> int:
        return len(self.rows)


class StepLayout(Protocol):
    """Lays steps out for the device."""

    def lay_out(self, batch: Batch) -> Prepared:
        """Lays a batch out. It may run while another step executes."""


class Sharing(Protocol):
    """The ranks that share sequences with a runner's own."""

    def choose(self, batch: Batch) -> Batch:
        """Adds the exchange of the ranks to the batch. The leader calls it, and tells the others."""

    def layout(self, *, windows: Sequence[Window], cache: KVCache) -> StepLayout:
        """Makes what lays out this rank's part of a step, whose KV goes to ``cache``."""


class Offload(Protocol):
    """The attention workers that hold keys and values of a runner."""

    def layout(self, *, kernels: Kernels, device: torch.device) -> StepLayout:
        """Makes what lays out this rank's steps. Called once."""

    def recover(self) -> None:
        """Has attention workers hold keys and values again, all of which are lost. Raises what is lost for good."""


def send_integers(values: Sequence[int] | Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Sends integers to the device, from pinned memory, since the host would otherwise wait for the running step."""
    if device.type != "cuda":
        return torch.tensor(values, dtype=torch.int64, device=device)
    return torch.tensor(values, dtype=torch.int64, pin_memory=True).to(device, non_blocking=True)


class SideBySide:
    """Lays steps out for a rank that computes all tokens."""

    def __init__(self, *, kernels: Kernels, windows: Sequence[Window], device: torch.device) -> None:
        """``windows`` are those of the rank's layers."""
        self._kernels = kernels
        self._windows = windows
        self._device = device

    @torch.inference_mode()
    def lay_out(self, batch: Batch, *, is_overlapped: bool = False) -> Prepared:
        """Lays a batch out, on request in two micro-batches, for which :func:`can_overlap` must hold."""
        use_device(self._device)  # of the calling thread: pinned memory belongs to its current device, too
        spans = spans_of(batch)
        inputs = self.flatten(batch, spans, plans=not is_overlapped)
        micro_batches = self._micro_batches(batch, spans, inputs) if is_overlapped else ()
        return self.prepared(batch, spans, inputs, micro_batches)

    def prepared(
        self,
        batch: Batch,
        spans: Sequence[SequenceSpan],
        inputs: StepInputs,
        micro_batches: tuple[StepInputs, ...] = (),
    ) -> Prepared:
        """Puts together what is known of a step besides its inputs."""
        last = [span.query_start + span.num_queries - 1 for span in spans]
        placed = list(zip(batch.sequences, spans, last, strict=True))
        rows = [row for s, _, row in placed if s.samples]
        needed = list(rows)
        for s, span, _ in placed:
            if s.scored is not None:
                first = span.query_start + s.scored.first_index - 1 - s.start
                needed += range(first, first + len(s.scored.token_ids))
        awaiting_rows = [row for s, _, row in placed if s.awaits_token]
        return Prepared(
            batch=batch,
            inputs=inputs,
            micro_batches=micro_batches,
            awaiting=awaiting_samplers(batch),
            awaited=tuple(range(len(awaiting_rows))),
            awaiting_rows=send_integers(awaiting_rows, self._device),
            num_sampled=len(rows),
            samplers=samplers(batch),
            scored=scored_prompts(batch),
            needed=OwnRows(send_integers(needed, self._device)),
        )

    def _micro_batches(self, batch: Batch, spans: Sequence[SequenceSpan], inputs: StepInputs) -> tuple[StepInputs, ...]:
        """Cuts a step in two, which share the memory of ``inputs``."""
        assert can_overlap(batch), batch
        middle = first_micro_batch(batch.num_tokens)
        micro_batches = []
        for start, stop in ((0, middle), (middle, batch.num_tokens)):
            cut_spans = [part for span in spans if (part := _cut_span(span, start, stop)) is not None]
            shared = _within(batch.shared, spans, start, stop)
            rows = slice(start, stop)
            micro_batches.append(
                StepInputs(
                    token_ids=inputs.token_ids[rows],
                    positions=inputs.positions[rows],
                    slots=inputs.slots[rows],
                    attention={w: self._kernels.plan(cut_spans, window=w, shared=shared) for w in self._windows},
                )
            )
        return tuple(micro_batches)

    def flatten(
        self, batch: Batch, spans: Sequence[SequenceSpan], *, plans: bool, own_slots: Sequence[int] | None = None
    ) -> StepInputs:
        """Puts the batch's tokens side by side, with 0 for a token that is awaited.

        Args:
            plans: whether attention is planned.
            own_slots: the slots of this rank's cache for the rows, where they are not those of the blocks.
        """
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
        slots = slots if own_slots is None else list(own_slots)
        sent_ids, sent_positions, sent_slots = send_integers([token_ids, positions, slots], self._device)
        return StepInputs(
            token_ids=sent_ids,
            positions=sent_positions,
            slots=sent_slots,
            attention={w: self._kernels.plan(spans, window=w, shared=batch.shared) for w in self._windows if plans},
        )


def can_overlap(batch: Batch) -> bool:
    """Tells whether the batch has enough tokens for two micro-batches."""
    return batch.num_tokens - first_micro_batch(batch.num_tokens) >= MICRO_BATCH_TOKENS


def _within(
    shared: Sequence[SharedSpan], spans: Sequence[SequenceSpan], start: int, stop: int
) -> tuple[SharedSpan, ...]:
    """Selects what sequences with rows in ``[start, stop)`` have in common, and numbers them from the first of them.

    Members compute a single token each, so each of them is in one micro-batch alone.
    """
    before = sum(span.query_start + span.num_queries <= start for span in spans)
    selected = []
    for common in shared:
        assert all(spans[member].num_queries == 1 for member in common.members), common
        members = tuple(member - before for member in common.members if start <= spans[member].query_start < stop)
        if len(members) > 1:
            selected.append(replace(common, members=members))
    return tuple(selected)


def _cut_span(span: SequenceSpan, start: int, stop: int) -> SequenceSpan | None:
    """Cuts a span to the queries in rows ``[start, stop)``, and counts rows from ``start``; None where it has none."""
    first = max(span.query_start, start)
    last = min(span.query_start + span.num_queries, stop)
    if first >= last:
        return None
    num_behind = span.query_start + span.num_queries - last
    runs = split_runs(span.runs, span.num_tokens - num_behind)[0] if num_behind else span.runs
    return SequenceSpan(query_start=first - start, num_queries=last - first, runs=runs)


def awaiting_samplers(batch: Batch) -> tuple[SamplerState, ...]:
    """Lists the samplers of the sequences that await a token."""
    return tuple(s.sampler for s in batch.sequences if s.awaits_token and s.sampler is not None)


def samplers(batch: Batch) -> tuple[SamplerState, ...]:
    """Lists the samplers of the sequences that a token is sampled for."""
    return tuple(s.sampler for s in batch.sequences if s.samples and s.sampler is not None)


def scored_prompts(batch: Batch) -> tuple[tuple[int, ScoredPrompt], ...]:
    """Lists the prompts that are scored, with the places of their sequences."""
    return tuple((index, s.scored) for index, s in enumerate(batch.sequences) if s.scored is not None)


def spans_of(batch: Batch) -> list[SequenceSpan]:
    """Finds the rows of each sequence's chunk in the batch."""
    spans: list[SequenceSpan] = []
    start = 0
    for sequence in batch.sequences:
        spans.append(SequenceSpan(query_start=start, num_queries=sequence.num_tokens, runs=sequence.runs))
        start += sequence.num_tokens
    return spans
