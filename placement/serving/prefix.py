"""Which computed KV blocks a prompt starts with: hashes of block contents, and who computes or awaits which.

Keys and values of a token depend on that token and on all before it, so a block may be shared exactly where the
whole text up to its end is equal. A chain of hashes says so: h_i = sha256(h_(i-1) || tokens of block i). Only full,
computed blocks are shared; nobody writes to such a block again.
"""

import hashlib
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from itertools import takewhile

import numpy as np

from placement.serving.kv.blocks import BlockPool
from placement.serving.sequence import Sequence

_TAG = b"heterodyne kv prefix 1\0"


def chain_hashes(token_ids: Seq[int], block_size: int, salt: bytes, *, already: Seq[bytes] = ()) -> list[bytes]:
    """The hashes of the full blocks of ``token_ids``.

    h_i = sha256(h_(i-1) || token ids of block i as little-endian uint32), h_(-1) = sha256(tag || salt). sha256 so that
    no tenant can make a text that matches another's, and a salt so that none can guess at another's by timing.

    Args:
        token_ids: all of the sequence, each in [0, 2**32).
        salt: sequences of equal salt may share.
        already: hashes of its first blocks, of the same salt: as a sequence grows, only what is new is hashed.

    Returns:
        32 bytes a block, ``already`` first.
    """
    first, last = len(already), len(token_ids) // block_size
    assert first <= last, (first, last)
    if first == last:
        return list(already)
    raw = np.array(token_ids[first * block_size : last * block_size], dtype="<u4").tobytes()
    link = already[-1] if already else hashlib.sha256(_TAG + salt).digest()
    hashes = list(already)
    for start in range(0, len(raw), 4 * block_size):
        link = hashlib.sha256(link + raw[start : start + 4 * block_size]).digest()
        hashes.append(link)
    return hashes


class PrefixCache:
    """Finds the blocks that a sequence can share, tells the pool what was computed, and who waits for whom.

    Where a block is being computed by a running sequence already, others of the same text wait for it: equal prompts
    that arrive together are computed once. They wait only while it is computed; when that sequence is gone they
    compute it themselves.
    """

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._pending: dict[bytes, int] = {}  # hash of a block being computed -> the running sequence that does
        self._awaited: dict[int, bytes] = {}  # waiting sequence -> the last pending hash of its text
        self.num_queries = 0
        self.num_hits = 0

    def look_up(self, sequence: Sequence) -> list[int] | None:
        """The computed blocks that a waiting sequence starts with; at least one token is left to compute.

        Returns:
            None where a running sequence is computing the block that comes next.
        """
        awaited = self._awaited.get(sequence.sequence_id)
        if awaited in self._pending:
            return None
        self._awaited.pop(sequence.sequence_id, None)
        if not sequence.reuse_prefix:
            return []
        hashes = sequence.block_hashes[: sequence.num_reusable_tokens // self._pool.block_size]
        blocks: list[int] = []
        for block in map(self._pool.find, hashes):
            if block is None:
                break
            blocks.append(block)
        pending = list(takewhile(self._pending.__contains__, hashes[len(blocks) :]))
        if pending:
            self._awaited[sequence.sequence_id] = pending[-1]
            return None
        return blocks

    def begin(self, sequence: Sequence, num_found: int) -> None:
        """Notes that a sequence was admitted with its first ``num_found`` blocks computed."""
        sequence.num_registered_blocks = num_found
        sequence.num_computed_tokens = num_found * self._pool.block_size
        if sequence.reuse_prefix and sequence.block_hashes and not sequence.num_preemptions:
            sequence.num_cached_tokens = min(sequence.num_computed_tokens, sequence.num_prompt_tokens)
            self.num_queries += sequence.num_prompt_tokens
            self.num_hits += sequence.num_cached_tokens

    def compute(self, sequence: Sequence) -> None:
        """Notes that steps compute the other blocks of a sequence from now on: others of the same text wait for them.

        Nobody waits for what comes from another replica, which may take long and may not come.
        """
        last = sequence.num_tokens // self._pool.block_size
        for block_hash in sequence.block_hashes[sequence.num_registered_blocks : last]:
            self._pending.setdefault(block_hash, sequence.sequence_id)

    def register(self, sequence: Sequence) -> None:
        """Lets a running sequence's blocks be found that are full, computed and hashed by now."""
        num_full = sequence.num_computed_tokens // self._pool.block_size
        for index in range(sequence.num_registered_blocks, min(num_full, len(sequence.block_hashes))):
            self._pool.name(sequence.block_table[index], sequence.block_hashes[index])
            self._pending.pop(sequence.block_hashes[index], None)
            sequence.num_registered_blocks = index + 1

    def leave(self, sequence: Sequence) -> None:
        """A sequence waits no more, or is about to give its blocks back: registers them, ends what it was computing."""
        self._awaited.pop(sequence.sequence_id, None)
        self.register(sequence)
        for block_hash in sequence.block_hashes[sequence.num_registered_blocks :]:
            if self._pending.get(block_hash) == sequence.sequence_id:
                del self._pending[block_hash]
        sequence.num_registered_blocks = 0

    def check(self, running: Iterable[Sequence], waiting: Iterable[Sequence]) -> None:
        """Asserts what must always hold."""
        self._check_tables(list(running))
        assert self._awaited.keys() <= {sequence.sequence_id for sequence in waiting}
        by_id = {sequence.sequence_id: sequence for sequence in running}
        for block_hash, sequence_id in self._pending.items():
            assert block_hash in by_id[sequence_id].block_hashes[by_id[sequence_id].num_registered_blocks :]
            assert by_id[sequence_id].in_flight or by_id[sequence_id].num_uncomputed_tokens, by_id[sequence_id]

    def _check_tables(self, running: Seq[Sequence]) -> None:
        """Every reference is a table's; what several tables hold is at one place of equal, computed text."""
        holders: dict[int, tuple[int, bytes]] = {}
        private: set[int] = set()
        for sequence in running:
            num_registered = sequence.num_registered_blocks
            assert num_registered * self._pool.block_size <= sequence.num_computed_tokens, sequence
            for index, block in enumerate(sequence.block_table):
                if index >= num_registered:
                    assert block not in private and block not in holders, f"block {block} is shared and written"
                    private.add(block)
                    continue
                content = (index, sequence.block_hashes[index])
                assert block not in private and holders.setdefault(block, content) == content, (block, sequence)
