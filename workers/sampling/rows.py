"""Copies rows of logits in the form that sampling works on, and finds the highest of each.

Shapes: B rows of a batch; R rows of a part of it; V vocabulary.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from placement.planning.memory import SAMPLED_ON_CPU, SAMPLED_ON_GPU

CHUNK = 256
_GROUP = 32  # neighbours that count as one while the highest values are sought


def in_parts(rows: Sequence[int], logits: Tensor) -> Iterator[Sequence[int]]:
    """Yields ``rows`` of ``logits`` [B, V] in parts, of as many rows as are best computed together."""
    at_once = SAMPLED_ON_CPU if logits.device.type == "cpu" else SAMPLED_ON_GPU
    size = max(1, at_once // logits.shape[1])
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def copy_rows(logits: Tensor, rows: Sequence[int]) -> Tensor:
    """Copies ``rows`` [R] of ``logits`` [B, V] to float32, and pads them with -inf to a multiple of CHUNK."""
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
    """Finds the highest of each row of ``logits`` [R, V] as float32, and its first place. NaN is above all."""
    width = math.gcd(logits.shape[1], CHUNK)
    if width < 16:
        values, places = logits.max(dim=-1)
        return values.float(), places
    # The maxima of chunks need no places, so they are found many times faster.
    chunks = logits.reshape(len(logits), -1, width)
    chunk = chunks.amax(dim=-1).argmax(dim=-1)
    values, places = chunks[torch.arange(len(logits), device=logits.device), chunk].max(dim=-1)
    return values.float(), chunk * width + places


def first(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Finds the k highest of float32 ``values`` [R, V] and their places, [R, k]: highest first, then by index.

    The k first groups of neighbours, ordered by their highest member and then by index, hold the k highest values,
    since the highest member of each of these k groups precedes every member of any other group.
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
    """Finds the k highest of ``values`` [R, n] and their ids, given distinct ids [R, n] or [n]."""
    bits = (values + 0.0).view(torch.int32)  # -0.0 becomes 0.0, which it equals
    # As integers, the bits of floats have the order of the floats, once all bits of negative ones but the sign are
    # inverted.
    rising = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    keys = (rising.long() << 32) - ids
    best = keys.topk(k, sorted=True).values
    falling = ((best + 0xFFFFFFFF) >> 32).int()
    return (falling ^ ((falling >> 31) & 0x7FFFFFFF)).view(torch.float32), -best & 0xFFFFFFFF
