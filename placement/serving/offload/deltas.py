"""Says what an attention worker must be told of block tables between two steps, and applies it.

A table is told whole once, when its sequence begins. From then on only what changes is: mostly nothing, since a decode
needs a new block once in as many steps as a block has tokens. Tables are those of the worker's own KV blocks.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

Tables = Mapping[int, tuple[int, ...]]
"""The blocks of each sequence, by its id."""


class BadDelta(Exception):
    """A delta does not fit the tables that it is applied to. No user sees this error: the worker is told all anew."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Begun:
    """A new sequence. It shares the first blocks of another one, as a fork does, or as prompts that begin alike do.

    Attributes:
        parent: the sequence that it shares blocks with; None: it shares none.
        num_shared: how many of the parent's first blocks it shares.
        blocks: the blocks that follow.
    """

    sequence: int
    parent: int | None = None
    num_shared: int = 0
    blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Moved:
    """Blocks of a sequence are now others, into which their keys and values are to be copied.

    Attributes:
        blocks: the new blocks, by their place in the table, ascending.
    """

    sequence: int
    blocks: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """A sequence keeps its first ``num_blocks`` blocks alone."""

    sequence: int
    num_blocks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Appended:
    """A sequence has new blocks, after those that it had."""

    sequence: int
    blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Freed:
    """A sequence has ended, and its table with it."""

    sequence: int


Delta = Begun | Moved | Cut | Appended | Freed


def deltas(before: Tables, after: Tables) -> tuple[Delta, ...]:
    """Lists what makes ``after`` of ``before``. It is empty where they are equal.

    New sequences come first, so that they can share blocks of one that changes or ends in the same step.
    """
    told: list[Delta] = list(_begun(before, after))
    for sequence in sorted(before.keys() & after.keys()):
        told += _changes(sequence, before[sequence], after[sequence])
    told += [Freed(sequence=sequence) for sequence in sorted(before.keys() - after.keys())]
    return tuple(told)


def apply(tables: Tables, told: Iterable[Delta], *, num_blocks: int) -> dict[int, tuple[int, ...]]:
    """Returns the tables after the deltas, which are applied in order.

    Args:
        num_blocks: the KV blocks that the worker has.

    Raises:
        BadDelta: a delta names a sequence that there is not, or is already, or a place or block that there is not.
    """
    result = dict(tables)
    for delta in told:
        _check_blocks(delta, num_blocks)
        if isinstance(delta, Begun):
            if delta.sequence in result:
                raise BadDelta(f"sequence {delta.sequence} has a table already")
            result[delta.sequence] = (*_shared(result, delta), *delta.blocks)
            continue
        table = _table(result, delta.sequence)
        match delta:
            case Moved():
                result[delta.sequence] = _replaced(table, delta)
            case Cut():
                if not 0 <= delta.num_blocks <= len(table):
                    raise BadDelta(f"sequence {delta.sequence} has {len(table)} blocks, not {delta.num_blocks}")
                result[delta.sequence] = table[: delta.num_blocks]
            case Appended():
                result[delta.sequence] = (*table, *delta.blocks)
            case Freed():
                del result[delta.sequence]
    return result


def copies(before: Tables, told: Iterable[Delta]) -> tuple[tuple[int, int], ...]:
    """Lists the blocks to copy for the deltas, as pairs of source and target, each pair once.

    All sources are as they were before the step, so that whoever copies reads a source that is also a target first.
    """
    pairs: dict[tuple[int, int], None] = {}
    for delta in told:
        if isinstance(delta, Moved):
            table = _table(before, delta.sequence)
            _replaced(table, delta)
            pairs.update(dict.fromkeys((table[place], block) for place, block in delta.blocks))
    return tuple(pairs)


def _begun(before: Tables, after: Tables) -> Iterator[Begun]:
    """Yields the new sequences. Each shares the longest run of first blocks that there is to share."""
    by_first: defaultdict[int, list[tuple[int, tuple[int, ...]]]] = defaultdict(list)
    for sequence, table in sorted(before.items()):
        if table:
            by_first[table[0]].append((sequence, table))
    for sequence in sorted(after.keys() - before.keys()):
        table = after[sequence]
        num_shared, parent = 0, None
        candidates = by_first[table[0]] if table else []
        for other, blocks in candidates:
            common = _num_common(table, blocks)
            if common > num_shared:
                num_shared, parent = common, other
        if table:
            candidates.append((sequence, table))
        yield Begun(sequence=sequence, parent=parent, num_shared=num_shared, blocks=table[num_shared:])


def _changes(sequence: int, before: tuple[int, ...], after: tuple[int, ...]) -> Iterator[Delta]:
    """Yields what became of one sequence's table."""
    num_kept = min(len(before), len(after))
    if after[:num_kept] != before[:num_kept]:
        pairs = enumerate(zip(before, after, strict=False))
        yield Moved(sequence=sequence, blocks=tuple((place, new) for place, (old, new) in pairs if old != new))
    if len(after) < len(before):
        yield Cut(sequence=sequence, num_blocks=len(after))
    if len(after) > len(before):
        yield Appended(sequence=sequence, blocks=after[len(before) :])


def _num_common(left: tuple[int, ...], right: tuple[int, ...]) -> int:
    """Counts the first blocks that two tables have in common."""
    for place, (first, second) in enumerate(zip(left, right, strict=False)):
        if first != second:
            return place
    return min(len(left), len(right))


def _check_blocks(delta: Delta, num_blocks: int) -> None:
    match delta:
        case Begun() | Appended():
            blocks: Iterable[int] = delta.blocks
        case Moved():
            blocks = (block for _, block in delta.blocks)
        case Cut() | Freed():
            return
    for block in blocks:
        if not 0 <= block < num_blocks:
            raise BadDelta(f"sequence {delta.sequence} has block {block}, of {num_blocks} that there are")


def _table(tables: Tables, sequence: int) -> tuple[int, ...]:
    table = tables.get(sequence)
    if table is None:
        raise BadDelta(f"sequence {sequence} has no table")
    return table


def _shared(tables: Tables, delta: Begun) -> tuple[int, ...]:
    table = () if delta.parent is None else _table(tables, delta.parent)
    if not 0 <= delta.num_shared <= len(table):
        raise BadDelta(f"sequence {delta.sequence} shares {delta.num_shared} blocks of {len(table)}")
    return table[: delta.num_shared]


def _replaced(table: tuple[int, ...], delta: Moved) -> tuple[int, ...]:
    blocks = list(table)
    for place, block in delta.blocks:
        if not 0 <= place < len(blocks):
            raise BadDelta(f"sequence {delta.sequence} has {len(blocks)} blocks, none at place {place}")
        blocks[place] = block
    return tuple(blocks)
