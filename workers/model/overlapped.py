"""Runs the layers of ranks that all-reduce what they compute, with the all-reduces beside the computation or not.

To overlap the two, a step's tokens are split into two micro-batches. While the all-reduce of one is on the wire, the
other is computed (TokenWeave, Gond et al. 2025). The micro-batch of the earlier tokens goes first, since later tokens
attend to earlier ones. Overlapped or not, a token gets the same numbers wherever its products do not depend on the
tokens beside it, as in the fused program; elsewhere the last bits may differ, as they do between batches. A
ladder-residual model needs no micro-batches: it computes an attention or feed-forward while the all-reduce of the one
before is on its way.
"""

from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future

from torch import Tensor

from kernels.cpu.layers.partial import Partial

Layers = Generator[Partial, None, Tensor]
"""Layers that run step by step: the generator yields each partial result, goes on once that is all-reduced (or, of a
ladder, once the one before it is), and returns the output [T, E].
"""


def run_alone(layers: Layers, reduce: Callable[[Partial], None]) -> Tensor:
    """Runs layers and waits for each all-reduce before it goes on. Raises what ``reduce`` raises."""
    while True:
        try:
            partial = next(layers)
        except StopIteration as ended:
            output: Tensor = ended.value
            return output
        reduce(partial)


def run_ladder(layers: Layers, begin: Callable[[Partial], "Future[None]"]) -> Tensor:
    """Runs layers that need the result of each all-reduce one update after it began.

    Args:
        begin: starts an all-reduce, which is done after those that were started before.

    Raises:
        Whatever an all-reduce raises.
    """
    previous: Future[None] | None = None
    while True:
        try:
            all_reduce = begin(next(layers))
        except StopIteration as ended:
            output: Tensor = ended.value
            return output
        if previous is not None:
            previous.result()
        previous = all_reduce


def run_overlapped(micro_batches: Sequence[Layers], begin: Callable[[Partial], "Future[None]"]) -> list[Tensor]:
    """Runs the layers of all micro-batches in turn, each while the all-reduces of the others are on their way.

    Args:
        begin: starts an all-reduce, which is done after those that were started before.

    Returns:
        The output [T, E] of each micro-batch.

    Raises:
        Whatever an all-reduce raises.
    """
    outputs: dict[int, Tensor] = {}
    all_reduces: dict[int, Future[None]] = {}
    while len(outputs) < len(micro_batches):
        for index, layers in enumerate(micro_batches):
            if index in outputs:
                continue
            if index in all_reduces:
                all_reduces[index].result()
            try:
                all_reduces[index] = begin(next(layers))
            except StopIteration as ended:
                outputs[index] = ended.value
    return [outputs[index] for index in range(len(micro_batches))]
