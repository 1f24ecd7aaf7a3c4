"""How a sequence's tokens are dealt out to the ranks that attend to it together (sequence parallelism).

Every KV block is cut at the same places: a rank holds the same slots of each block, and computes the prompt tokens
that go there. So a rank has its share of any run of tokens, early or late, which is what balances causal attention:
zigzag halves do it for a whole prompt; stripes (Brandon et al. 2023, Striped Attention, whose stripes are one token
wide) also for each of its chunks, for shares that are not equal, and for the decodes that follow, and nothing moves
from one rank to another in between. Blocks, their tables and what sequences share are as without.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]

WHOLE_TOKENS = 16
"""Chunks of up to so many tokens, as every decode is, are computed by all ranks, and only their KV is shared: the
weights that each rank reads take longer than the tokens, and one exchange a layer does.
"""


@dataclass(frozen=True, slots=True)
class Stripe:
    """The slots ``[start, stop)`` of every block of ``block_size`` slots.

    The token at position p of a sequence lies in slot ``p % block_size`` of one of its blocks, so a stripe picks
    positions as it picks slots; both are counted from 0.
    """

    start: int
    stop: int
    block_size: int

    def __post_init__(self) -> None:
        assert 0 <= self.start <= self.stop <= self.block_size > 0, self

    @property
    def width(self) -> int:
        """Slots of a block."""
        return self.stop - self.start

    @property
    def share(self) -> float:
        """Of all tokens."""
        return self.width / self.block_size

    def count(self, num_tokens: int) -> int:
        """How many of the first ``num_tokens`` are the rank's; so also where its own lie, which have no gaps."""
        blocks, rest = divmod(num_tokens, self.block_size)
        return blocks * self.width + min(max(rest - self.start, 0), self.width)

    def counts(self, num_tokens: Integers) -> Integers:
        """:meth:`count` of each."""
        blocks, rest = np.divmod(num_tokens, self.block_size)
        counted: Integers = blocks * self.width + (rest - self.start).clip(0, self.width)
        return counted

    def positions(self, start: int, stop: int) -> Integers:
        """Those of ``[start, stop)`` that are the rank's."""
        every = np.arange(start, stop)
        offset = every % self.block_size
        return every[(offset >= self.start) & (offset < self.stop)]

    def runs(self, runs: Integers) -> Integers:
        """Where the rank has those of the slots in ``runs`` [R, 2], in its own memory, that are its own: as runs."""
        own = self.counts(runs)
        return own[own[:, 0] < own[:, 1]]
