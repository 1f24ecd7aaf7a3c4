"""Counts the bytes between a model worker and its attention workers, by token and layer.

A token's query (d numbers), key and value (d / G each) go out, and its answer (d) comes back: (2 + 2 / G) * e * d bytes
with e bytes a number, where d are the numbers of all query heads and G query heads share a KV head (Lamina, Chen et al.
2024). That is exact where each head of a sequence is attended to by one worker. Where ranges of tokens are divided, the
query goes to each worker that has some, and each answers with a part and the log-sum-exp of its scores, by which parts
are merged.
"""

from dataclasses import dataclass

from placement.model.layers import Gqa
from placement.model.specs import DType, ModelSpec

PART_ITEMSIZE = 4
"""Bytes of a number of a part, and of a log-sum-exp: parts are merged in float32, and only their sum is rounded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WireBytes:
    """The payload of one layer: of a token, or of several.

    Attributes:
        query, key, value: bytes that go out.
        result: bytes of the answer, with the log-sum-exp where it has one.
    """

    query: int
    key: int
    value: int
    result: int

    @property
    def total(self) -> int:
        """Counts both directions."""
        return self.query + self.key + self.value + self.result


def whole_head_bytes(
    attention: Gqa, dtype: DType, *, num_tokens: int = 1, num_kv_heads: int | None = None
) -> WireBytes:
    """Counts the payload for tokens of which a worker attends to whole heads: (2 + 2 / G) * e * d a token for all.

    Args:
        num_kv_heads: the KV heads of the worker; None: all, as those of all workers are together.
    """
    heads = attention.num_kv_heads if num_kv_heads is None else num_kv_heads
    kv = num_tokens * heads * attention.head_dim * dtype.itemsize
    queries = kv * (attention.num_heads // attention.num_kv_heads)
    return WireBytes(query=queries, key=kv, value=kv, result=queries)


def token_range_bytes(attention: Gqa, dtype: DType, *, num_holders: int) -> WireBytes:
    """Counts the payload for a token of a sequence whose KV ``num_holders`` workers have, by ranges of tokens.

    The token's own key and value go to one worker. One holder alone has whole heads, and answers without log-sum-exp.
    """
    whole = whole_head_bytes(attention, dtype)
    if num_holders <= 1:
        return whole
    part = attention.num_heads * (attention.head_dim + 1) * PART_ITEMSIZE
    return WireBytes(query=num_holders * whole.query, key=whole.key, value=whole.value, result=num_holders * part)


def model_token_bytes(model: ModelSpec, dtype: DType) -> int:
    """Counts the payload of a token in all layers, for whole heads: (2 + 2 / G) * e * d * L."""
    return sum(whole_head_bytes(layer.attention, dtype).total for layer in model.layers)
