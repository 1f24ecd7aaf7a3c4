"""Keeps the residual of a decoder's layers, and adds and norms each update before the next product.

Shapes: T tokens, E hidden size.
"""

from collections.abc import Generator
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.cpu.layers.partial import Finish, Partial
from kernels.protocol import Kernels


@dataclass(slots=True, kw_only=True)
class Residual:
    """The residual of a step's tokens.

    Attributes:
        rows: the residual, [T, E]. Where ranks finish only their own rows of a sum, the other rows are stale.
        kernels: computes the norms.
        eps: the small number that RMS norms add.
    """

    rows: Tensor
    kernels: Kernels
    eps: float

    def add(
        self, update: Tensor, post_norm: Tensor | None, norm: Tensor | None, *, sums: bool
    ) -> Generator[Partial, None, Tensor]:
        """Adds an update [T, E] to the residual, and norms the sum for the next product.

        Args:
            post_norm: the weight of the update's own norm; None: the layer has none.
            norm: the weight of the next product's norm; None: this is the last layer, whose output is not normed.
            sums: whether the update is a partial result, which is yielded to be all-reduced first.

        Returns:
            The next product's input [T, E], or the last layer's output.
        """
        if sums:
            result = torch.empty_like(update)

            def finish(start: int, stop: int) -> None:
                rows = self.rows[start:stop]
                result[start:stop], total = self._sum(update[start:stop], rows, post_norm, norm)
                if total is not rows:  # fast variants add in place
                    rows.copy_(total)

            partial = Partial(update=update, finish=Finish(result=result, rows=finish))
            yield partial
            if partial.is_finished:
                return result
        output, self.rows = self._sum(update, self.rows, post_norm, norm)
        return output

    def _sum(
        self, update: Tensor, rows: Tensor, post_norm: Tensor | None, norm: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Adds rows of an update to rows of the residual. Returns the sum normed, and as it is."""
        if post_norm is not None:
            update = self.kernels.rms_norm(update, post_norm, self.eps)
        if norm is None:
            return (total := rows + update), total
        return self.kernels.add_rms_norm(update, rows, norm, self.eps)
