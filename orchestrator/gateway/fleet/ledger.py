"""Keeps what a replica has to do between its load reports, as far as the gateway knows it by itself. Pure.

A report is up to 0.4 s old, and may be older than the last submissions. The gateway knows what it submitted, and hears
of each step which prompts it computed and which sequences ended.
"""

from collections.abc import Hashable
from dataclasses import dataclass

from placement.planning.plan import Role
from placement.serving.routing.choice import ReplicaLoad
from protos.heterodyne.worker.v1 import worker_pb2 as pb

_MOST_REPORTS = 2
"""A submission counts beside the reports until the second one after it, which must know of it."""


@dataclass(slots=True, kw_only=True)
class _Entry:
    """A sequence, or a request that is about to be submitted.

    Attributes:
        num_tokens: tokens to be computed before it has its first one.
        num_blocks: KV blocks that it takes at once.
        is_shipped: whether another replica answers it, so that its keys and values move before it ends here.
        num_reports: reports since it was submitted.
    """

    num_tokens: int
    num_sequences: int
    num_blocks: int
    is_shipped: bool
    num_reports: int = 0


class Ledger:
    """Corrects the last report of one incarnation of a replica by what happened since."""

    def __init__(self, name: str, *, role: Role = Role.MIXED, block_size: int = 0) -> None:
        self._name = name
        self._role = role
        self._block_size = block_size
        self._entries: dict[Hashable, _Entry] = {}  # of all that is there
        self._unreported: dict[Hashable, _Entry] = {}
        self._num_computed = self._num_ended = self._num_shipped = self._num_freed_blocks = 0  # since the last report
        self._num_left = 0  # shipped sequences that were there by then, and that the last report does not have

    def add(
        self,
        key: Hashable,
        num_tokens: int,
        *,
        num_sequences: int = 1,
        num_blocks: int = 0,
        is_shipped: bool = False,
    ) -> None:
        """Notes what is bound for the replica: a sequence, or several under one key."""
        entry = _Entry(num_tokens=num_tokens, num_sequences=num_sequences, num_blocks=num_blocks, is_shipped=is_shipped)
        self._entries[key] = self._unreported[key] = entry

    def drop(self, key: Hashable) -> None:
        """Forgets what was never submitted, or is noted under another key from now on."""
        self._entries.pop(key, None)
        self._unreported.pop(key, None)

    def begun(self, key: Hashable) -> None:
        """Notes that a sequence has its first token, so that one token of it is pending from now on."""
        if key in self._unreported:
            self._unreported[key].num_tokens = 1

    def ended(self, key: Hashable, num_tokens: int = 0) -> bool:
        """Notes that a sequence of so many tokens ended; returns whether it was there."""
        entry = self._entries.pop(key, None)
        if entry is None:
            return False
        if self._unreported.pop(key, None) is not None:
            return True
        if entry.is_shipped:
            self._num_shipped += 1
        else:
            self._num_ended += 1
            self._num_freed_blocks += num_tokens // self._block_size if self._block_size else 0
        return True

    def computed(self, num_prompt_tokens: int) -> None:
        """Notes that a step has computed so many tokens of prompts."""
        self._num_computed += num_prompt_tokens

    def reported(self, report: pb.LoadReport) -> None:
        """Notes a report. It knows of every submission where it has as many sequences as there are."""
        self._num_computed = self._num_ended = self._num_shipped = self._num_freed_blocks = 0
        num_known = report.num_running + report.num_waiting + report.num_moving
        knows_all = num_known >= sum(entry.num_sequences for entry in self._entries.values())
        for entry in self._unreported.values():
            entry.num_reports += 1
        self._unreported = {
            key: entry for key, entry in self._unreported.items() if not knows_all and entry.num_reports < _MOST_REPORTS
        }
        # What is shipped is there until its first token comes from elsewhere: the replica may be done with it long
        # before, or be asked for it long after, where blocks are waited for.
        reported = [entry for key, entry in self._entries.items() if key not in self._unreported]
        num_missing = max(0, sum(entry.num_sequences for entry in reported) - num_known)
        self._num_left = min(num_missing, sum(entry.is_shipped for entry in reported))

    def load(self, report: pb.LoadReport, *, accepting: bool) -> ReplicaLoad:
        """Returns the load at present, from the last report."""
        new = self._unreported.values()
        # Each that ended is looked for where it most likely was at that report, then in the other phases.
        num_shipped = max(0, self._num_shipped - self._num_left)
        num_moving, num_shipped = _less(report.num_moving, num_shipped)
        num_running, num_others = _less(report.num_running, self._num_ended + num_shipped)
        num_waiting, num_others = _less(report.num_waiting, num_others)
        num_moving, _ = _less(num_moving, num_others)
        pending = max(num_running, report.pending_tokens - self._num_computed - self._num_ended)
        blocks = report.free_blocks + self._num_freed_blocks - sum(entry.num_blocks for entry in new)
        return ReplicaLoad(
            name=self._name,
            accepting=accepting,
            pending_tokens=min(pending, report.pending_tokens) + sum(entry.num_tokens for entry in new),
            num_running=num_running,
            num_waiting=num_waiting + sum(entry.num_sequences for entry in new),
            free_blocks=max(0, min(blocks, report.total_blocks)),
            total_blocks=report.total_blocks,
            token_budget=report.budget.token_budget,
            role=self._role,
            block_size=self._block_size,
            num_moving=num_moving,
        )


def _less(count: int, ended: int) -> tuple[int, int]:
    """Takes those that ended from a count; returns what is left of both."""
    taken = min(count, ended)
    return count - taken, ended - taken
