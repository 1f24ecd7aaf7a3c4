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

from kernels.attention import PendingAttention
from kernels.cpu.layers.partial import Partial

Layers = Generator[Partial | PendingAttention, None, Tensor]
"""Layers that run step by step: the generator yields each partial result, goes on once that is all-reduced (or, of a
ladder, once the one before it is), and returns the output [T, E]. It also yields attention that others compute, and
goes on once that is there.
"""


def run_alone(layers: Layers, reduce: Callable[[Partial], None]) -> Tensor:
    """Runs layers and waits for each all-reduce before it goes on. Raises what ``reduce`` raises."""
    while True:
        try:
            found = next(layers)
        except StopIteration as ended:
            output: Tensor = ended.value
            return output
        if isinstance(found, Partial):
            reduce(found)
        else:
            found.result()


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
            found = next(layers)
        except StopIteration as ended:
            output: Tensor = ended.value
            return output
        if not isinstance(found, Partial):
            found.result()
            continue
        all_reduce = begin(found)
        if previous is not None:
            previous.result()
        previous = all_reduce


def run_overlapped(micro_batches: Sequence[Layers], begin: Callable[[Partial], "Future[None]"]) -> list[Tensor]:
    """Runs the layers of all micro-batches in turn, each while what the others wait for is on its way.

    Args:
        begin: starts an all-reduce, which is done after those that were started before.

    Returns:
        The output [T, E] of each micro-batch.

    Raises:
        Whatever an all-reduce raises.
    """
    outputs: dict[int, Tensor] = {}
    awaited: dict[int, Future[None] | PendingAttention] = {}
    while len(outputs) < len(micro_batches):
        for index, layers in enumerate(micro_batches):
            if index in outputs:
                continue
            if index in awaited:
                awaited.pop(index).result()
            try:
                found = next(layers)
                awaited[index] = begin(found) if isinstance(found, Partial) else found
            except StopIteration as ended:
                outputs[index] = ended.value
    return [outputs[index] for index in range(len(micro_batches))]
