"""A rank's side of sharing sequences: it lays out its part of each step, and exchanges with others in each layer."""

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
    ChunkShare,
    Needed,
    Partners,
    chunk_shares,
    find_needed,
    last_slots,
    local_runs,
    num_held,
    own_spans,
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
    """What a runner needs in order to share sequences with other ranks.

    Attributes:
        speeds: the speeds measured at start; while there are none, queries move.
        forced: an exchange to use for all steps, for measurements; None: the fastest is chosen.
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
        """``stripes`` are those of all ranks of ``group``, and ``token_budget`` is the most tokens of a step."""
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
        """Measures ``speeds``. All ranks call it at the same time. Raises PeerFailed."""
        self.speeds = measure_speeds(
            self._group, model=self._model, kernels=self._kernels, dtype=self._dtype, device=self._device
        )

    def choose(self, batch: Batch) -> Batch:
        """Returns the batch with the exchange that is fastest for it. For the leader, which tells the other ranks."""
        return replace(batch, exchange=self._choose(batch))

    def _choose(self, batch: Batch) -> Exchange:
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
        """Returns ``speeds``, and what :meth:`choose` chooses for typical chunks; None before they are measured.

        Chunks are no longer than the model's context and a step allow.
        """
        if self.speeds is None:
            return None
        context = self._model.max_context_tokens
        num_tokens = min(TYPICAL_TOKENS, self._token_budget, context)
        befores = [num_before for num_before in TYPICAL_BEFORE if num_before + num_tokens <= context]
        expected = (
            ()
            if num_tokens <= WHOLE_TOKENS
            else tuple(self._expect(num_tokens, before, self.speeds) for before in befores)
        )
        return MeasuredExchange(speeds=self.speeds, expected=expected)

    def _expect(self, num_tokens: int, num_before: int, speeds: ExchangeSpeeds) -> ExpectedExchange:
        """Returns the exchange of a chunk after ``num_before`` tokens, and how long it takes in a layer."""
        batch = Batch(sequences=(SequenceInput(token_ids=[0] * num_tokens, start=num_before, runs=()),))
        exchange = self._choose(batch)
        expected_s = layer_s(exchange, self._sizes(batch), speeds)
        return ExpectedExchange(num_tokens=num_tokens, num_before=num_before, way=exchange.value, layer_s=expected_s)

    def layout(self, *, windows: Sequence[Window], cache: KVCache) -> "StripedLayout":
        """Makes the layout of this rank's part of steps, whose KV goes to ``cache``."""
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
    """Returns the last slot of a cache, which belongs to no block and takes the KV of tokens that other ranks hold."""
    return cache.layers[0].keys.shape[1] - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedRows:
    """The rows that logits are computed from, some of which other ranks have.

    Implements :class:`workers.step.layout.NeededRows`.
    """

    group: TensorGroup
    needed: Needed
    own_rows: Tensor
    own_places: Tensor
    sent_rows: Tensor

    def take(self, y: Tensor) -> Tensor:
        """Returns the needed rows [N, E] of all ranks, given this rank's output [T, E]. Raises PeerFailed."""
        result = y.new_empty(self.needed.count, y.shape[1])
        result[self.own_places] = y[self.own_rows]
        sent = y[self.sent_rows].cpu()
        places = self.needed.received_places
        received = {rank: sent.new_empty(len(of_rank), y.shape[1]) for rank, of_rank in places.items()}
        others = [rank for rank in range(self.group.num_ranks) if rank != self.group.rank]
        if len(sent) or received:
            self.group.exchange(dict.fromkeys(others, sent) if len(sent) else {}, received)
        for rank, rows in received.items():
            result[list(places[rank])] = rows.to(y.device)
        return result

    def __len__(self) -> int:
        return self.needed.count


class StripedLayout:
    """Lays out the part of a step that one rank computes: see :mod:`workers.sequence_parallel.layout`."""

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
        """Implements :meth:`workers.step.layout.StepLayout.lay_out`."""
        use_device(self._device)  # the calling thread's pinned memory belongs to its current device
        all_shares = [chunk_shares(batch, stripe) for stripe in self._stripes]
        own_shares = all_shares[self._group.rank]
        runs = local_runs(batch, self._stripes[self._group.rank])
        awaiting = [share for share in own_shares if share.sequence.awaits_token]
        own = [i for i, share in enumerate(awaiting) if share.stop - 1 in share.positions[-1:]]
        needed = find_needed(batch, self._stripes, self._group.rank)
        return Prepared(
            batch=batch,
            inputs=self._flatten(own_shares, runs),
            awaiting=awaiting_samplers(batch),
            awaited=tuple(own),
            awaiting_rows=self._send([awaiting[i].first_row + len(awaiting[i].positions) - 1 for i in own]),
            num_sampled=sum(sequence.samples for sequence in batch.sequences),
            samplers=samplers(batch),
            scored=scored_prompts(batch),
            needed=SharedRows(
                group=self._group,
                needed=needed,
                own_rows=self._send(needed.own_rows),
                own_places=self._send(needed.own_places),
                sent_rows=self._send(needed.sent_rows),
            ),
            attend=partial(self._attention.attend, self._exchange(batch, all_shares, runs)),
        )

    def _flatten(self, own_shares: Sequence[ChunkShare], runs: Sequence[Integers]) -> StepInputs:
        """Returns the inputs of this rank's tokens, one sequence after the other; an awaited token is 0."""
        stripe = self._stripes[self._group.rank]
        ids, slots = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for share, local in zip(own_shares, runs, strict=True):
            known = np.array([*share.sequence.token_ids, *([0] if share.sequence.awaits_token else [])], np.int64)
            ids.append(known[share.positions - share.sequence.start])
            slots.append(self._slots(share, local, stripe))
        positions = np.concatenate([np.empty(0, np.int64), *(share.positions for share in own_shares)])
        rows = [x.tolist() for x in (np.concatenate(ids), positions, np.concatenate(slots))]
        token_ids, on_device, local_slots = self._send(rows)
        return StepInputs(token_ids=token_ids, positions=on_device, slots=local_slots, attention={})

    def _slots(self, share: ChunkShare, runs: Integers, stripe: Stripe) -> Integers:
        """Returns the slots that the KV of a share's tokens goes to: the spare slot for what another rank holds."""
        own = stripe.positions(share.sequence.start, share.stop)
        slots = np.full(len(share.positions), self._spare_slot)
        slots[np.isin(share.positions, own)] = last_slots(runs, len(own))
        return slots

    def _exchange(
        self, batch: Batch, all_shares: Sequence[tuple[ChunkShare, ...]], runs: Sequence[Integers]
    ) -> StepExchange:
        """Plans the step's attention, given the shares of all ranks."""
        own_shares = all_shares[self._group.rank]
        return StepExchange(
            exchange=batch.exchange,
            windows={window: self._parts(batch, all_shares, runs, window) for window in self._windows},
            split_rows=self._send(split_rows(own_shares)),
            whole_rows=self._send(whole_rows(own_shares)),
            has_split=any(not share.is_whole for share in own_shares),
        )

    def _parts(
        self, batch: Batch, all_shares: Sequence[tuple[ChunkShare, ...]], runs: Sequence[Integers], window: Window
    ) -> WindowParts:
        """Plans the step's attention in layers of one window."""
        me, stripes = self._group.rank, self._stripes
        own_shares, stripe = all_shares[me], stripes[me]
        others = [rank for rank in range(len(stripes)) if rank != me]
        split = [share for share in own_shares if not share.is_whole]
        if batch.exchange is Exchange.TOKEN_RING:
            exchanged = {rank: visiting_spans(all_shares[rank], runs, stripe, window) for rank in others}
            kv_slots = np.empty(0, np.int64)
        else:
            exchanged = {rank: received_spans(own_shares, stripes[rank], window) for rank in others}
            kv_slots = sent_slots(own_shares, runs, stripe, window)
        return WindowParts(
            own=self._kernels.plan_parts(*own_spans(own_shares, runs, stripe, window, batch.shared)),
            exchanged={rank: self._kernels.plan_parts(spans) for rank, spans in exchanged.items()} if split else {},
            kv_slots=self._send(kv_slots.tolist()),
            partners=Partners(
                num_queries=tuple(len(split_rows(shares)) for shares in all_shares),
                num_kv=tuple(sum(num_held(share, held_by, window) for share in split) for held_by in stripes),
            ),
        )

    def _send(self, values: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
        return send_integers(values, self._device)
