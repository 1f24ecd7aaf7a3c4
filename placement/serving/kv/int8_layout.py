"""Lays out keys and values that are sent as 8-bit integers, with a scale for each KV head and group of tokens.

A group has the tokens of a message that lie in one block of the sequence, which is cut as the source replica cuts it.
So a scale never covers tokens of two sequences, nor of two blocks. Of each tensor [H, T, D] there are the scales
[H, G], in 4 bytes each, and then the integers [H, T, D].
"""

from collections.abc import Sequence
from dataclasses import replace

from placement.model.part import Span
from placement.serving.kv.message_layout import MessageLayout, PackedTensor

SCALE_BYTES = 4


def group_lengths(tokens: Sequence[Span], block_size: int) -> tuple[int, ...]:
    """Counts the tokens of each group, where ``tokens`` are runs of positions in ascending order and apart."""
    lengths: list[int] = []
    last_block = -1
    for span in tokens:
        for block in range(span.start // block_size, -(-span.stop // block_size)):
            count = min(span.stop, (block + 1) * block_size) - max(span.start, block * block_size)
            if block == last_block:
                lengths[-1] += count
            elif count:
                lengths.append(count)
                last_block = block
    return tuple(lengths)


def int8_layout(layout: MessageLayout, *, head_dim: int, block_size: int) -> MessageLayout:
    """Returns the layout of the same keys and values as integers.

    Args:
        layout: the layout in any number type.
        head_dim: the numbers of a key, and of a value (D).
        block_size: tokens of a block of the source replica.
    """
    tensors: list[PackedTensor] = []
    offset = 0
    for tensor in layout.tensors:
        head_bytes = SCALE_BYTES * len(group_lengths(tensor.tokens, block_size)) + tensor.num_tokens * head_dim
        tensors.append(replace(tensor, offset=offset, num_bytes=len(tensor.kv_heads) * head_bytes))
        offset += tensors[-1].num_bytes
    return MessageLayout(tensors=tuple(tensors))
