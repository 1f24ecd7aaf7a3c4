"""Keeps shares within memory: where a device's share does not fit, the others take the rest by their weights."""

import math
from collections.abc import Callable, Sequence

# Each round lowers the shares that do not fit in proportion. A few are needed, since some of the memory does not scale
# with the share, such as that of the process; rounding to whole units (KV heads) may need some more.
_ROUNDS = 24
_MARGIN = 0.99


def fit(weights: Sequence[float], fullness: Callable[[Sequence[float]], Sequence[float]]) -> tuple[float, ...]:
    """Lowers the weights of devices where they do not fit, and raises the others in proportion.

    Where nothing fits, it returns the weights that were tried last; the plan that is made of them says why not.

    Args:
        weights: the weight of each device, above 0.
        fullness: a function that gives, for such weights, the memory that each device would need over the memory that
            it has; 0 where that is not known.
    """
    total = sum(weights)
    caps = [math.inf] * len(weights)
    tried = tuple(weights)
    for _ in range(_ROUNDS):
        full = fullness(tried)
        if max(full) <= 1:
            break
        caps = [_MARGIN * share / used if used > 1 else cap for share, used, cap in zip(tried, full, caps, strict=True)]
        filled = fill(weights, caps, total)
        if filled is None:
            break
        tried = filled
    return tried


def fill(weights: Sequence[float], caps: Sequence[float], total: float) -> tuple[float, ...] | None:
    """Divides ``total`` so that nobody gets more than their cap, and minimises the greatest ratio of amount to weight.

    Args:
        weights: a weight above 0 for each.
        caps: the most that each may get; infinite where there is no limit.

    Returns:
        The amount of each, or None where the caps together are less than ``total``.
    """
    if sum(caps) < total:
        return None
    capped: set[int] = set()
    while True:
        free = [i for i in range(len(weights)) if i not in capped]
        left = total - sum(caps[i] for i in capped)
        scale = left / sum(weights[i] for i in free) if free else 0.0
        over = {i for i in free if scale * weights[i] > caps[i]}
        if not over:
            return tuple(caps[i] if i in capped else scale * weights[i] for i in range(len(weights)))
        capped |= over
