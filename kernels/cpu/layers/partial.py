"""A rank's partial result of a layer, which is to be all-reduced, and what follows before the next product.

What follows is adding the sum to the residual and norming it, token by token. So after a reduce-scatter a rank can do
that for its own tokens' rows alone, and normed rows are gathered instead of sums (TokenWeave, Gond et al. 2025). That
moves as many bytes and gives the same bits, and each rank computes only its share of each norm.

Shapes: T tokens, E hidden size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from kernels.cpu.machine.columns_ir import WHOLE, ColumnTile

MOST_COLUMN_TILES = 8
"""The most column tiles of one all-reduce."""


@dataclass(slots=True, kw_only=True)
class Finish:
    """The operations that follow an all-reduce.

    Attributes:
        result: memory [T, E] for the normed rows.
        rows: adds the sums of rows ``[start, stop)`` to the residual, and writes the normed rows to ``result``.
    """

    result: Tensor
    rows: Callable[[int, int], None]


@dataclass(slots=True, kw_only=True)
class Partial:
    """A rank's partial result, whose sum over the ranks is needed.

    Attributes:
        update: the partial result [T, E], which the sum replaces.
        finish: what follows the sum; None where the sum is not needed at once.
        is_finished: whether all rows of ``finish.result`` are there, instead of those of the sum. Of the residual only
            the rank's own rows are up to date then; they are the same rows each time.
    """

    update: Tensor
    finish: Finish | None = None
    is_finished: bool = False


class SumWork(Protocol):
    """An all-reduce as operations of a :class:`~kernels.cpu.layers.program.Program`, which goes on with the sum."""

    @property
    def function(self) -> int:
        """Returns the address of the C function that all-reduces, or does nothing where an all-reduce failed before."""

    @property
    def failed(self) -> int:
        """Returns the address of a word that is not 0 once an all-reduce has failed."""

    @property
    def has_failed(self) -> bool:
        """Tells whether an all-reduce has failed since the run began."""

    def num_column_tiles(self, x: Tensor) -> int:
        """Returns in how many column tiles ``x`` [T, E] is all-reduced best, each as soon as it is computed."""

    def arguments(self, x: Tensor, ticket: int, tile: ColumnTile = WHOLE) -> bytes:
        """Returns the function's arguments that start the all-reduce of a tile of ``x`` [T, E], in place.

        The call for the last tile completes the all-reduce of all tiles.

        Args:
            ticket: the address of a word that is 0 at first; the thread that takes it runs the all-reduce.
        """

    def begin(self) -> None:
        """Prepares for a run of the program."""

    def end(self) -> None:
        """Ends a run of the program. Raises what made an all-reduce fail."""
