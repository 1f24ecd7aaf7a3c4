"""How a dim of the model is dealt out to unequal ranks. Owns the rounding of shares.

Every rank of a stage waits for the slowest at each collective, so what counts is the most that any rank has for its
weight, not how near all are to theirs. The method of Jefferson and D'Hondt gives the least such maximum of all ways to
deal whole units out (Balinski and Young 1982, *Fair Representation*): 4 KV heads at 5:2:1 are 3, 1 and 0, where the
nearest integers, 2, 1 and 1, would have the last rank take 1.6 times as long.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

from placement.model.part import Span
from placement.model.quantization import LinearFormat
from placement.model.specs import ModelSpec

# Columns and rows that the kernels compute at once: cuts between these waste nothing of a vector.
_COLUMNS, _ROWS = 32, 16
# Units a rank is to have at least, before they are made smaller: else small models could only be dealt out coarsely.
_UNITS_A_RANK = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Dimension:
    """Something that can be dealt out.

    Attributes:
        name: for people.
        size: how much of it there is.
        unit: it is cut at multiples of this alone; what is left over at the end belongs to the last unit.
    """

    name: str
    size: int
    unit: int = 1

    def __post_init__(self) -> None:
        assert self.size >= 0 < self.unit, self

    @property
    def num_units(self) -> int:
        """Units, the last of which may be a part of one."""
        return -(-self.size // self.unit)


@dataclass(frozen=True, slots=True, kw_only=True)
class Dimensions:
    """What tensor parallelism cuts."""

    kv_heads: Dimension
    ffn_columns: Dimension
    vocab_rows: Dimension

    @property
    def all(self) -> tuple[Dimension, ...]:
        """The three of them."""
        return self.kv_heads, self.ffn_columns, self.vocab_rows


def dimensions(model: ModelSpec, num_ranks: int, linear: LinearFormat | None = None) -> Dimensions:
    """The dims of ``model``, in units that suit the kernels, and the groups of columns of rounded weights.

    Args:
        num_ranks: among which they are dealt out; where there would be few units for each, units are smaller.
        linear: how the weights of linear layers are held.
    """
    query_width = model.queries_per_kv_head * model.head_dim
    attention_group = ffn_group = 1
    if linear is not None:
        attention_group = linear.group_size(model.num_heads * model.head_dim) or 1
        ffn_group = linear.group_size(model.ffn_size) or 1
    return Dimensions(
        kv_heads=Dimension(
            name="KV heads",
            size=model.num_kv_heads,
            unit=min(model.num_kv_heads, math.lcm(attention_group, query_width) // query_width),
        ),
        ffn_columns=Dimension(
            name="FFN columns",
            size=model.ffn_size,
            unit=math.lcm(ffn_group, _unit(model.ffn_size, _COLUMNS, num_ranks)),
        ),
        vocab_rows=Dimension(
            name="vocabulary rows", size=model.vocab_size, unit=_unit(model.vocab_size, _ROWS, num_ranks)
        ),
    )


def _unit(size: int, largest: int, num_ranks: int) -> int:
    unit = largest
    while unit > 1 and size < unit * num_ranks * _UNITS_A_RANK:
        unit //= 2
    return unit


def deal(num_units: int, weights: Sequence[float], before: Sequence[float] | None = None) -> tuple[int, ...]:
    """So many units for each weight that the greatest quotient of units and weight is the least there can be.

    Equal quotients go to the first. A weight of 0 gets nothing.

    Args:
        weights: at least 0 each, and finite; one of them more.
        before: what each has beforehand, in units.
    """
    assert all(weight >= 0 and math.isfinite(weight) for weight in weights) and any(weights), weights
    has = [0.0] * len(weights) if before is None else before
    dealt = [0] * len(weights)
    queue = [((has[i] + 1) / weight, i) for i, weight in enumerate(weights) if weight]
    heapq.heapify(queue)
    for _ in range(num_units):
        i = queue[0][1]
        dealt[i] += 1
        heapq.heapreplace(queue, ((has[i] + dealt[i] + 1) / weights[i], i))
    return tuple(dealt)


def spans(dimension: Dimension, num_units: Sequence[int]) -> tuple[Span, ...]:
    """Neighbouring spans of as many units each, all of the dimension together."""
    assert sum(num_units) == dimension.num_units, (dimension, num_units)
    result: list[Span] = []
    start = 0
    for count in num_units:
        stop = min(start + count * dimension.unit, dimension.size)
        result.append(Span(start, stop))
        start = stop
    return tuple(result)
