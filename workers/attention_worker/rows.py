"""Lays out the rows that frames carry, in memory that is set aside once for each order.

An answer has the rows in float32 first, then their log-sum-exp, and then the rows that are answered finally: so all lie
where numbers of their size may.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from placement.serving.offload.orders import Geometry, StepOrder
from workers.attention_worker.stream import bytes_of

DTYPES = {2: torch.bfloat16, 4: torch.float32}
"""The number type of rows, by its bytes."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AnswerRows:
    """Memory for the answer of an order in a layer, and how it is divided."""

    memory: memoryview
    whole: Tensor
    parts: Tensor
    mass: Tensor


@dataclass(slots=True, kw_only=True, eq=False)
class InputRows:
    """Memory for the rows of an order in a layer: queries [n, H, D], and keys and values [m, K, D].

    Attributes:
        both_memory: all of it, where all rows come in one frame.
    """

    query: Tensor
    keys: Tensor
    values: Tensor
    query_memory: memoryview = field(init=False)
    kv_memory: memoryview = field(init=False)
    both_memory: memoryview

    def __post_init__(self) -> None:
        self.query_memory = self.both_memory[: self.query.nbytes]
        self.kv_memory = self.both_memory[self.query.nbytes :]


def answer_rows(geometry: Geometry, order: StepOrder) -> AnswerRows:
    """Sets memory aside for an order's answers."""
    heads, dim, dtype = geometry.num_heads, geometry.head_dim, DTYPES[geometry.itemsize]
    rest = order.num_queries - order.num_whole
    first, second = 4 * rest * heads * dim, 4 * rest * heads
    memory = torch.empty(first + second + order.num_whole * heads * dim * geometry.itemsize, dtype=torch.uint8)
    return AnswerRows(
        memory=bytes_of(memory),
        parts=memory[:first].view(torch.float32).view(rest, heads, dim),
        mass=memory[first : first + second].view(torch.float32).view(rest, heads),
        whole=memory[first + second :].view(dtype).view(order.num_whole, heads, dim),
    )


def input_rows(geometry: Geometry, order: StepOrder) -> InputRows:
    """Sets memory aside for the rows of an order."""
    dim, dtype = geometry.head_dim, DTYPES[geometry.itemsize]
    queries = order.num_queries * geometry.num_heads * dim
    each = len(order.slots) * geometry.num_kv_heads * dim
    memory = torch.empty(queries + 2 * each, dtype=dtype)
    query, keys, values = memory.split([queries, each, each])
    return InputRows(
        query=query.view(-1, geometry.num_heads, dim),
        keys=keys.view(-1, geometry.num_kv_heads, dim),
        values=values.view(-1, geometry.num_kv_heads, dim),
        both_memory=bytes_of(memory),
    )
