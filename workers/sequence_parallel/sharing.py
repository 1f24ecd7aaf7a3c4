"""A rank's side of sharing sequences with others: lays its part of steps out, and meets the others in every layer."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from kernels.attention import Window
from kernels.protocol import Kernels
from placement.measured.exchange import (
    TYPICAL_BEFORE,
    TYPICAL_TOKENS,
    Exchange,
    ExchangeSizes,
    ExchangeSpeeds,
    ExpectedExchange,
    MeasuredExchange,
    choose,
    layer_s,
)
from placement.model.specs import ModelSpec
from placement.model.striping import WHOLE_TOKENS, Integers, Stripe
from placement.planning.memory import most_kv_tokens
from workers.collectives.group import TensorGroup
from workers.host.device import use_device
from workers.model.kv_cache import KVCache
from workers.sequence_parallel.exchange import SharedAttention, StepExchange, WindowParts
from workers.sequence_parallel.layout import (
    Meeting,
    Needed,
    Piece,
    find_needed,
    last_slots,
    local_runs,
    num_held,
    own_spans,
    pieces,
    received_spans,
    sent_slots,
    sizes,
    split_rows,
    visiting_spans,
    whole_rows,
)
from workers.sequence_parallel.measure import measure_speeds
from workers.step.graphs import StepInputs
from workers.step.layout import Prepared, awaiting_samplers, samplers, scored_prompts, send_integers
from workers.step.types import Batch, SequenceInput


class SequenceSharing:
    """What a runner needs of the ranks that share sequences with it.

    Attributes:
        speeds: measured at start; until then queries move.
        forced: a way to use whatever is faster: for measurements.
    """

    def __init__(
        self,
        *,
        model: ModelSpec,
        stripes: Sequence[Stripe],
        group: TensorGroup,
        kernels: Kernels,
        dtype: torch.dtype,
        device: torch.device,
        token_budget: int,
    ) -> None:
        """``stripes``: of all ranks of ``group``."""
        self._model = model
        self._stripes = tuple(stripes)
        self._group = group
        self._kernels = kernels
        self._dtype = dtype
        self._device = device
        self._token_budget = token_budget
        self._most_kv_tokens = most_kv_tokens(model, token_budget)
        self._query_bytes = model.num_heads * model.head_dim * dtype.itemsize
        self._kv_bytes = 2 * model.num_kv_heads * model.head_dim * dtype.itemsize
        holders = [rank for rank, stripe in enumerate(stripes) if stripe.width]
        self._attention = SharedAttention(group=group, kernels=kernels, holders=holders)
        self.speeds: ExchangeSpeeds | None = None
        self.forced: Exchange | None = None

    def measure(self) -> None:
        """Finds out ``speeds``. All ranks call it at the same time. Raises PeerFailed."""
        self.speeds = measure_speeds(
            self._group, model=self._model, kernels=self._kernels, dtype=self._dtype, device=self._device
        )

    def choose(self, batch: Batch) -> Batch:
        """The batch, with the way of exchanging that suits it. At the leader, who tells the others."""
        return replace(batch, exchange=self._way(batch))

    def _way(self, batch: Batch) -> Exchange:
        if self.forced is not None:
            return self.forced
        if self.speeds is None or all(sequence.num_tokens <= WHOLE_TOKENS for sequence in batch.sequences):
            return Exchange.TOKEN_RING
        return choose(self._sizes(batch), self.speeds, most_kv_tokens=self._most_kv_tokens)

    def _sizes(self, batch: Batch) -> ExchangeSizes:
        windows = self._model.distinct_windows
        return sizes(batch, self._stripes, windows, query_bytes=self._query_bytes, kv_bytes=self._kv_bytes)

    @property
    def measured(self) -> MeasuredExchange | None:
        """``speeds``, and what :meth:`choose` makes of them for typical chunks that the model and a step may have."""
        if self.speeds is None:
            return None
        context = self._model.max_context_tokens
        num_tokens = min(TYPICAL_TOKENS, self._token_budget, context)
        befores = [num_before for num_before in TYPICAL_BEFORE if num_before + num_tokens <= context]
        expected = (
            () if num_tokens <= WHOLE_TOKENS else tuple(self._expect(num_tokens, it, self.speeds) for it in befores)
        )
        return MeasuredExchange(speeds=self.speeds, expected=expected)

    def _expect(self, num_tokens: int, num_before: int, speeds: ExchangeSpeeds) -> ExpectedExchange:
        batch = Batch(sequences=(SequenceInput(token_ids=[0] * num_tokens, start=num_before, runs=()),))
        way = self._way(batch)
        expected_s = layer_s(way, self._sizes(batch), speeds)
        return ExpectedExchange(num_tokens=num_tokens, num_before=num_before, way=way.value, layer_s=expected_s)

    def layout(self, *, windows: Sequence[Window], cache: KVCache) -> "StripedLayout":
        """How this rank lays out its part of a step, whose KV goes to ``cache``."""
        return StripedLayout(
            stripes=self._stripes,
            group=self._group,
            kernels=self._kernels,
            windows=windows,
            spare_slot=spare_slot(cache),
            device=self._device,
            attention=self._attention,
        )


def spare_slot(cache: KVCache) -> int:
    """The last slot of a cache, which belongs to no block: for the KV of tokens that other ranks hold."""
    return cache.layers[0].keys.shape[1] - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedRows:
    """Rows that logits are computed of, some of which other ranks have. As :class:`NeededRows` says."""

    group: TensorGroup
    needed: Needed
    own_rows: Tensor
    own_places: Tensor
    given_rows: Tensor

    def take(self, y: Tensor) -> Tensor:
        """Those [N, E] of all ranks, of this one's [T, E]. Raises PeerFailed."""
        found = y.new_empty(self.needed.count, y.shape[1])
        found[self.own_places] = y[self.own_rows]
        given = y[self.given_rows].cpu()
        comes = {rank: given.new_empty(len(places), y.shape[1]) for rank, places in self.needed.come_places.items()}
        others = [rank for rank in range(self.group.num_ranks) if rank != self.group.rank]
        if len(given) or comes:
            self.group.exchange(dict.fromkeys(others, given) if len(given) else {}, comes)
        for rank, rows in comes.items():
            found[list(self.needed.come_places[rank])] = rows.to(y.device)
        return found

    def __len__(self) -> int:
        return self.needed.count


class StripedLayout:
    """The layout of a rank that computes some of the tokens: see :mod:`workers.sequence_parallel.layout`."""

    def __init__(
        self,
        *,
        stripes: Sequence[Stripe],
        group: TensorGroup,
        kernels: Kernels,
        windows: Sequence[Window],
        spare_slot: int,
        device: torch.device,
        attention: SharedAttention,
    ) -> None:
        self._stripes = stripes
        self._group = group
        self._kernels = kernels
        self._windows = windows
        self._spare_slot = spare_slot
        self._device = device
        self._attention = attention

    @torch.inference_mode()
    def lay_out(self, batch: Batch) -> Prepared:
        """As :class:`workers.step.layout.StepLayout` says."""
        use_device(self._device)  # of the calling thread: pinned memory belongs to its current device, too
        everyone = [pieces(batch, stripe) for stripe in self._stripes]
        mine = everyone[self._group.rank]
        runs = local_runs(batch, self._stripes[self._group.rank])
        awaiting = [piece for piece in mine if piece.sequence.awaits_token]
        here = [i for i, piece in enumerate(awaiting) if piece.stop - 1 in piece.positions[-1:]]
        needed = find_needed(batch, self._stripes, self._group.rank)
        return Prepared(
            batch=batch,
            inputs=self._flatten(mine, runs),
            awaiting=awaiting_samplers(batch),
            awaited=tuple(here),
            awaiting_rows=self._send([awaiting[i].first_row + len(awaiting[i].positions) - 1 for i in here]),
            num_sampled=sum(sequence.samples for sequence in batch.sequences),
            samplers=samplers(batch),
            scored=scored_prompts(batch),
            needed=SharedRows(
                group=self._group,
                needed=needed,
                own_rows=self._send(needed.own_rows),
                own_places=self._send(needed.own_places),
                given_rows=self._send(needed.given_rows),
            ),
            attend=partial(self._attention.attend, self._exchange(batch, everyone, runs)),
        )

    def _flatten(self, mine: Sequence[Piece], runs: Sequence[Integers]) -> StepInputs:
        """This rank's tokens, side by side; one that is awaited is 0."""
        stripe = self._stripes[self._group.rank]
        ids, slots = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for piece, its_runs in zip(mine, runs, strict=True):
            known = np.array([*piece.sequence.token_ids, *([0] if piece.sequence.awaits_token else [])], np.int64)
            ids.append(known[piece.positions - piece.sequence.start])
            slots.append(self._slots(piece, its_runs, stripe))
        positions = np.concatenate([np.empty(0, np.int64), *(piece.positions for piece in mine)])
        rows = [x.tolist() for x in (np.concatenate(ids), positions, np.concatenate(slots))]
        token_ids, at, where = self._send(rows)
        return StepInputs(token_ids=token_ids, positions=at, slots=where, attention={})

    def _slots(self, piece: Piece, runs: Integers, stripe: Stripe) -> Integers:
        """Where the KV of a piece's tokens goes: the spare slot for what another rank holds."""
        own = stripe.positions(piece.sequence.start, piece.stop)
        slots = np.full(len(piece.positions), self._spare_slot)
        slots[np.isin(piece.positions, own)] = last_slots(runs, len(own))
        return slots

    def _exchange(self, batch: Batch, everyone: Sequence[tuple[Piece, ...]], runs: Sequence[Integers]) -> StepExchange:
        mine = everyone[self._group.rank]
        return StepExchange(
            way=batch.exchange,
            windows={window: self._parts(batch, everyone, runs, window) for window in self._windows},
            split_rows=self._send(split_rows(mine)),
            whole_rows=self._send(whole_rows(mine)),
            has_split=any(not piece.is_whole for piece in mine),
        )

    def _parts(
        self, batch: Batch, everyone: Sequence[tuple[Piece, ...]], runs: Sequence[Integers], window: Window
    ) -> WindowParts:
        me, stripes = self._group.rank, self._stripes
        mine, stripe = everyone[me], stripes[me]
        others = [rank for rank in range(len(stripes)) if rank != me]
        split = [piece for piece in mine if not piece.is_whole]
        if batch.exchange is Exchange.TOKEN_RING:
            met = {rank: visiting_spans(everyone[rank], runs, stripe, window) for rank in others}
            kv_slots = np.empty(0, np.int64)
        else:
            met = {rank: received_spans(mine, stripes[rank], window) for rank in others}
            kv_slots = sent_slots(mine, runs, stripe, window)
        return WindowParts(
            own=self._kernels.plan_parts(*own_spans(mine, runs, stripe, window, batch.shared)),
            met={rank: self._kernels.plan_parts(spans) for rank, spans in met.items()} if split else {},
            kv_slots=self._send(kv_slots.tolist()),
            meeting=Meeting(
                num_queries=tuple(len(split_rows(its)) for its in everyone),
                num_kv=tuple(sum(num_held(piece, its, window) for piece in split) for its in stripes),
            ),
        )

    def _send(self, values: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
        return send_integers(values, self._device)
