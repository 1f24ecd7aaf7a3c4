"""What a rank has computed of a sum over ranks, and what is done with the sum before the next product.

That is the norm of residual and sum, token by token. So a rank that has summed some tokens' rows can do it for those
alone, and what is gathered are normed rows instead of sums (TokenWeave, Gond et al. 2025): as many bytes and the same
bits, and of each norm only a rank's share is computed.

Shapes: T tokens, E hidden size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from kernels.cpu.machine.columns_ir import WHOLE, Strip

MOST_STRIPS = 8
"""Of one sum."""


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


class SumWork(Protocol):
    """Sums over ranks within a :class:`~kernels.cpu.layers.program.Program`, which goes on when a sum is there."""

    @property
    def function(self) -> int:
        """Address of the C function of a job's address that sums, or does nothing where a sum has failed before."""

    @property
    def failed(self) -> int:
        """Address of a word that is not 0 once a sum has failed."""

    def num_strips(self, x: Tensor) -> int:
        """In how many strips of its columns ``x`` [T, E] is best summed, each as soon as it is computed."""

    def job(self, x: Tensor, ticket: int, strip: Strip = WHOLE) -> bytes:
        """The job that begins to sum a strip of ``x`` [T, E], in place; that of the last ends the sums of all.

        Args:
            ticket: address of a word that is 0 before: the thread that takes it first does the work.
        """

    def begin(self) -> None:
        """Before the program."""

    def end(self) -> None:
        """After it. Raises what kept a sum from being there."""
