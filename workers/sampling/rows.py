"""Rows of logits as sampling works on them, and the highest of each.

Shapes: B rows of a batch; R rows of a part of it; V vocabulary.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from placement.planning.memory import SAMPLED_ON_CPU, SAMPLED_ON_GPU

CHUNK = 256
_GROUP = 32  # neighbours looked at as one when the first ones in order are sought


def in_parts(rows: Sequence[int], logits: Tensor) -> Iterator[Sequence[int]]:
    """``rows`` of ``logits`` [B, V] in turn, as many at a time as are best computed together."""
    at_once = SAMPLED_ON_CPU if logits.device.type == "cpu" else SAMPLED_ON_GPU
    size = max(1, at_once // logits.shape[1])
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def copy_rows(logits: Tensor, rows: Sequence[int]) -> Tensor:
    """``rows`` [R] of ``logits`` [B, V] in float32, padded with -inf to a multiple of CHUNK."""
    vocab_size = logits.shape[1]
    copy = torch.empty(len(rows), -(-vocab_size // CHUNK) * CHUNK, dtype=torch.float32, device=logits.device)
    stop = rows[0] + len(rows)
    if list(rows) == list(range(rows[0], stop)):
        copy[:, :vocab_size] = logits[rows[0] : stop]
    else:
        copy[:, :vocab_size] = logits.index_select(0, torch.tensor(rows, device=logits.device))
    copy[:, vocab_size:] = -torch.inf
    return copy


def highest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The highest of each row of ``logits`` [R, V] as float32, and where it first is; NaN is above all."""
    width = math.gcd(logits.shape[1], CHUNK)
    if width < 16:
        values, at = logits.max(dim=-1)
        return values.float(), at
    # The maxima of chunks need no places, so they are found many times faster.
    chunks = logits.reshape(len(logits), -1, width)
    chunk = chunks.amax(dim=-1).argmax(dim=-1)
    values, at = chunks[torch.arange(len(logits), device=logits.device), chunk].max(dim=-1)
    return values.float(), chunk * width + at


def first(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k highest of float32 ``values`` [R, V] and where they are, [R, k]: highest first, then by index.

    The k first groups of neighbours, ordered by their highest member and then by index, hold the k first members:
    any other group's are preceded by the highest of each of those k.
    """
    rows, size = values.shape
    index = torch.arange(size, device=values.device)
    if 2 * k * _GROUP >= size:
        return _first(values, index, k)
    groups = values.view(rows, -1, _GROUP)
    num_groups = groups.shape[1]
    _, chosen = _first(groups.amax(-1), index[:num_groups], k)
    places = chosen + torch.arange(rows, device=values.device)[:, None] * num_groups
    members = groups.flatten(0, 1).index_select(0, places.flatten()).view(rows, -1)
    ids = chosen[:, :, None] * _GROUP + index[:_GROUP]
    return _first(members, ids.flatten(1), k)


def _first(values: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k highest and their ids, from ``values`` [R, n] with distinct ids [R, n] or [n]."""
    bits = (values + 0.0).view(torch.int32)  # -0.0 becomes 0.0, which it equals
    # The bits of floats, those of negative ones but for the sign turned over, are in the order of the floats.
    rising = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    keys = (rising.long() << 32) - ids
    best = keys.topk(k, sorted=True).values
    falling = ((best + 0xFFFFFFFF) >> 32).int()
    return (falling ^ ((falling >> 31) & 0x7FFFFFFF)).view(torch.float32), -best & 0xFFFFFFFF
