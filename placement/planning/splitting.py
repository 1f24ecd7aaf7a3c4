"""Deals the dims of a model out to unequal ranks. Owns the rounding of shares to whole units.

Every rank of a stage waits for the slowest at each collective. So the greatest ratio of units to weight is what counts,
and not how near all ranks are to their exact shares. The method of Jefferson and D'Hondt minimises that ratio
(Balinski and Young 1982, *Fair Representation*). At 5:2:1, for example, it deals 4 KV heads out as 3, 1 and 0; with the
nearest integers, 2, 1 and 1, the last rank would take 1.6 times as long.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

from placement.model.part import Span
from placement.model.quantization import LinearFormat
from placement.model.specs import ModelSpec

# The kernels compute this many columns and rows at once, so cuts at multiples of them waste nothing of a vector.
_COLUMNS, _ROWS = 32, 16
# Units are made smaller where there are fewer of them for each rank, since small models could only be cut coarsely.
_UNITS_A_RANK = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Dimension:
    """A dim of the model that can be dealt out.

    Attributes:
        name: the name that people are shown.
        size: the number of heads, columns, rows or layers.
        unit: the dim is cut only at multiples of this; the last unit may be smaller.
    """

    name: str
    size: int
    unit: int = 1

    def __post_init__(self) -> None:
        assert self.size >= 0 < self.unit, self

    @property
    def num_units(self) -> int:
        """Counts the units, of which the last may be smaller."""
        return -(-self.size // self.unit)


@dataclass(frozen=True, slots=True, kw_only=True)
class Dimensions:
    """The dims that tensor parallelism cuts."""

    kv_heads: Dimension
    ffn_columns: Dimension
    vocab_rows: Dimension

    @property
    def all(self) -> tuple[Dimension, ...]:
        """Lists the three dims."""
        return self.kv_heads, self.ffn_columns, self.vocab_rows


def dimensions(model: ModelSpec, num_ranks: int, linear: LinearFormat | None = None) -> Dimensions:
    """Finds the dims of ``model``, in units that suit the kernels and the groups of columns of rounded weights.

    Args:
        num_ranks: the number of ranks that share the dims; units are smaller where there would be few for each.
        linear: the format of linear layers.
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
    """Deals units out, and minimises the greatest ratio of units to weight.

    Of equal ratios, the first gets the unit. A weight of 0 gets nothing.

    Args:
        weights: the weight of each, at least 0 and finite, and not all 0.
        before: the units that each has beforehand.
    """
    assert all(weight >= 0 and math.isfinite(weight) for weight in weights) and any(weights), weights
    had = [0.0] * len(weights) if before is None else before
    dealt = [0] * len(weights)
    queue = [((had[i] + 1) / weight, i) for i, weight in enumerate(weights) if weight]
    heapq.heapify(queue)
    for _ in range(num_units):
        i = queue[0][1]
        dealt[i] += 1
        heapq.heapreplace(queue, ((had[i] + dealt[i] + 1) / weights[i], i))
    return tuple(dealt)


def spans(dimension: Dimension, num_units: Sequence[int]) -> tuple[Span, ...]:
    """Cuts the dimension into neighbouring spans of ``num_units`` each, which together are all of it."""
    assert sum(num_units) == dimension.num_units, (dimension, num_units)
    result: list[Span] = []
    start = 0
    for count in num_units:
        stop = min(start + count * dimension.unit, dimension.size)
        result.append(Span(start, stop))
        start = stop
    return tuple(result)
