"""Counts the bytes between a model worker and its attention workers, by token and layer.

A token's query (d numbers), key and value (d / G each) go out, and its answer (d) comes back: (2 + 2 / G) * e * d bytes
with e bytes a number, where d are the numbers of all query heads and G query heads share a KV head (Lamina, Chen et al.
2024). That is exact where each head of a sequence is attended to by one worker. Where ranges of tokens are divided, the
query goes to each worker that has some, and each answers with a part and the log-sum-exp of its scores, by which parts
are merged.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from placement.model.layers import Gqa
from placement.model.specs import DType, ModelSpec

FRAME_BYTES = 36
"""What a frame takes beside its payload: its header with the checksum."""
FRAMES_OUT = 2
"""Frames to a worker for a micro-batch and layer: the queries go first, and the keys and values follow."""
FRAMES_BACK = 1
PART_ITEMSIZE = 4
"""Bytes of a number of a part, and of a log-sum-exp: parts are merged in float32, and only their sum is rounded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WireBytes:
    """The bytes of one layer: of a token, or of all tokens of a micro-batch.

    Attributes:
        query, key, value: bytes that go out.
        result: bytes of the answer, with the log-sum-exp where it has one.
        frames_out, frames_back: bytes of the frames around them.
    """

    query: int
    key: int
    value: int
    result: int
    frames_out: int = 0
    frames_back: int = 0

    @property
    def out(self) -> int:
        """Counts what the attention workers receive."""
        return self.query + self.key + self.value + self.frames_out

    @property
    def back(self) -> int:
        """Counts what they send."""
        return self.result + self.frames_back

    @property
    def total(self) -> int:
        """Counts both directions."""
        return self.out + self.back


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


def additional_bytes(attention: Gqa, dtype: DType, *, num_holders: int) -> int:
    """Counts what token ranges cost a token and layer, beyond whole heads.

    With R holders that is (R - 1) * e * d for queries, and R * 4 * (d + heads) - e * d for answers.
    """
    parts = token_range_bytes(attention, dtype, num_holders=num_holders)
    return parts.total - whole_head_bytes(attention, dtype).total


def framed(payload: WireBytes, *, num_workers: int) -> WireBytes:
    """Adds the frames that carry the payload of a micro-batch and layer to so many workers, and back."""
    return WireBytes(
        query=payload.query,
        key=payload.key,
        value=payload.value,
        result=payload.result,
        frames_out=num_workers * FRAMES_OUT * FRAME_BYTES,
        frames_back=num_workers * FRAMES_BACK * FRAME_BYTES,
    )


def micro_batch_bytes(
    attention: Gqa, dtype: DType, *, num_tokens: int, kv_heads_by_worker: Sequence[int]
) -> tuple[WireBytes, ...]:
    """Counts the bytes of a micro-batch and layer for each worker, frames included, where KV heads are divided.

    A worker without heads is sent nothing.
    """
    counted: list[WireBytes] = []
    for heads in kv_heads_by_worker:
        payload = whole_head_bytes(attention, dtype, num_tokens=num_tokens, num_kv_heads=heads)
        counted.append(framed(payload, num_workers=1) if heads and num_tokens else payload)
    return tuple(counted)


def model_token_bytes(model: ModelSpec, dtype: DType) -> int:
    """Counts the payload of a token in all layers, for whole heads: (2 + 2 / G) * e * d * L."""
    return sum(whole_head_bytes(layer.attention, dtype).total for layer in model.layers)
