"""Remembers which block tables an attention worker was told, and says what it must be told next."""

from collections import OrderedDict
from collections.abc import Mapping

from placement.serving.offload.deltas import Appended, Begun, Delta, Freed

_MOST = 4096


class ToldTables:
    """Holds the tables that a session knows, the one that was used last at the end.

    Nobody says which sequences have ended: those that were not used for longest are freed once there are too many.
    """

    def __init__(self, most: int = _MOST) -> None:
        self._told: OrderedDict[int, tuple[int, ...]] = OrderedDict()
        self._most = most

    def update(self, tables: Mapping[int, tuple[int, ...]]) -> tuple[Delta, ...]:
        """Returns what the session is to be told before a step that uses some tables.

        A table that does not go on from the one that was told is of a sequence that lost its blocks: nothing of it is
        there any more, so it begins anew and no block is copied.
        """
        deltas: list[Delta] = []
        for sequence, table in tables.items():
            known = self._told.get(sequence)
            if known is table or known == table:
                self._told.move_to_end(sequence)
                continue
            if known is not None and table[: len(known)] == known:
                deltas.append(Appended(sequence=sequence, blocks=table[len(known) :]))
            else:
                if known is not None:
                    deltas.append(Freed(sequence=sequence))
                deltas.append(Begun(sequence=sequence, blocks=table))
            self._told[sequence] = table
            self._told.move_to_end(sequence)
        while len(self._told) > max(self._most, len(tables)):
            deltas.append(Freed(sequence=self._told.popitem(last=False)[0]))
        return tuple(deltas)
