"""Turns block tables into runs: ranges of adjacent KV slots, each of which attention reads as one view."""

from collections.abc import Iterable, Sequence

from placement.model.part import Span
from placement.model.striping import Stripe


class TableRuns:
    """Keeps the runs of one sequence's block table as it grows, so that a step looks at new blocks alone."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._table: Sequence[int] = ()
        self._num_blocks = 0
        self._runs: list[tuple[int, int]] = []

    def first(self, block_table: list[int], num_tokens: int) -> tuple[tuple[int, int], ...]:
        """Returns what :func:`block_runs` does. The same list may have grown since; another list is a new table."""
        if block_table is not self._table:
            self._table, self._num_blocks, self._runs = block_table, 0, []
        for block in block_table[self._num_blocks :]:
            start, stop = block * self._block_size, (block + 1) * self._block_size
            if self._runs and self._runs[-1][1] == start:
                self._runs[-1] = (self._runs[-1][0], stop)
            else:
                self._runs.append((start, stop))
        self._num_blocks = len(block_table)
        return _without_last(self._runs, self._num_blocks * self._block_size - num_tokens)


def _without_last(runs: Sequence[tuple[int, int]], count: int) -> tuple[tuple[int, int], ...]:
    """Returns ``runs`` without their last ``count`` slots."""
    assert count >= 0, count
    kept = len(runs)
    while count and runs[kept - 1][1] - runs[kept - 1][0] <= count:
        kept -= 1
        count -= runs[kept][1] - runs[kept][0]
    if not count:
        return tuple(runs[:kept])
    start, stop = runs[kept - 1]
    return (*runs[: kept - 1], (start, stop - count))


def block_runs(block_table: Sequence[int], block_size: int, num_tokens: int) -> tuple[tuple[int, int], ...]:
    """Returns the KV slots of a sequence's first ``num_tokens`` tokens, as ranges ``[start, stop)`` in token order.

    A token lies in slot ``block * block_size + offset``. Blocks that follow each other in the table and in the pool
    make one range.
    """
    assert 0 <= num_tokens <= len(block_table) * block_size, (num_tokens, len(block_table), block_size)
    runs: list[tuple[int, int]] = []
    for first_token in range(0, num_tokens, block_size):
        start = block_table[first_token // block_size] * block_size
        stop = start + min(block_size, num_tokens - first_token)
        if runs and runs[-1][1] == start:
            runs[-1] = (runs[-1][0], stop)
        else:
            runs.append((start, stop))
    return tuple(runs)


def slot_runs(
    block_table: Sequence[int], block_size: int, tokens: Iterable[Span], stripe: Stripe | None = None
) -> tuple[tuple[int, int], ...]:
    """Returns where a rank's own KV cache has those of ``tokens`` that the rank holds, as ranges ``[start, stop)``.

    The ranges are in the order of the tokens, and slots that follow each other make one range. A rank with a stripe
    keeps its slots of all blocks without gaps.

    Args:
        block_table: the blocks of the sequence, of ``block_size`` slots each.
        tokens: runs of positions in the sequence, in the order in which their slots are wanted.
        stripe: the slots of every block that the rank holds; None: all. Its ``block_size`` is the same.
    """
    assert stripe is None or stripe.block_size == block_size, (stripe, block_size)
    runs: list[tuple[int, int]] = []
    for span in tokens:
        assert span.stop <= len(block_table) * block_size, (span, len(block_table), block_size)
        for first in range(span.start // block_size * block_size, span.stop, block_size):
            offset = block_table[first // block_size] * block_size - first
            start, stop = max(span.start, first) + offset, min(span.stop, first + block_size) + offset
            if stripe is not None:
                start, stop = stripe.count(start), stripe.count(stop)
            if runs and runs[-1][1] == start:
                runs[-1] = (runs[-1][0], stop)
            elif start < stop:
                runs.append((start, stop))
    return tuple(runs)


def token_runs(
    runs: Sequence[tuple[int, int]], tokens: Iterable[Span], stripe: Stripe | None = None
) -> tuple[tuple[int, int], ...]:
    """Returns where a rank's own KV cache has those of ``tokens`` that the rank holds, as :func:`slot_runs` does.

    Args:
        runs: the slots of all tokens of the sequence from its first on, of all ranks, in token order.
        tokens: runs of positions in the sequence, in ascending order and apart.
        stripe: the slots of every block that the rank holds; None: all.
    """
    found: list[tuple[int, int]] = []
    index, first = 0, 0  # a run, and the position of its first token
    for span in tokens:
        position = span.start
        while position < span.stop:
            start, stop = runs[index]
            if first + stop - start <= position:
                index, first = index + 1, first + stop - start
                continue
            end = min(span.stop, first + stop - start)
            own = start + position - first, start + end - first
            if stripe is not None:
                own = stripe.count(own[0]), stripe.count(own[1])
            if found and found[-1][1] == own[0]:
                found[-1] = (found[-1][0], own[1])
            elif own[0] < own[1]:
                found.append(own)
            position = end
    return tuple(found)
