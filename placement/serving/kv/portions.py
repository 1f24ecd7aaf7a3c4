"""Cuts a transfer into portions of consecutive tokens, and lays each of them out as both replicas do."""

from collections.abc import Iterator
from functools import lru_cache

from placement.model.part import Part, Span, kept_states
from placement.model.specs import DType, ModelSpec
from placement.serving.kv.int8_layout import SCALE_BYTES, int8_layout
from placement.serving.kv.message_layout import MessageLayout, message_layout
from placement.serving.kv.peers import KvFormat, ReplicaRanks
from placement.serving.kv.rectangles import RankTransfer, first_period, transfer_plan

PORTION_TOKENS = 2048
"""The most tokens of a portion, so that what ranks keep of it in memory beside their caches is bounded."""

_MOST_PLANS = 8


def portions(tokens: Span) -> Iterator[Span]:
    """Yields the portions of ``tokens``. They are cut where all ranks cut them, at multiples of ``PORTION_TOKENS``."""
    start = tokens.start
    while start < tokens.stop:
        stop = min((start // PORTION_TOKENS + 1) * PORTION_TOKENS, tokens.stop)
        yield Span(start, stop)
        start = stop


def bytes_per_token(model: ModelSpec, *, dtype: DType, format: KvFormat, block_size: int) -> int:
    """Counts the bytes that a token of a long transfer takes on the way, scales included, over all layers.

    Args:
        dtype: the number type that the keys and values are kept in where they are sent.
        block_size: tokens of a block there.
    """
    whole = Part.whole(model)
    states = kept_states(model, whole.layers, whole.kv_heads)
    num_numbers = sum(state.elements_per_token for state in states)
    if format is KvFormat.NATIVE:
        return num_numbers * dtype.itemsize
    num_scales = sum(2 * state.num_kv_heads for state in states)
    return num_numbers - -(SCALE_BYTES * num_scales) // block_size


class PortionLayouts:
    """The layouts of what the ranks of two replicas send each other of a transfer, portion by portion.

    Attributes:
        source: the replica that sends.
        target: the replica that receives.
        head_dim: the numbers of a key, and of a value.
        format: how they are written.
    """

    def __init__(self, *, source: ReplicaRanks, target: ReplicaRanks, head_dim: int, format: KvFormat) -> None:
        self.source = source
        self.target = target
        self.head_dim = head_dim
        self.format = format
        self._plan = lru_cache(maxsize=_MOST_PLANS)(self._make_plan)

    def check(self, tokens: Span) -> None:
        """Raises InvalidRequest where no source rank holds some of the tokens that a target rank needs."""
        first = first_period([*self.source.parts, *self.target.parts], tokens)
        transfer_plan(self.source.parts, self.target.parts, first.stop, first.start)

    def _make_plan(self, portion: Span) -> list[RankTransfer]:
        return transfer_plan(self.source.parts, self.target.parts, portion.stop, portion.start)

    def of(self, portion: Span, *, source: int, target: int) -> MessageLayout:
        """Returns what rank ``source`` sends rank ``target`` of a portion. Several threads may call it at once.

        Raises:
            InvalidRequest: no source rank holds something that a target rank needs.
        """
        plan = self._plan(portion)
        layout = message_layout(plan, source=source, target=target, head_dim=self.head_dim, dtype=self.source.dtype)
        if self.format is KvFormat.INT8:
            return int8_layout(layout, head_dim=self.head_dim, block_size=self.source.block_size)
        return layout
