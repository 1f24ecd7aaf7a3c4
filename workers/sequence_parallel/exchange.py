"""A layer's attention where ranks share sequences: they exchange queries or KV, and merge partial results.

Whichever exchange is used, the same parts of each query's attention are computed, one for each rank's KV, and merged in
rank order. So all exchanges give the same bits, as long as all ranks compute with the same code.

    T  rows of the rank's batch    H  query heads    K  KV heads    D  head dimension
    n  some rows: its split rows, which no other rank computes, or its whole rows, which all ranks compute
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.attention import LayerCache, PartPlan, Window
from kernels.protocol import Kernels
from kernels.reference import merge_partials
from placement.measured.exchange import Exchange
from workers.collectives.group import TensorGroup
from workers.sequence_parallel.layout import Partners

Part = tuple[Tensor, Tensor]
"""Attention over a part of what queries see [n, H, D], and its log-sum-exp [n, H]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowParts:
    """A step's parts of attention in layers of one window.

    Attributes:
        own: the plan of all rows over the rank's own KV.
        exchanged: by other rank, the plan of its queries over this rank's KV, or of this rank's split rows over its KV.
        kv_slots: the slots of the KV that this rank sends.
        partners: which ranks exchange something.
    """

    own: PartPlan
    exchanged: Mapping[int, PartPlan]
    kv_slots: Tensor
    partners: Partners


@dataclass(frozen=True, slots=True, kw_only=True)
class StepExchange:
    """A step's attention as the ranks share it.

    Attributes:
        exchange: how queries and KV of split rows are exchanged.
        split_rows: the rows of this rank's batch that no other rank computes.
        whole_rows: the rows that all ranks compute.
        has_split: whether any rank has split rows.
    """

    exchange: Exchange
    windows: Mapping[Window, WindowParts]
    split_rows: Tensor
    whole_rows: Tensor
    has_split: bool


class SharedAttention:
    """Computes the attention of one layer after the other. For the thread that executes steps."""

    def __init__(self, *, group: TensorGroup, kernels: Kernels, holders: Sequence[int]) -> None:
        """``holders`` are the ranks that hold KV, in rank order."""
        self._group = group
        self._kernels = kernels
        self._holders = holders

    def attend(
        self, step: StepExchange, layer: int, window: Window, query: Tensor, cache: LayerCache, scale: float
    ) -> Tensor:
        """Computes the attention [T, H, D] of ``query`` [T, H, D] over all ranks' KV; ``cache`` has this rank's.

        All ranks call it for the same layer of the same step. Raises PeerFailed.
        """
        parts = step.windows[window]
        if not step.has_split:
            own = self._kernels.attend_parts(query, cache, parts.own, scale)
            sends, receives = self._whole_exchange(own)
            self._group.exchange(sends, receives)
            return self._merge(own, _unpack_all(receives, query), query)
        attend = self._move_queries if step.exchange is Exchange.TOKEN_RING else self._move_kv
        return attend(step, parts, query, cache, scale)

    def _move_queries(
        self, step: StepExchange, parts: WindowParts, query: Tensor, cache: LayerCache, scale: float
    ) -> Tensor:
        """Attends while queries move from rank to rank, and partial results go back to where the queries are from."""
        may_see, me = parts.partners.may_see, self._group.rank
        own_query = query[step.split_rows].cpu()
        visiting: dict[int, Tensor] = {}
        rounds: list[Future[None]] = []
        for target, source in self._rounds():
            if may_see(source, me):
                visiting[source] = own_query.new_empty(parts.partners.num_queries[source], *own_query.shape[1:])
            receives = {source: visiting[source]} if source in visiting else {}
            rounds.append(self._group.begin_exchange({target: own_query} if may_see(me, target) else {}, receives))
        own = self._kernels.attend_parts(query, cache, parts.own, scale)
        whole = self._begin_whole(step, own)
        answers: dict[int, Tensor] = {}
        answered: list[Future[None]] = []
        for (target, source), round_ in zip(self._rounds(), rounds, strict=True):
            round_.result()
            sends = {}
            if source in visiting:
                visitor = visiting[source].to(query.device)
                sends[source] = _pack(self._kernels.attend_parts(visitor, cache, parts.exchanged[source], scale))
            receives = {target: _empty_packed(own_query)} if may_see(me, target) else {}
            answers |= receives
            answered.append(self._group.begin_exchange(sends, receives))
        for exchange in answered:
            exchange.result()
        return self._join(step, query, own, _unpack_all(answers, query[step.split_rows]), whole)

    def _move_kv(
        self, step: StepExchange, parts: WindowParts, query: Tensor, cache: LayerCache, scale: float
    ) -> Tensor:
        """Attends while KV moves from rank to rank."""
        may_see, me = parts.partners.may_see, self._group.rank
        kv = torch.stack((cache.keys[:, parts.kv_slots], cache.values[:, parts.kv_slots])).cpu()  # [2, K, n, D]
        received: dict[int, Tensor] = {}
        rounds: list[tuple[dict[int, Tensor], dict[int, Tensor]]] = []
        for target, source in self._rounds():
            receives = {}
            if may_see(me, source):
                receives[source] = kv.new_empty(2, kv.shape[1], parts.partners.num_kv[source], kv.shape[3])
            received |= receives
            rounds.append(({target: kv} if may_see(target, me) else {}, receives))
        if step.exchange is Exchange.ALL_GATHER:
            sends = {rank: x for sent, _ in rounds for rank, x in sent.items()}
            exchanges = [self._group.begin_exchange(sends, received)] * len(rounds)
        else:
            exchanges = [self._group.begin_exchange(*round_) for round_ in rounds]
        own = self._kernels.attend_parts(query, cache, parts.own, scale)
        whole = self._begin_whole(step, own)
        own_query = query[step.split_rows]
        answers: dict[int, Part] = {}
        for (_, source), round_ in zip(self._rounds(), exchanges, strict=True):
            round_.result()
            if source in received:
                keys, values = received[source].to(query.device)
                received_cache = LayerCache(keys=keys, values=values)
                answers[source] = self._kernels.attend_parts(own_query, received_cache, parts.exchanged[source], scale)
        return self._join(step, query, own, answers, whole)

    # -- what all ranks compute -----------------------------------------------------------------------------------

    def _begin_whole(self, step: StepExchange, own: Part) -> tuple[Future[None], dict[int, Tensor]] | None:
        """Begins to exchange the partial results of whole rows; returns None where there are no whole rows."""
        if not len(step.whole_rows):
            return None
        sends, receives = self._whole_exchange((own[0][step.whole_rows], own[1][step.whole_rows]))
        return self._group.begin_exchange(sends, receives), receives

    def _whole_exchange(self, own: Part) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """Returns what to send to all other ranks, and memory for what those that hold KV send."""
        others = [rank for rank in range(self._group.num_ranks) if rank != self._group.rank]
        sends = dict.fromkeys(others, _pack(own)) if self._group.rank in self._holders else {}
        return sends, {rank: _empty_packed(own[0]) for rank in others if rank in self._holders}

    # -- the parts together ---------------------------------------------------------------------------------------

    def _join(
        self,
        step: StepExchange,
        query: Tensor,
        own: Part,
        answers: Mapping[int, Part],
        whole: tuple[Future[None], dict[int, Tensor]] | None,
    ) -> Tensor:
        """Merges split rows with ``answers``, and whole rows with what the other ranks send of those."""
        if whole is None:
            return self._merge(own, answers, query)
        split_part, whole_part = ((own[0][rows], own[1][rows]) for rows in (step.split_rows, step.whole_rows))
        output = torch.empty_like(query)
        output[step.split_rows] = self._merge(split_part, answers, query)
        whole[0].result()
        output[step.whole_rows] = self._merge(whole_part, _unpack_all(whole[1], whole_part[0]), query)
        return output

    def _merge(self, own: Part, others: Mapping[int, Part], like: Tensor) -> Tensor:
        """Merges parts of the same rows in rank order, and rounds to the dtype of ``like``."""
        parts = {**others, self._group.rank: own}
        ordered = [parts[rank] for rank in sorted(parts)]
        return merge_partials([part[0] for part in ordered], [part[1] for part in ordered])[0].to(like.dtype)

    # -- between ranks --------------------------------------------------------------------------------------------

    def _rounds(self) -> list[tuple[int, int]]:
        """Returns, for each round, the ranks to send to and to receive from: those one place further on a ring."""
        count, me = self._group.num_ranks, self._group.rank
        return [((me + step) % count, (me - step) % count) for step in range(1, count)]


def _pack(part: Part) -> Tensor:
    """Packs a part into bytes, log-sum-exp first, as it is sent."""
    output, mass = (x.cpu().contiguous().reshape(-1).view(torch.uint8) for x in part)
    return torch.cat((mass, output))


def _empty_packed(like: Tensor) -> Tensor:
    """Allocates memory for a packed part of queries ``like`` [n, H, D]."""
    num_heads = like.shape[0] * like.shape[1]
    return torch.empty(num_heads * (4 + like.shape[2] * like.itemsize), dtype=torch.uint8)


def _unpack_all(packed: Mapping[int, Tensor], like: Tensor) -> dict[int, Part]:
    """Unpacks parts of queries ``like`` [n, H, D], by rank."""
    return {rank: _unpack(data, like) for rank, data in packed.items()}


def _unpack(packed: Tensor, like: Tensor) -> Part:
    mass_bytes = 4 * like.shape[0] * like.shape[1]
    mass, output = packed[:mass_bytes].view(torch.float32), packed[mass_bytes:].view(like.dtype)
    return output.view(like.shape).to(like.device), mass.view(like.shape[:2]).to(like.device)
