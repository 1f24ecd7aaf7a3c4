"""Deals a sequence's tokens out to the ranks that attend to it together (sequence parallelism).

Every KV block is cut at the same places: a rank holds the same slots of each block, and computes the prompt tokens
that go there. So a rank has its share of any run of tokens, early or late, and that balances causal attention. Zigzag
halves do so for a whole prompt; stripes (Brandon et al. 2023, Striped Attention, whose stripes are one token wide) also
do so for each chunk of it, for unequal shares, and for the decodes that follow, and no KV moves between ranks.
Blocks, block tables and shared prefixes are the same as without stripes.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]

WHOLE_TOKENS = 16
"""All ranks compute a chunk of at most this many tokens, such as a decode, whole, and divide its KV alone among them.

Reading the weights takes longer than computing so few tokens, and one exchange in each layer is then enough.
"""


@dataclass(frozen=True, slots=True)
class Stripe:
    """The slots ``[start, stop)`` of every block of ``block_size`` slots.

    The token at position p of a sequence lies in slot ``p % block_size`` of one of its blocks, so a stripe selects
    positions in the same manner as slots. Both are counted from 0.
    """

    start: int
    stop: int
    block_size: int

    def __post_init__(self) -> None:
        assert 0 <= self.start <= self.stop <= self.block_size > 0, self

    @property
    def width(self) -> int:
        """Counts the slots of a block that the rank holds."""
        return self.stop - self.start

    @property
    def share(self) -> float:
        """Returns the share of all tokens that the rank holds."""
        return self.width / self.block_size

    def count(self, num_tokens: int) -> int:
        """Counts how many of the first ``num_tokens`` the rank holds.

        That is also the place of the next one in the rank's own memory, where its tokens lie without gaps.
        """
        blocks, rest = divmod(num_tokens, self.block_size)
        return blocks * self.width + min(max(rest - self.start, 0), self.width)

    def counts(self, num_tokens: Integers) -> Integers:
        """Applies :meth:`count` to each number."""
        blocks, rest = np.divmod(num_tokens, self.block_size)
        counted: Integers = blocks * self.width + (rest - self.start).clip(0, self.width)
        return counted

    def positions(self, start: int, stop: int) -> Integers:
        """Lists the positions in ``[start, stop)`` that the rank holds."""
        positions = np.arange(start, stop)
        slots = positions % self.block_size
        return positions[(slots >= self.start) & (slots < self.stop)]

    def runs(self, runs: Integers) -> Integers:
        """Converts runs of slots [R, 2] of all ranks to the runs [at most R, 2] of the rank's own memory."""
        own = self.counts(runs)
        return own[own[:, 0] < own[:, 1]]
