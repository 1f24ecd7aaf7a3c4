"""Describes what a model rank has an attention worker do in a step, once for all layers.

A session joins a model rank and an attention worker. It has its own block tables, of the blocks of its region counted
from 0, and its own slots: those of block b are ``[b * width, (b + 1) * width)``, with as many slots of a block (width)
as the worker holds. The tokens of a sequence at the worker are those of its table's slots, in order.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from placement.serving.offload.deltas import Delta

Seen = tuple[tuple[int, int], ...]
"""Of the sequence's tokens at the worker, the range that each query sees, as first and end. Neither decreases."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """Describes a session: the sizes of what its messages carry.

    Attributes:
        num_layers: layers of the model rank.
        num_heads: query heads of a row; a multiple of ``num_kv_heads``.
        num_kv_heads: KV heads that the worker holds of those of the rank.
        itemsize: bytes of a number of queries, keys and values: 2 of bfloat16, 4 of float32.
        num_blocks: blocks of its region.
        width: slots of a block that the worker holds.
        windows: the windows of the layers, each once; None: all tokens are seen.
        window_of: for each layer, the place of its window in ``windows``.
        scale: the factor of the scores.
        q_first: whether queries go ahead of keys and values, in a message of their own.
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    itemsize: int
    num_blocks: int
    width: int
    windows: tuple[int | None, ...]
    window_of: tuple[int, ...]
    scale: float
    q_first: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class QuerySpan:
    """Neighbouring query rows of one sequence.

    Attributes:
        num_queries: how many rows.
        num_new: how many of the sequence's last tokens at the worker are stored with this step.
        seen: for each window, in their order, what each query sees, once the new tokens are stored.
    """

    sequence: int
    num_queries: int
    num_new: int
    seen: tuple[Seen, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOrder:
    """Describes a micro-batch at one attention worker: each layer's messages carry its rows.

    Attributes:
        tables: what changes of block tables before it.
        spans: the rows of queries, in order; none where keys and values are only stored.
        num_whole: the first so many rows are answered in the model's number type, as the worker has all that they see.
            The others are answered in float32, each head with its log-sum-exp, to be merged.
        slots: the slot of each row of keys and values.
        names: blocks of the replica that are full and computed by the steps before this one, and the hashes of their
            text, so that whoever takes over from the model rank finds them.
        forgotten: blocks of the replica that have lost their names.
    """

    tables: tuple[Delta, ...] = ()
    spans: tuple[QuerySpan, ...] = ()
    num_whole: int = 0
    slots: tuple[int, ...] = ()
    names: tuple[tuple[int, bytes], ...] = ()
    forgotten: tuple[int, ...] = ()

    @property
    def num_queries(self) -> int:
        """Counts the rows of queries."""
        return sum(span.num_queries for span in self.spans)


Names = Mapping[int, bytes]
"""The hash of the text of each block that is full, by its number in the replica."""
