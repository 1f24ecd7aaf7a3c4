"""Remembers the beginnings of prompts that a replica was sent, to guess what it has in its prefix cache.

The replica itself knows, but asking it would take as long as a short prompt. The guess is wrong where the replica has
evicted blocks, or never computed them because a request was cancelled; then the prompt takes longer, and no more.
"""

from collections import OrderedDict
from collections.abc import Sequence


class SentPrefixes:
    """The hashes of the blocks of prompts that a replica was sent, least recently used first."""

    def __init__(self) -> None:
        self._hashes: OrderedDict[bytes, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._hashes)

    def num_found(self, block_hashes: Sequence[bytes]) -> int:
        """Counts the leading blocks of a prompt that the replica was sent before; each hash stands for all before."""
        for index, block_hash in enumerate(block_hashes):
            if block_hash not in self._hashes:
                return index
        return len(block_hashes)

    def note(self, block_hashes: Sequence[bytes], most: int) -> None:
        """Remembers that the replica was sent a prompt, and forgets what is more than ``most`` blocks.

        The end of a prompt counts as less recently used than its start: without the start no end can be found.
        """
        for block_hash in reversed(block_hashes):
            self._hashes[block_hash] = None
            self._hashes.move_to_end(block_hash)
        while len(self._hashes) > most:
            self._hashes.popitem(last=False)
