"""The residual of a decoder's layers, and what is done with each update before the next product.

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
    """``rows`` [T, E]; where ranks finish only their own rows of a sum, the others are not kept up."""

    rows: Tensor
    kernels: Kernels
    eps: float

    def add(
        self, update: Tensor, post_norm: Tensor | None, norm: Tensor | None, *, sums: bool
    ) -> Generator[Partial, None, Tensor]:
        """The next product's input [T, E]: the residual and an update [T, E], normed; the last layer's output as it is.

        Args:
            post_norm: of the update, where the layer has one.
            norm: of the next product; None: there is none.
            sums: the update is a part of a sum, which is given first.
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
        """Normed, and not."""
        if post_norm is not None:
            update = self.kernels.rms_norm(update, post_norm, self.eps)
        if norm is None:
            return (total := rows + update), total
        return self.kernels.add_rms_norm(update, rows, norm, self.eps)
