"""Finds which sequences of a batch have KV blocks in common: the groups of shared-prefix attention.

Hydragen (Juravsky et al. 2024) computes attention over keys that many sequences share once for all their queries, then
merges it with the part of each sequence alone. Prefixes nest: all may share a system prompt, and some of them the
examples that follow it.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedPrefix:
    """A run of blocks in common: ``[first_block, first_block + num_blocks)`` of its members' tables are the same.

    Attributes:
        members: indices of tables, ascending.
    """

    members: tuple[int, ...]
    first_block: int
    num_blocks: int


def shared_prefixes(
    tables: Sequence[Sequence[int]], num_tokens: Sequence[int], block_size: int, *, min_members: int = 2
) -> tuple[SharedPrefix, ...]:
    """Returns the tree of leading runs of blocks that several tables have in common.

    The runs of one member follow each other without a gap from block 0, and the members of each are some of those of
    the run before it. No run could have more members, and none be longer with the same members.

    Args:
        tables: the block tables of sequences, all of one type (slices are compared).
        num_tokens: how many tokens each has computed, those of this step included. The block of the newest token is
            never shared. A step that computes several tokens of a sequence counts only the first of them here.
        min_members: the fewest sequences that make a group.

    Returns:
        the runs, each before those that follow it; runs that follow the same one are sorted by their first member.
    """
    assert len(tables) == len(num_tokens) and min_members >= 2, (len(tables), len(num_tokens), min_members)
    # Blocks of each table that are full without its newest token.
    limits = [min(len(table), (count - 1) // block_size) for table, count in zip(tables, num_tokens, strict=True)]
    prefixes: list[SharedPrefix] = []
    stack = _groups(tables, limits, range(len(tables)), 0, min_members)
    while stack:
        members, first = stack.pop()
        stop = _common_stop(tables, limits, members, first)
        prefixes.append(SharedPrefix(members=tuple(members), first_block=first, num_blocks=stop - first))
        stack += _groups(tables, limits, members, stop, min_members)
    return tuple(prefixes)


def _groups(
    tables: Sequence[Sequence[int]], limits: Sequence[int], members: Sequence[int], index: int, min_members: int
) -> list[tuple[list[int], int]]:
    """Groups ``members`` by their block at ``index``; returns each group with that index, the last group first."""
    groups: dict[int, list[int]] = {}
    for member in members:
        if index < limits[member]:
            groups.setdefault(tables[member][index], []).append(member)
    return [(group, index) for group in reversed(groups.values()) if len(group) >= min_members]


def _common_stop(tables: Sequence[Sequence[int]], limits: Sequence[int], members: Sequence[int], first: int) -> int:
    """Returns where the run of equal blocks ends that ``members`` begin at ``first``.

    It compares slices once for each member, and does a binary search for each member that shortens the run.
    """
    stop = min(limits[member] for member in members)
    model = tables[members[0]][first:stop]
    for member in members[1:]:
        table = tables[member]
        if table[first : first + len(model)] == model:
            continue
        low, high = 1, len(model) - 1  # the lengths that may be equal: the first block is, the whole is not
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if table[first : first + middle] == model[:middle] else (low, middle - 1)
        model = model[:low]
    return first + len(model)
