"""The data that attention works on: where a layer's KV lies, and which part of it each sequence sees.

Shapes: K KV heads, S slots, D head dimension. A slot holds one token's key and value; token ``i`` of a
block lies in slot ``block * block_size + i``. A run is a half-open range of slots ``(start, stop)``.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Run = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCache:
    """Keys and values of one layer, each [K, S, D]: a head's run of slots is one dense piece of memory."""

    keys: Tensor
    values: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceSpan:
    """One sequence's share of a batch of flattened tokens.

    Attributes:
        query_start: row of its first query in the batch.
        num_queries: its rows. They are the sequence's last tokens, whose KV is already written.
        runs: slots of all its tokens, context and queries, in token order.
    """

    query_start: int
    num_queries: int
    runs: tuple[Run, ...]

    def __post_init__(self) -> None:
        assert all(start < stop for start, stop in self.runs), self
        assert 1 <= self.num_queries <= num_slots(self.runs), self

    @property
    def context_runs(self) -> tuple[Run, ...]:
        """Slots of the tokens before the queries."""
        return split_runs(self.runs, num_slots(self.runs) - self.num_queries)[0]

    @property
    def query_runs(self) -> tuple[Run, ...]:
        """Slots of the queries' own tokens."""
        return split_runs(self.runs, num_slots(self.runs) - self.num_queries)[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodePlan:
    """Where the tokens of a step's B decodes lie, token by token.

    Attributes:
        rows: [B], row of each sequence's query in the batch.
        slots: slots of all tokens, in token order, sequence after sequence.
        first_token: [B + 1], where each sequence's slots begin, and the end.
        first_tile: [B + 1], the same in tiles of a fixed number of tokens.
        tile_sequence: [tiles], the sequence of each tile.
        addresses: number of tiles, then where the five arrays are.
    """

    rows: NDArray[np.int64]
    slots: NDArray[np.int32]
    first_token: NDArray[np.int64]
    first_tile: NDArray[np.int64]
    tile_sequence: NDArray[np.int32]
    addresses: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionPlan:
    """A step's sequences, laid out once for all layers.

    Attributes:
        spans: every sequence; they cover the batch.
        decodes: those of one query, for variants that attend to them all at once.
    """

    spans: tuple[SequenceSpan, ...]
    decodes: DecodePlan | None = None


def num_slots(runs: tuple[Run, ...]) -> int:
    """Slots in all runs together."""
    return sum(stop - start for start, stop in runs)


def split_runs(runs: tuple[Run, ...], num_first: int) -> tuple[tuple[Run, ...], tuple[Run, ...]]:
    """The runs of the first ``num_first`` slots, and those of the rest."""
    first: list[Run] = []
    rest: list[Run] = []
    for start, stop in runs:
        middle = min(stop, start + num_first)
        num_first -= middle - start
        if start < middle:
            first.append((start, middle))
        if middle < stop:
            rest.append((middle, stop))
    return tuple(first), tuple(rest)
