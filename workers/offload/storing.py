"""Takes keys and values that come from other replicas to the attention workers that hold their blocks."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from kernels.attention import LayerCache, Run
from placement.model.part import Span
from placement.planning.residency import Residency
from placement.serving.offload.orders import StepOrder
from placement.serving.offload.residents import SessionPlace
from workers.attention_worker.session import AttentionSession
from workers.model.kv_cache import KVCache

_AT_ONCE = 128
"""Tokens that are sent before steps have their turn."""

Integers = NDArray[np.int64]


class Storing:
    """Implements :class:`workers.kv_transfer.receiver.Elsewhere`.

    A session carries what is stored and the orders of steps one after the other. So a later step finds what was stored,
    and nobody has to say that it has come.
    """

    def __init__(
        self,
        *,
        sessions: Callable[[], Sequence[AttentionSession]],
        places: Sequence[SessionPlace],
        residency: Residency,
        block_size: int,
        cache: KVCache,
    ) -> None:
        """``sessions`` returns those of ``places`` that are open; ``cache`` is this rank's, with the local blocks."""
        self._sessions = sessions
        self._places = places
        self._residency = residency
        self._block_size = block_size
        self._cache = cache

    def scratch(self, num_tokens: int) -> KVCache:
        """Returns memory for the keys and values of so many tokens, in the host's memory."""
        return KVCache(layers=tuple(_like(layer, num_tokens) for layer in self._cache.layers))

    def store(self, scratch: KVCache, tokens: Span, runs: Sequence[Run]) -> None:
        """Takes those of ``tokens`` to their blocks. Raises AttentionLost."""
        slots = np.concatenate([np.arange(start, stop) for start, stop in runs])[tokens.start : tokens.stop]
        rows_there = np.arange(len(tokens))
        self._store_here(scratch, rows_there, slots)
        sessions = self._sessions()  # all goes to the same ones: what others were told is lost with them
        for first in range(0, len(slots), _AT_ONCE):
            part = slice(first, first + _AT_ONCE)
            for place, session in zip(self._places, sessions, strict=True):
                self._store_there(scratch, rows_there[part], slots[part], place, session)

    def _store_here(self, scratch: KVCache, rows_there: Integers, slots: Integers) -> None:
        own = slots < self._residency.num_local_blocks * self._block_size
        if not own.any():
            return
        source, target = torch.from_numpy(rows_there[own]), torch.from_numpy(slots[own])
        for here, there in zip(scratch.layers, self._cache.layers, strict=True):
            there.keys[:, target.to(there.keys.device)] = here.keys[:, source].to(there.keys.device)
            there.values[:, target.to(there.values.device)] = here.values[:, source].to(there.values.device)

    def _store_there(
        self,
        scratch: KVCache,
        rows_there: Integers,
        slots: Integers,
        place: SessionPlace,
        session: AttentionSession,
    ) -> None:
        region, width = self._residency.regions[place.region], place.holder.slots_per_block(self._block_size)
        start = 0 if place.holder.stripe is None else place.holder.stripe.start
        blocks, offsets = np.divmod(slots, self._block_size)
        offsets = offsets - start
        own = (blocks >= region.blocks.start) & (blocks < region.blocks.stop) & (offsets >= 0) & (offsets < width)
        if not own.any():
            return
        theirs = (blocks[own] - region.blocks.start) * width + offsets[own]
        # A step may be long in coming that says which names these blocks have lost.
        renewed = tuple(np.unique(blocks[own]).tolist())
        number = session.order(StepOrder(slots=tuple(theirs.tolist()), forgotten=renewed))
        heads, rows = slice(place.kv_heads.start, place.kv_heads.stop), torch.from_numpy(rows_there[own])
        try:
            for layer, here in enumerate(scratch.layers):
                keys, values = (x[heads, rows].transpose(0, 1) for x in (here.keys, here.values))
                session.send(number, layer, None, keys, values)
                session.flush()
        except BaseException:
            session.close()  # it would wait for the other layers for ever
            raise


def _like(layer: LayerCache, num_tokens: int) -> LayerCache:
    heads, _, head_dim = layer.keys.shape
    shape = (heads, num_tokens, head_dim)
    return LayerCache(
        keys=torch.empty(shape, dtype=layer.keys.dtype), values=torch.empty(shape, dtype=layer.keys.dtype)
    )
