import hashlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from placement.serving.kv.blocks import BlockPool
from placement.serving.kv.holds import Holds, SequenceOwner
from placement.serving.prefix import PrefixCache, chain_hashes
from placement.serving.sequence import Sequence

TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=40)


@given(TOKENS, st.integers(1, 8), st.binary(max_size=40))
def test_each_hash_covers_the_hash_before_it_and_the_tokens_of_its_block(
    token_ids: list[int], block_size: int, salt: bytes
) -> None:
    hashes = chain_hashes(token_ids, block_size, salt)
    assert len(hashes) == len(token_ids) // block_size
    for index in range(1, len(hashes)):
        block = token_ids[index * block_size : (index + 1) * block_size]
        packed = struct.pack(f"<{block_size}I", *block)
        assert hashes[index] == hashlib.sha256(hashes[index - 1] + packed).digest()


@given(TOKENS, st.integers(1, 8), st.data())
def test_hashing_as_tokens_come_gives_the_same_as_hashing_at_once(
    token_ids: list[int], block_size: int, data: st.DataObject
) -> None:
    hashes: list[bytes] = []
    for length in sorted(data.draw(st.lists(st.integers(0, len(token_ids)), max_size=6))):
        hashes = chain_hashes(token_ids[:length], block_size, b"salt", already=hashes)
    assert chain_hashes(token_ids, block_size, b"salt", already=hashes) == chain_hashes(token_ids, block_size, b"salt")


@given(TOKENS, TOKENS, st.integers(1, 4))
def test_hashes_agree_exactly_where_the_texts_agree(first: list[int], second: list[int], block_size: int) -> None:
    second = first[: len(second)] + second  # a common start of some length
    for index, (one, other) in enumerate(
        zip(chain_hashes(first, block_size, b""), chain_hashes(second, block_size, b""), strict=False)
    ):
        stop = (index + 1) * block_size
        assert (one == other) == (first[:stop] == second[:stop])


@given(st.binary(max_size=40), st.binary(max_size=40))
def test_no_hash_is_the_same_under_another_salt(first: bytes, second: bytes) -> None:
    ids = [1, 2, 3, 4]
    assert (chain_hashes(ids, 2, first) == chain_hashes(ids, 2, second)) == (first == second)


@pytest.mark.parametrize("token_id", [-1, 2**32])
def test_token_ids_that_do_not_fit_are_not_cut(token_id: int) -> None:
    with pytest.raises(OverflowError):
        chain_hashes([token_id], 1, b"")


def make(sid: int, token_ids: list[int], *, reuse: bool = True) -> Sequence:
    return Sequence(
        sequence_id=sid,
        num_prompt_tokens=len(token_ids),
        max_tokens=4,
        arrival=sid,
        block_hashes=chain_hashes(token_ids, 2, b""),
        reuse_prefix=reuse,
    )


def begin(cache: PrefixCache, pool: BlockPool, sequence: Sequence, found: list[int]) -> None:
    count = pool.blocks_for(sequence.num_tokens) - len(found)
    sequence.hold = Holds(pool).take(SequenceOwner(sequence.sequence_id), count, found=found)
    cache.begin(sequence, len(found))
    cache.compute(sequence)


def compute(cache: PrefixCache, sequence: Sequence, num_tokens: int) -> None:
    sequence.num_computed_tokens += num_tokens
    cache.register(sequence)


def test_a_block_is_found_once_it_is_full_and_computed() -> None:
    pool = BlockPool(8, 2)
    cache = PrefixCache(pool)
    owner = make(1, [1, 2, 3, 4, 5])
    begin(cache, pool, owner, [])
    compute(cache, owner, 3)
    assert cache.look_up(make(2, [1, 2, 9])) == owner.block_table[:1]
    compute(cache, owner, 2)
    assert cache.look_up(make(3, [1, 2, 3, 4, 5])) == owner.block_table[:2]
    assert cache.look_up(make(4, [1, 2, 4, 3, 5])) == owner.block_table[:1]


def test_one_token_is_always_left_to_compute() -> None:
    pool = BlockPool(8, 2)
    cache = PrefixCache(pool)
    owner = make(1, [1, 2, 3, 4])
    begin(cache, pool, owner, [])
    compute(cache, owner, 4)
    assert cache.look_up(make(2, [1, 2, 3, 4])) == owner.block_table[:1]
    assert cache.look_up(make(3, [1, 2, 3, 4, 5])) == owner.block_table


def test_blocks_that_are_being_computed_are_awaited_until_they_are_or_until_their_owner_leaves() -> None:
    pool = BlockPool(8, 2)
    cache = PrefixCache(pool)
    owner, waiter, other = make(1, [1, 2, 3, 4, 5]), make(2, [1, 2, 3, 4, 6]), make(3, [1, 9, 3])
    begin(cache, pool, owner, [])
    assert cache.look_up(waiter) is None and cache.look_up(other) == []
    compute(cache, owner, 2)
    assert cache.look_up(waiter) is None  # the second block is on its way
    cache.check([owner], [waiter])
    cache.leave(owner)
    pool.release(owner.block_table)
    cache.check([], [waiter])
    assert cache.look_up(waiter) == owner.block_table[:1]


def test_who_does_not_reuse_neither_finds_nor_awaits_nor_counts() -> None:
    pool = BlockPool(8, 2)
    cache = PrefixCache(pool)
    owner, fresh = make(1, [1, 2, 3], reuse=False), make(2, [1, 2, 3], reuse=False)
    begin(cache, pool, owner, [])
    assert cache.look_up(fresh) == [] and cache.look_up(make(3, [1, 2, 3])) is None
    compute(cache, owner, 3)
    assert cache.look_up(fresh) == [] and cache.look_up(make(3, [1, 2, 3])) == owner.block_table[:1]
    assert (cache.num_queries, cache.num_hits) == (0, 0)
