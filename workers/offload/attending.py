"""Has attention workers attend for a micro-batch of a model rank, and merges what they answer.

Shapes: T rows of the micro-batch, H query heads and K KV heads of the rank, D head dimension.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.attention import LayerCache, PartPlan, PendingAttention, Window
from kernels.protocol import Kernels
from kernels.reference import merge_partials
from placement.serving.offload.orders import StepOrder
from workers.attention_worker.session import AttentionResult, AttentionSession

Rows = Tensor | slice
"""Rows of the micro-batch: a slice where they follow each other, so that nothing is gathered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionRows:
    """What of a micro-batch goes to a session and comes back.

    Attributes:
        heads: the query heads that it has of those of the rank.
        kv_heads: the KV heads.
        order: what it is told at the beginning; None: it has nothing to do.
        query_rows: the rows of queries that it is sent.
        staged: the slots of the rank's cache whose keys and values it is sent.
        whole_rows: the rows that it answers finally.
        part_places: the places of its other rows among all rows whose parts are merged.
    """

    session: AttentionSession
    heads: slice
    kv_heads: slice
    order: StepOrder | None
    query_rows: Rows
    staged: Rows
    whole_rows: Rows
    part_places: Tensor

    @property
    def is_awaited(self) -> bool:
        """Tells whether the session answers."""
        return self.order is not None and bool(self.order.spans)


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalRows:
    """What the rank attends to itself.

    Attributes:
        plans: by window; None: nothing.
        rows: the rows that nobody else attends to.
        part_places: the places of its other rows among all rows whose parts are merged, and ``part_rows``, those rows.
    """

    plans: dict[Window, PartPlan] | None
    rows: Rows
    part_rows: Rows


class MicroBatchAttention:
    """Computes the attention of one micro-batch, layer by layer: implements :class:`kernels.attention.Attend`."""

    def __init__(self, *, kernels: Kernels, sessions: Sequence[SessionRows], local: LocalRows, num_parts: int) -> None:
        """``num_parts`` counts the rows whose parts are merged, which are ``local.part_rows``."""
        self._kernels = kernels
        self._sessions = [own for own in sessions if own.order is not None]
        self._awaited = [own for own in self._sessions if own.is_awaited]
        self._local = local
        self._num_parts = num_parts
        self._numbers: list[int] = []

    def __call__(
        self, layer: int, window: Window, query: Tensor, cache: LayerCache, scale: float
    ) -> Tensor | PendingAttention:
        """Sends what others need, attends to what is here, and returns the rest as pending."""
        if layer == 0:
            self._numbers = [self._tell(own) for own in self._sessions]
        for own, number in zip(self._sessions, self._numbers, strict=True):
            assert own.order is not None
            queries = query[own.query_rows, own.heads] if own.is_awaited else None
            keys = values = None
            if own.order.slots:
                keys, values = (x[own.kv_heads, own.staged].transpose(0, 1) for x in (cache.keys, cache.values))
            own.session.send(number, layer, queries, keys, values)
        here: tuple[Tensor, Tensor] | None = None
        if self._local.plans is not None:
            here = self._kernels.attend_parts(query, cache, self._local.plans[window], scale)
            if not self._awaited:
                return here[0]
        return _Pending(self, layer, query, here)

    def _tell(self, own: SessionRows) -> int:
        assert own.order is not None
        return own.session.order(own.order)

    def gather(self, layer: int, query: Tensor, here: tuple[Tensor, Tensor] | None) -> Tensor:
        """Waits for what the sessions answer, and puts the attention of all rows together."""
        found = torch.zeros_like(query) if self._num_parts or not self._awaited else torch.empty_like(query)
        parts: list[tuple[Tensor, Tensor]] = []
        if here is not None:
            found[self._local.rows] = here[0][self._local.rows]
            if self._num_parts:
                parts.append((here[0][self._local.part_rows].float(), here[1][self._local.part_rows]))
        numbers = dict(zip(map(id, self._sessions), self._numbers, strict=True))
        for own in self._awaited:
            answer = own.session.result(numbers[id(own)], layer)
            if len(answer.whole):
                found[own.whole_rows, own.heads] = answer.whole.to(found.device)
            if len(answer.parts):
                parts.append(self._spread(own, answer, query))
        if self._num_parts:
            output, _ = merge_partials([output for output, _ in parts], [mass for _, mass in parts])
            found[self._local.part_rows] = output.to(found.dtype)
        return found

    def _spread(self, own: SessionRows, answer: AttentionResult, query: Tensor) -> tuple[Tensor, Tensor]:
        """Returns a session's parts in the places of all rows whose parts are merged; where it has none is no mass."""
        shape = (self._num_parts, *query.shape[1:])
        output = torch.zeros(shape, device=query.device)
        mass = torch.full(shape[:2], -torch.inf, device=query.device)
        output[own.part_places, own.heads] = answer.parts.to(query.device)
        mass[own.part_places, own.heads] = answer.mass.to(query.device)
        return output, mass


class _Pending:
    """Attention that is on its way."""

    def __init__(
        self, attention: MicroBatchAttention, layer: int, query: Tensor, here: tuple[Tensor, Tensor] | None
    ) -> None:
        self._attention = attention
        self._layer = layer
        self._query = query
        self._here = here
        self._found: Tensor | None = None

    def result(self) -> Tensor:
        """Waits for it, and returns it."""
        if self._found is None:
            self._found = self._attention.gather(self._layer, self._query, self._here)
        return self._found
