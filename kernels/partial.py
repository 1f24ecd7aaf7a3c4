"""What a rank has computed of a sum over ranks, and what is done with the sum before the next product.

That is the norm of residual and sum, token by token. So a rank that has summed some tokens' rows can do it for those
alone, and what is gathered are normed rows instead of sums (TokenWeave, Gond et al. 2025): as many bytes and the same
bits, and of each norm only a rank's share is computed.

Shapes: T tokens, E hidden size.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(slots=True, kw_only=True)
class Finish:
    """What is done with a sum.

    Attributes:
        result: [T, E], for what it makes of every row.
        rows: does it for rows ``[start, stop)``, whose sums are there, and adds them to the residual.
    """

    result: Tensor
    rows: Callable[[int, int], None]


@dataclass(slots=True, kw_only=True)
class Partial:
    """A rank's part of a sum.

    Attributes:
        update: [T, E], the part, and then the sum.
        finish: None where the sum is not needed at once.
        is_finished: whether all rows of the result are there, instead of those of the sum; of the residual there are
            only the rank's own rows then, which are always the same.
    """

    update: Tensor
    finish: Finish | None = None
    is_finished: bool = False
