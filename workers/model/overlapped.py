"""Layers of ranks that sum what they compute, and the sums: one after the other, or behind the computation.

Tokens in two lanes are computed in turn: while one lane's sum goes over the wire, the other lane is
computed (TokenWeave, Gond et al. 2025). The lane of the earlier tokens goes first, since the later attend to them.
Woven or not, a token gets the same numbers wherever its products do not depend on the tokens beside it, as those of the
fused program do not; elsewhere the last bits may differ, as between batches. A ladder
needs no lanes: it computes an attention or feed-forward while the sum of the one before it is on its way.
"""

from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future

from torch import Tensor

from kernels.cpu.layers.partial import Partial

Layers = Generator[Partial, None, Tensor]
"""Gives what is a part of a sum, and goes on once the sum is there, or what is done with it; returns the output."""


def run_alone(layers: Layers, reduce: Callable[[Partial], None]) -> Tensor:
    """Runs layers, each sum as soon as its part is there. Raises what ``reduce`` raises."""
    while True:
        try:
            partial = next(layers)
        except StopIteration as ended:
            output: Tensor = ended.value
            return output
        reduce(partial)


def run_ladder(layers: Layers, begin: Callable[[Partial], "Future[None]"]) -> Tensor:
    """Runs layers that need each sum one update later than it begins.

    Args:
        begin: begins a sum, behind those that were begun before.

    Raises:
        What a sum raises.
    """
    before: Future[None] | None = None
    while True:
        try:
            begun = begin(next(layers))
        except StopIteration as ended:
            output: Tensor = ended.value
            return output
        if before is not None:
            before.result()
        before = begun


def run_woven(lanes: Sequence[Layers], begin: Callable[[Partial], "Future[None]"]) -> list[Tensor]:
    """Runs the layers of all lanes in turn, each while the others' sums are on their way.

    Args:
        begin: begins a sum, behind those that were begun before.

    Raises:
        What a sum raises.
    """
    outputs: dict[int, Tensor] = {}
    sums: dict[int, Future[None]] = {}
    while len(outputs) < len(lanes):
        for lane, layers in enumerate(lanes):
            if lane in outputs:
                continue
            if lane in sums:
                sums[lane].result()
            try:
                sums[lane] = begin(next(layers))
            except StopIteration as ended:
                outputs[lane] = ended.value
    return [outputs[lane] for lane in range(len(lanes))]
