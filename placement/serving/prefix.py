"""Finds the computed KV blocks that a prompt starts with, by hashes of their contents.

Keys and values of a token depend on that token and on all before it, so a block may be shared exactly where the
whole text up to its end is equal. A chain of hashes tells that: h_i = sha256(h_(i-1) || tokens of block i). Only full,
computed blocks are shared; nobody writes to such a block again.
"""

import hashlib
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from itertools import takewhile

import numpy as np

from placement.serving.kv.blocks import BlockPool
from placement.serving.sequence import Phase, Sequence

_TAG = b"heterodyne kv prefix 1\0"


def chain_hashes(token_ids: Seq[int], block_size: int, salt: bytes, *, already: Seq[bytes] = ()) -> list[bytes]:
    """Returns the hashes of the full blocks of ``token_ids``.

    h_i = sha256(h_(i-1) || token ids of block i as little-endian uint32), h_(-1) = sha256(tag || salt). It is sha256
    so that no tenant can make a text that matches another's, and salted so that none can guess another's by timing.

    Args:
        token_ids: all tokens of the sequence, each in [0, 2**32).
        salt: only sequences of equal salt share blocks.
        already: the hashes of its first blocks, with the same salt, so that only new blocks are hashed.

    Returns:
        32 bytes for each block, ``already`` first.
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
    """Finds the blocks that a sequence can share, names computed blocks in the pool, and knows who waits for whom.

    While a running sequence computes a block, or has it sent from another replica, others of the same text wait for it,
    so that equal prompts that arrive together are computed once. When that sequence is gone before, they compute the
    block themselves.
    """

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._pending: dict[bytes, int] = {}  # hash of a block being computed -> the running sequence that does
        self._sent: dict[bytes, int] = {}  # hash of a block that another replica sends -> the sequence that awaits it
        self._awaited: dict[int, bytes] = {}  # waiting sequence -> the last pending hash of its text
        self.num_queries = 0
        self.num_hits = 0

    def look_up(self, sequence: Sequence) -> list[int] | None:
        """Finds the computed blocks that a waiting sequence starts with; at least one token is left to compute.

        Returns:
            the blocks, or None where a running sequence is computing the block that comes next.
        """
        awaited = self._awaited.get(sequence.sequence_id)
        if awaited is not None and self._is_coming(awaited, sequence):
            return None
        self._awaited.pop(sequence.sequence_id, None)
        if not sequence.reuse_prefix:
            return []
        size, hashes = self._pool.block_size, sequence.block_hashes
        num_reusable = sequence.num_reusable_tokens // size
        blocks: list[int] = []
        for index, block in enumerate(map(self._pool.find, hashes[: (sequence.num_tokens - 1) // size])):
            # An answer that is replayed takes only what was computed when it was given.
            if block is None or (index >= num_reusable and not self._pool.is_adopted(block)):
                break
            blocks.append(block)
        coming = hashes[len(blocks) : num_reusable]
        pending = list(takewhile(lambda name: self._is_coming(name, sequence), coming))
        if pending:
            self._awaited[sequence.sequence_id] = pending[-1]
            return None
        return blocks

    def _is_coming(self, block_hash: bytes, sequence: Sequence) -> bool:
        """Tells whether a sequence waits for a block. What is sent may take long: only who would have it sent waits."""
        return block_hash in self._pending or (sequence.awaits_kv and block_hash in self._sent)

    def begin(self, sequence: Sequence, num_found: int) -> None:
        """Notes that a sequence was admitted with its first ``num_found`` blocks computed."""
        sequence.num_registered_blocks = num_found
        sequence.num_computed_tokens = num_found * self._pool.block_size
        if sequence.reuse_prefix and sequence.block_hashes and not sequence.num_preemptions:
            sequence.num_cached_tokens = min(sequence.num_computed_tokens, sequence.num_prompt_tokens)
            self.num_queries += sequence.num_prompt_tokens
            self.num_hits += sequence.num_cached_tokens

    def compute(self, sequence: Sequence, *, is_sent: bool = False) -> None:
        """Notes that steps compute the other blocks of a sequence from now on, or that another replica sends them.

        Others of the same text wait for them. What is sent and does not come is computed after all.
        """
        last = sequence.num_tokens // self._pool.block_size
        coming = self._sent if is_sent else self._pending
        for block_hash in sequence.block_hashes[sequence.num_registered_blocks : last]:
            coming.setdefault(block_hash, sequence.sequence_id)

    def arrive(self, sequence: Sequence) -> None:
        """Notes that nothing is sent for a sequence any more: steps compute what has not come."""
        for block_hash in sequence.block_hashes:
            if self._sent.get(block_hash) == sequence.sequence_id:
                del self._sent[block_hash]
        self.register(sequence)
        self.compute(sequence)

    def register(self, sequence: Sequence) -> None:
        """Makes those blocks of a running sequence findable that are full, computed and hashed by now."""
        first, last = sequence.num_registered_blocks, len(sequence.block_hashes)
        if first == last:
            return  # as after most steps
        num_full = sequence.num_computed_tokens // self._pool.block_size
        for index in range(first, min(num_full, last)):
            self._pool.name(sequence.block_table[index], sequence.block_hashes[index])
            self._pending.pop(sequence.block_hashes[index], None)
            sequence.num_registered_blocks = index + 1

    def leave(self, sequence: Sequence) -> None:
        """Registers the blocks of a sequence that gives them back or waits no more; nobody waits for it from now on."""
        self._awaited.pop(sequence.sequence_id, None)
        self.register(sequence)
        for coming in (self._pending, self._sent):
            for block_hash in sequence.block_hashes[sequence.num_registered_blocks :]:
                if coming.get(block_hash) == sequence.sequence_id:
                    del coming[block_hash]
        sequence.num_registered_blocks = 0

    def check(self, running: Iterable[Sequence], waiting: Iterable[Sequence]) -> None:
        """Asserts what must always hold."""
        self._check_tables(list(running))
        assert self._awaited.keys() <= {sequence.sequence_id for sequence in waiting}
        by_id = {sequence.sequence_id: sequence for sequence in running}
        for sequence_id in self._sent.values():
            assert by_id[sequence_id].phase is Phase.AWAITS_KV, by_id[sequence_id]
        for block_hash, sequence_id in self._pending.items():
            assert block_hash in by_id[sequence_id].block_hashes[by_id[sequence_id].num_registered_blocks :]
            assert by_id[sequence_id].in_flight or by_id[sequence_id].num_uncomputed_tokens, by_id[sequence_id]

    def _check_tables(self, running: Seq[Sequence]) -> None:
        """Asserts that tables share a block only at the same index, for equal text, and computed."""
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
