"""A capture for tests of decode graphs that have no GPU."""

from collections.abc import Callable

from workers.step.graphs import Replay


def run_again(run: Callable[[], None]) -> Replay:
    """What a CUDA graph does, by computing again: from the same inputs, to the same place."""
    run()
    return run
