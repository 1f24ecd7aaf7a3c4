"""The data that attention works on: where a layer's KV lies, and which part of it each sequence sees.

Shapes: K KV heads, S slots, D head dimension. A slot holds one token's key and value; token ``i`` of a
block lies in slot ``block * block_size + i``. A run is a half-open range of slots ``(start, stop)``.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain

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
        num_tokens: how many these are.
    """

    query_start: int
    num_queries: int
    runs: tuple[Run, ...]
    num_tokens: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_tokens", num_slots(self.runs))
        assert 1 <= self.num_queries <= self.num_tokens, self

    @property
    def context_runs(self) -> tuple[Run, ...]:
        """Slots of the tokens before the queries."""
        return split_runs(self.runs, self.num_tokens - self.num_queries)[0]

    @property
    def query_runs(self) -> tuple[Run, ...]:
        """Slots of the queries' own tokens."""
        return last_runs(self.runs, self.num_queries)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PartSpan:
    """Neighbouring rows of a batch, and a part of the tokens that they attend to: what one rank of several holds.

    Attributes:
        query_start: row of the first query.
        runs: slots of the tokens, in token order, as runs [R, 2].
        seen: [n, 2], of these tokens, those that each of the n queries sees: the first, and the end. Neither goes down
            from one query to the next; where they are equal it sees none.
    """

    query_start: int
    runs: NDArray[np.int64]
    seen: NDArray[np.int64]

    def __post_init__(self) -> None:
        assert self.seen.ndim == 2 and len(self.seen) and (self.seen[:, 0] <= self.seen[:, 1]).all(), self
        assert (np.diff(self.seen, axis=0) >= 0).all() and self.seen[-1, 1] <= num_slots_of(self.runs), self

    @property
    def num_queries(self) -> int:
        """Its rows."""
        return len(self.seen)

    @property
    def num_tokens(self) -> int:
        """Tokens up to the last that a query sees."""
        return int(self.seen[-1, 1])


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedSpan:
    """Tokens that several sequences of a batch have at the same positions, in the same slots.

    Attributes:
        members: which of the batch's spans, by index; each once.
        first_token: position of the first of the tokens in each member.
        num_tokens: how many there are.
        runs: their slots, in token order.
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
    """A step's attention cut into tasks, each of some queries against a list of tokens.

    Of E queries, the first B are the decodes. They are done when all their parts are: results of tasks that see some
    of their tokens.

    Attributes:
        runs: [R, 2], slots of all lists of tokens: where each run begins and stops.
        rows: [E], row of each query in the batch. A query in two tasks' lists of queries is there twice.
        ranges: [C, 2], of the tokens of its task, those that each query of a chunk sees: the first, and the end.
        sequences: [E], its decode, or -1.
        tasks: [tasks, 7], fields as in simd.Task.
        parts: numbers of the partial results of each decode, decode after decode.
        first_part: [B + 1], where each decode's begin, and the end.
        num_partials: partial results of all tasks.
        max_queries: queries of the largest task.
        addresses: sizes and addresses of the arrays, in the order of simd.JOB.
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
        spans: every sequence; they cover the batch.
        window: tokens that a query sees at most, its own the last of them; None for all.
        tasks: the same work for variants that do it all at once.
    """

    spans: tuple[SequenceSpan, ...]
    window: int | None = None
    tasks: TaskPlan | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PartPlan:
    """Queries against parts of what they attend to, laid out once for all layers.

    Attributes:
        spans: no row is in two of them.
        tasks: the same work for variants that do it all at once; None: there is none, or the variant does not.
    """

    spans: tuple[PartSpan, ...]
    tasks: TaskPlan | None = None


def num_slots(runs: tuple[Run, ...]) -> int:
    """Slots in all runs together."""
    edges = tuple(chain.from_iterable(runs))  # no loop: a fragmented sequence has hundreds of runs, in each step
    return sum(edges[1::2]) - sum(edges[::2])


def num_slots_of(runs: NDArray[np.int64]) -> int:
    """Slots in all ``runs`` [R, 2] together."""
    return int((runs[:, 1] - runs[:, 0]).sum())


def slots_of(runs: NDArray[np.int64]) -> NDArray[np.int64]:
    """Every slot in ``runs`` [R, 2], one after the other."""
    lengths = runs[:, 1] - runs[:, 0]
    first = runs[:, 0] - (lengths.cumsum() - lengths)
    every: NDArray[np.int64] = np.arange(lengths.sum()) + first.repeat(lengths)
    return every


def last_runs(runs: tuple[Run, ...], num_last: int) -> tuple[Run, ...]:
    """The runs of the last ``num_last`` slots, of which there are as many."""
    found: list[Run] = []
    for start, stop in reversed(runs):
        if num_last == 0:
            break
        start = max(start, stop - num_last)
        num_last -= stop - start
        found.append((start, stop))
    return tuple(reversed(found))


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


# How many of the newest tokens a layer's queries see; None: all.
Window = int | None

# Attention [T, H, D] of queries [T, H, D] in a layer with that window and cache; its scores have that factor.
Attend = Callable[[Window, Tensor, LayerCache, float], Tensor]
