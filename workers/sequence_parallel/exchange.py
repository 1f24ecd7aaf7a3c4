"""A layer's attention where ranks share sequences: what each has of queries and KV meets what the others have.

However queries and KV meet, the same parts of each query's attention are computed, one for each rank's KV, and merged
in the order of ranks: all ways give the same bits, as long as all ranks compute alike.

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
from workers.sequence_parallel.layout import Meeting

Part = tuple[Tensor, Tensor]  # attention over a part of what queries see [n, H, D], and its log-sum-exp [n, H]


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowParts:
    """A step's parts of attention, in layers of one window.

    Attributes:
        own: all rows against the rank's own KV.
        met: by other rank, its queries against this rank's KV, or this rank's split rows against its KV.
        kv_slots: of the KV that this rank gives.
        meeting: who has something for whom.
    """

    own: PartPlan
    met: Mapping[int, PartPlan]
    kv_slots: Tensor
    meeting: Meeting


@dataclass(frozen=True, slots=True, kw_only=True)
class StepExchange:
    """A step's attention as the ranks share it; ``way`` is that of the split rows."""

    way: Exchange
    windows: Mapping[Window, WindowParts]
    split_rows: Tensor
    whole_rows: Tensor
    has_split: bool  # at any rank


class SharedAttention:
    """Attends, layer after layer. For the thread that executes steps."""

    def __init__(self, *, group: TensorGroup, kernels: Kernels, holders: Sequence[int]) -> None:
        """``holders``: the ranks that hold KV, in their order."""
        self._group = group
        self._kernels = kernels
        self._holders = holders

    def attend(self, step: StepExchange, window: Window, query: Tensor, cache: LayerCache, scale: float) -> Tensor:
        """Attention [T, H, D] of ``query`` [T, H, D] over all ranks' KV, of which ``cache`` has this one's.

        All ranks call it for the same layer of the same step. Raises PeerFailed.
        """
        parts = step.windows[window]
        if not step.has_split:
            own = self._kernels.attend_parts(query, cache, parts.own, scale)
            gives, takes = self._whole_exchange(own)
            self._group.exchange(gives, takes)
            return self._merge(own, _unpack_all(takes, query), query)
        moves = self._move_queries if step.way is Exchange.TOKEN_RING else self._move_kv
        return moves(step, parts, query, cache, scale)

    def _move_queries(
        self, step: StepExchange, parts: WindowParts, query: Tensor, cache: LayerCache, scale: float
    ) -> Tensor:
        meets, me = parts.meeting.meets, self._group.rank
        mine = query[step.split_rows].cpu()
        visiting: dict[int, Tensor] = {}
        rounds: list[Future[None]] = []
        for to, source in self._turns():
            if meets(source, me):
                visiting[source] = mine.new_empty(parts.meeting.num_queries[source], *mine.shape[1:])
            takes = {source: visiting[source]} if source in visiting else {}
            rounds.append(self._group.begin_exchange({to: mine} if meets(me, to) else {}, takes))
        own = self._kernels.attend_parts(query, cache, parts.own, scale)
        whole = self._begin_whole(step, own)
        answers: dict[int, Tensor] = {}
        answered: list[Future[None]] = []
        for (to, source), round_ in zip(self._turns(), rounds, strict=True):
            round_.result()
            gives = {}
            if source in visiting:
                asked = visiting[source].to(query.device)
                gives[source] = _pack(self._kernels.attend_parts(asked, cache, parts.met[source], scale))
            takes = {to: _room(mine)} if meets(me, to) else {}
            answers |= takes
            answered.append(self._group.begin_exchange(gives, takes))
        for one in answered:
            one.result()
        return self._join(step, query, own, _unpack_all(answers, query[step.split_rows]), whole)

    def _move_kv(
        self, step: StepExchange, parts: WindowParts, query: Tensor, cache: LayerCache, scale: float
    ) -> Tensor:
        meets, me = parts.meeting.meets, self._group.rank
        kv = torch.stack((cache.keys[:, parts.kv_slots], cache.values[:, parts.kv_slots])).cpu()  # [2, K, n, D]
        came: dict[int, Tensor] = {}
        rounds: list[tuple[dict[int, Tensor], dict[int, Tensor]]] = []
        for to, source in self._turns():
            takes = {}
            if meets(me, source):
                takes[source] = kv.new_empty(2, kv.shape[1], parts.meeting.num_kv[source], kv.shape[3])
            came |= takes
            rounds.append(({to: kv} if meets(to, me) else {}, takes))
        if step.way is Exchange.ALL_GATHER:
            gives, takes = ({rank: x for one in side for rank, x in one.items()} for side in zip(*rounds, strict=True))
            begun = [self._group.begin_exchange(gives, takes)] * len(rounds)
        else:
            begun = [self._group.begin_exchange(*round_) for round_ in rounds]
        own = self._kernels.attend_parts(query, cache, parts.own, scale)
        whole = self._begin_whole(step, own)
        mine = query[step.split_rows]
        answers: dict[int, Part] = {}
        for (_, source), round_ in zip(self._turns(), begun, strict=True):
            round_.result()
            if source in came:
                keys, values = came[source].to(query.device)
                held = LayerCache(keys=keys, values=values)
                answers[source] = self._kernels.attend_parts(mine, held, parts.met[source], scale)
        return self._join(step, query, own, answers, whole)

    # -- what all ranks compute -----------------------------------------------------------------------------------

    def _begin_whole(self, step: StepExchange, own: Part) -> tuple[Future[None], dict[int, Tensor]] | None:
        """Begins to exchange the parts of whole rows."""
        if not len(step.whole_rows):
            return None
        gives, takes = self._whole_exchange((own[0][step.whole_rows], own[1][step.whole_rows]))
        return self._group.begin_exchange(gives, takes), takes

    def _whole_exchange(self, own: Part) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """What to give to all, and memory for what comes of those that hold KV."""
        others = [rank for rank in range(self._group.num_ranks) if rank != self._group.rank]
        gives = dict.fromkeys(others, _pack(own)) if self._group.rank in self._holders else {}
        return gives, {rank: _room(own[0]) for rank in others if rank in self._holders}

    # -- the parts together ---------------------------------------------------------------------------------------

    def _join(
        self,
        step: StepExchange,
        query: Tensor,
        own: Part,
        answers: Mapping[int, Part],
        whole: tuple[Future[None], dict[int, Tensor]] | None,
    ) -> Tensor:
        """Split rows merged with ``answers``, whole rows with what comes of those."""
        if whole is None:
            return self._merge(own, answers, query)
        split, rest = ((own[0][rows], own[1][rows]) for rows in (step.split_rows, step.whole_rows))
        output = torch.empty_like(query)
        output[step.split_rows] = self._merge(split, answers, query)
        whole[0].result()
        output[step.whole_rows] = self._merge(rest, _unpack_all(whole[1], rest[0]), query)
        return output

    def _merge(self, own: Part, others: Mapping[int, Part], like: Tensor) -> Tensor:
        """Parts of the same rows, in the order of ranks, rounded as ``like``."""
        everyone = {**others, self._group.rank: own}
        ordered = [everyone[rank] for rank in sorted(everyone)]
        return merge_partials([part[0] for part in ordered], [part[1] for part in ordered])[0].to(like.dtype)

    # -- between ranks --------------------------------------------------------------------------------------------

    def _turns(self) -> list[tuple[int, int]]:
        """In each round, the rank to give to, and the one to take from: all the ranks of a ring, one place further."""
        count, me = self._group.num_ranks, self._group.rank
        return [((me + step) % count, (me - step) % count) for step in range(1, count)]


def _pack(part: Part) -> Tensor:
    """As it travels: bytes."""
    output, mass = (x.cpu().contiguous().reshape(-1).view(torch.uint8) for x in part)
    return torch.cat((mass, output))


def _room(like: Tensor) -> Tensor:
    """Memory for what :func:`_pack` makes of a part of queries ``like`` [n, H, D]."""
    num_heads = like.shape[0] * like.shape[1]
    return torch.empty(num_heads * (4 + like.shape[2] * like.itemsize), dtype=torch.uint8)


def _unpack_all(packed: Mapping[int, Tensor], like: Tensor) -> dict[int, Part]:
    """What :func:`_pack` made, by rank, of parts of queries ``like`` [n, H, D]."""
    return {rank: _unpack(one, like) for rank, one in packed.items()}


def _unpack(packed: Tensor, like: Tensor) -> Part:
    at = 4 * like.shape[0] * like.shape[1]
    mass, output = packed[:at].view(torch.float32), packed[at:].view(like.dtype)
    return output.view(like.shape).to(like.device), mass.view(like.shape[:2]).to(like.device)
