"""The data types of attention: where a layer's KV lies, and which part of it each sequence sees.

Shapes: K KV heads, S slots, D head dimension. A slot holds one token's key and value; token ``i`` of a
block lies in slot ``block * block_size + i``. A run is a half-open range of slots ``(start, stop)``.
"""

from dataclasses import dataclass, field
from itertools import chain
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Run = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCache:
    """Keys and values of one layer, each [K, S, D]; a head's run of slots is dense in memory."""

    keys: Tensor
    values: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceSpan:
    """One sequence's share of a batch of flattened tokens.

    Attributes:
        query_start: the row of its first query in the batch.
        num_queries: the number of its rows, which are the sequence's last tokens. Their KV is already written.
        runs: the slots of all its tokens, context and queries, in token order.
        num_tokens: the number of all its tokens.
    """

    query_start: int
    num_queries: int
    runs: tuple[Run, ...]
    num_tokens: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_tokens", num_slots(self.runs))
        assert 1 <= self.num_queries <= self.num_tokens, self

    @property
    def query_runs(self) -> tuple[Run, ...]:
        """Returns the slots of the queries' own tokens."""
        return last_runs(self.runs, self.num_queries)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PartSpan:
    """Neighbouring rows of a batch, and a part of the tokens that they attend to: those that one rank holds.

    Attributes:
        query_start: the row of the first query.
        runs: the slots of the tokens in token order, as runs [R, 2].
        seen: the range of these tokens that each of the n queries sees, [n, 2] with first and end. Neither decreases
            from one query to the next; a query whose first and end are equal sees no token.
    """

    query_start: int
    runs: NDArray[np.int64]
    seen: NDArray[np.int64]

    def __post_init__(self) -> None:
        assert self.seen.ndim == 2 and len(self.seen) and (self.seen[:, 0] <= self.seen[:, 1]).all(), self
        assert (np.diff(self.seen, axis=0) >= 0).all() and self.seen[-1, 1] <= num_slots_of(self.runs), self

    @property
    def num_queries(self) -> int:
        """Returns the number of its rows."""
        return len(self.seen)

    @property
    def num_tokens(self) -> int:
        """Returns the number of tokens up to the last that a query sees."""
        return int(self.seen[-1, 1])


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedSpan:
    """Tokens that several sequences of a batch have at the same positions, in the same slots.

    Attributes:
        members: the indices of those sequences' spans in the batch, each once.
        first_token: the position of the first of the tokens in each member.
        num_tokens: the number of the tokens.
        runs: their slots in token order.
    """

    members: tuple[int, ...]
    first_token: int
    num_tokens: int
    runs: tuple[Run, ...]

    def __post_init__(self) -> None:
        assert self.members and len(set(self.members)) == len(self.members), self
        assert self.first_token >= 0 and self.num_tokens == num_slots(self.runs) > 0, self


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskPlan:
    """A step's attention, cut into tasks of some queries and a list of tokens each.

    Of E queries, the first B are the decodes. A decode's result is merged from its parts, the partial results of tasks
    that see some of its tokens.

    Attributes:
        runs: the slots of all lists of tokens, [R, 2] with start and stop of each run.
        rows: the row of each query in the batch, [E]. A query that is in two tasks is there twice.
        ranges: the range of its task's tokens that each query of a chunk sees, [C, 2] with first and end.
        sequences: the number of each query's decode, or -1, [E].
        tasks: the tasks, [tasks, 7] with the fields of simd.Task.
        parts: the numbers of the partial results of each decode, decode after decode.
        first_part: the place in ``parts`` where each decode's begin, and the end, [B + 1].
        num_partials: the number of partial results of all tasks.
        max_queries: the number of queries of the largest task.
        addresses: the sizes and addresses of the arrays, in the order of simd.ARGUMENTS.
    """

    runs: NDArray[np.int64]
    rows: NDArray[np.int64]
    ranges: NDArray[np.int64]
    sequences: NDArray[np.int64]
    tasks: NDArray[np.int64]
    parts: NDArray[np.int64]
    first_part: NDArray[np.int64]
    num_partials: int
    max_queries: int
    addresses: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionPlan:
    """A step's sequences, laid out once for all layers.

    Attributes:
        spans: the spans of all sequences, which cover the batch.
        window: how many tokens a query sees at most, its own the last of them; None: all.
        tasks: the same attention in tasks, for variants that compute it all in one call.
    """

    spans: tuple[SequenceSpan, ...]
    window: int | None = None
    tasks: TaskPlan | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PartPlan:
    """Queries and parts of what they attend to, laid out once for all layers.

    Attributes:
        spans: the spans, of which no two have a row in common.
        tasks: the same attention in tasks, for variants that compute it all in one call; None: no query sees a token,
            or the variant has no tasks.
    """

    spans: tuple[PartSpan, ...]
    tasks: TaskPlan | None = None


def num_slots(runs: tuple[Run, ...]) -> int:
    """Returns the number of slots in all runs."""
    edges = tuple(chain.from_iterable(runs))  # no Python loop: a fragmented sequence has hundreds of runs in each step
    return sum(edges[1::2]) - sum(edges[::2])


def num_slots_of(runs: NDArray[np.int64]) -> int:
    """Returns the number of slots in all ``runs`` [R, 2]."""
    return int((runs[:, 1] - runs[:, 0]).sum())


def slots_of(runs: NDArray[np.int64]) -> NDArray[np.int64]:
    """Returns every slot in ``runs`` [R, 2], one after the other."""
    lengths = runs[:, 1] - runs[:, 0]
    first = runs[:, 0] - (lengths.cumsum() - lengths)
    every: NDArray[np.int64] = np.arange(lengths.sum()) + first.repeat(lengths)
    return every


def last_runs(runs: tuple[Run, ...], num_last: int) -> tuple[Run, ...]:
    """Returns the runs of the last ``num_last`` slots; there must be so many."""
    found: list[Run] = []
    for start, stop in reversed(runs):
        if num_last == 0:
            break
        start = max(start, stop - num_last)
        num_last -= stop - start
        found.append((start, stop))
    return tuple(reversed(found))


def split_runs(runs: tuple[Run, ...], num_first: int) -> tuple[tuple[Run, ...], tuple[Run, ...]]:
    """Returns the runs of the first ``num_first`` slots, and those of the rest."""
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


Window = int | None
"""How many of the newest tokens a layer's queries see; None: all."""


class PendingAttention(Protocol):
    """The attention of a layer that is computed elsewhere, and on its way."""

    def result(self) -> Tensor:
        """Waits for it, and returns it: [T, H, D]. It may be called again."""


class Attend(Protocol):
    """Computes the attention of layers in which others have some of the keys and values."""

    def __call__(
        self, layer: int, window: Window, query: Tensor, cache: LayerCache, scale: float
    ) -> Tensor | PendingAttention:
        """Computes the attention [T, H, D] of queries [T, H, D], or begins to.

        Args:
            layer: the place of the layer among those of the rank.
            cache: that of the layer; the batch's own keys and values are written there already.
            scale: the factor of the scores.
        """
