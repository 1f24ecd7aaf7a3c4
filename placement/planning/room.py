"""Shares within what memory holds: where one has more than fits, the others take what is over, as fast as each is."""

import math
from collections.abc import Callable, Sequence

# Each round lowers shares that do not fit in proportion; what does not scale with them, such as the process, is in the
# way, so that it takes some. Rounded units (KV heads) may take some more.
_ROUNDS = 24
_MARGIN = 0.99


def fit(weights: Sequence[float], fullness: Callable[[Sequence[float]], Sequence[float]]) -> tuple[float, ...]:
    """The weights where they fit, else with those lowered that do not fit and the others raised in proportion.

    Where nothing fits it is what was tried last: whoever makes a plan of it is told why.

    Args:
        weights: of each device, above 0.
        fullness: of such weights, what each device would need over what it has; 0 where that is not known.
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
    """So much for each, in sum ``total``, that none has more than its cap and the greatest quotient of what it has and
    its weight is the least there can be; None where the caps do not hold as much.

    Args:
        weights: above 0 each.
        caps: 0 or more each, infinite for none.
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
