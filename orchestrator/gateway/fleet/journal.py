"""Remembers every unfinished sequence: enough to finish it elsewhere, token for token.

A client must see each token once and in order, whatever happens to the replica that computes them. The journal decides
that: it takes a token only from the current incarnation of the sequence's replica and only at the next position, and
it tells repeats from contradictions.
"""

from dataclasses import dataclass, field
from enum import Enum, auto

from protos.heterodyne.worker.v1 import worker_pb2


@dataclass(slots=True, kw_only=True, eq=False)
class JournalEntry:
    """Describes one unfinished sequence, which is a choice of a request.

    A token is a pure function of the logits, the prompt, the tokens before it, ``sampling`` and ``seed``. Together with
    the emitted tokens these are the whole state of sampling.

    Attributes:
        replica: the replica that computes the sequence, in its incarnation ``epoch``.
        sampling: how tokens are chosen. All choices of a request hold the same message; nobody changes it.
        min_tokens: no stop id is drawn before this many tokens.
        cache_salt: sequences of the same salt share the KV of equal prefixes.
        grammar: what the answer must match; its state follows from the emitted tokens.
        emitted_ids: the answer so far. Only the journal changes it.
    """

    request_id: str
    sequence_id: int
    replica: str
    epoch: int
    prompt_ids: tuple[int, ...]
    sampling: worker_pb2.Sampling
    seed: int
    max_tokens: int
    stop_token_ids: tuple[int, ...]
    priority: int
    min_tokens: int = 0
    cache_salt: bytes = b""
    grammar: worker_pb2.Grammar | None = None
    emitted_ids: list[int] = field(default_factory=list)


class Recorded(Enum):
    """Says what became of a token."""

    NEW = auto()  # kept: pass it on to the client
    DUPLICATE = auto()  # had it already, the same
    FENCED = auto()  # from an incarnation that no longer owns the sequence
    CLOSED = auto()  # the sequence has ended, or was cancelled while the token was on its way


class JournalError(Exception):
    """A replica broke the order of tokens. The request is moved or fails; the client does not see this error."""


class TokenGap(JournalError):
    """A token arrived whose predecessor did not."""

    def __init__(self, *, sequence_id: int, index: int, expected: int) -> None:
        self.sequence_id = sequence_id
        self.index = index
        self.expected = expected
        super().__init__(f"sequence {sequence_id}: token {index} arrived before token {expected}")


class TokenConflict(JournalError):
    """A replica repeated a position with another token than the client has."""

    def __init__(self, *, sequence_id: int, index: int) -> None:
        self.sequence_id = sequence_id
        self.index = index
        super().__init__(f"sequence {sequence_id}: token {index} differs from the one delivered")


class Journal:
    """Holds the unfinished sequences of a gateway, by sequence id."""

    def __init__(self) -> None:
        self._entries: dict[int, JournalEntry] = {}
        self.num_fenced = 0  # tokens refused because they came from a fenced epoch

    def __len__(self) -> int:
        return len(self._entries)

    def open(self, entry: JournalEntry) -> None:
        """Starts to remember a sequence. Its sequence id must be new."""
        assert entry.sequence_id not in self._entries, entry.sequence_id
        self._entries[entry.sequence_id] = entry

    def record(self, sequence_id: int, epoch: int, index: int, token_id: int) -> Recorded:
        """Notes the token at position ``index`` of the answer, counted from 0.

        Raises:
            TokenGap: ``index`` is beyond the next position.
            TokenConflict: another token is recorded at that position.
        """
        assert index >= 0, index
        entry = self._entries.get(sequence_id)
        if entry is None:
            return Recorded.CLOSED
        if epoch != entry.epoch:
            self.num_fenced += 1
            return Recorded.FENCED
        if index > len(entry.emitted_ids):
            raise TokenGap(sequence_id=sequence_id, index=index, expected=len(entry.emitted_ids))
        if index == len(entry.emitted_ids):
            entry.emitted_ids.append(token_id)
            return Recorded.NEW
        if entry.emitted_ids[index] != token_id:
            raise TokenConflict(sequence_id=sequence_id, index=index)
        return Recorded.DUPLICATE

    def trim(self, sequence_id: int, num_tokens: int) -> None:
        """Forgets the tokens past the first ``num_tokens``: a stop string ended the answer before they were shown."""
        del self._entries[sequence_id].emitted_ids[num_tokens:]

    def move(self, sequence_id: int, *, replica: str, epoch: int) -> JournalEntry:
        """Makes another replica, or another epoch, the owner; tokens of the old one are fenced.

        Recovery onto another replica needs this.
        """
        entry = self._entries[sequence_id]
        entry.replica, entry.epoch = replica, epoch
        return entry

    def close(self, sequence_id: int) -> JournalEntry | None:
        """Forgets a sequence that ended. Returns None where it was closed already, as when a cancel meets the end."""
        return self._entries.pop(sequence_id, None)

    def on_replica(self, replica: str, epoch: int) -> list[JournalEntry]:
        """Returns the sequences that an incarnation of a replica owns, in the order in which they were opened.

        Recovery onto another replica needs this.
        """
        return [entry for entry in self._entries.values() if (entry.replica, entry.epoch) == (replica, epoch)]
