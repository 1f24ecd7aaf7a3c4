"""Keeps the sequences that a replica has not ended: what was asked, and the tokens as far as they are known."""

from collections.abc import Sequence as Seq
from dataclasses import dataclass

from placement.serving.events import Advance, EndReason, SequenceSpec, Submit, Tell
from placement.serving.prefix import chain_hashes
from placement.serving.sequence import Sequence
from placement.serving.step_plan import Chunk


@dataclass(slots=True, kw_only=True, eq=False)
class LiveSequence:
    """A sequence that has not ended, with its tokens. Times are seconds of a monotonic clock.

    Attributes:
        token_ids: prompt and answer, as far as the answer is known. ``sequence`` may count one token more, which the
            step that executes is about to give.
        num_emitted: leading tokens of the answer that another replica gave; they are not told again.
        scheduled_s: when a step first computed it, or another replica was asked for its prompt; None before.
    """

    spec: SequenceSpec
    sequence: Sequence
    token_ids: list[int]
    num_emitted: int
    submitted_s: float
    scheduled_s: float | None = None

    @property
    def num_outputs(self) -> int:
        """Returns how many tokens of the answer are known."""
        return len(self.token_ids) - self.sequence.num_prompt_tokens

    @property
    def num_told(self) -> int:
        """Returns how many tokens of the answer this replica gave."""
        return self.num_outputs - self.num_emitted

    def known(self, chunk: Chunk) -> Seq[int]:
        """Returns the tokens of a chunk, as far as they are known."""
        stop = chunk.start + chunk.num_tokens
        assert len(self.token_ids) >= stop - 1, "only the newest token can be unknown"
        return self.token_ids[chunk.start : stop]

    def accept(self, advance: Advance) -> tuple[tuple[int, ...], EndReason | None]:
        """Returns the given tokens that the answer takes, up to its end, and why it ends with them, if it does."""
        given, spec = advance.token_ids, self.spec
        room = spec.max_tokens - self.num_outputs
        if len(given) < room and not spec.stop_token_ids and not advance.is_complete:
            return given, None
        for index, token_id in enumerate(given[:room], start=1):
            if token_id in spec.stop_token_ids:
                return given[:index], EndReason.STOP
        if given and advance.is_complete and len(given) <= room:
            return given, EndReason.STOP
        return given[:room], EndReason.LENGTH if len(given) >= room else None

    def tell(self, place: int, token_ids: tuple[int, ...], now_s: float) -> Tell:
        """Returns the command that tells the client of tokens. Call it before they are added to the answer."""
        sequence, first_index = self.sequence, self.num_outputs
        tell = Tell(sequence.sequence_id, place, first_index, token_ids, sequence.num_preemptions)
        if first_index > self.num_emitted:
            return tell
        assert self.scheduled_s is not None, self
        return tell._replace(
            queue_s=self.scheduled_s - self.submitted_s,
            prefill_s=now_s - self.scheduled_s,
            cached_tokens=sequence.num_cached_tokens,
        )

    def extend_hashes(self, block_size: int) -> None:
        """Hashes the blocks that have become full, so that later prompts may find them."""
        hashes = self.sequence.block_hashes
        if len(self.token_ids) // block_size > len(hashes):
            salt = self.spec.cache_salt
            self.sequence.block_hashes = chain_hashes(self.token_ids, block_size, salt, already=hashes)

    def check(self, *, is_counted_early: bool) -> None:
        """Asserts that the counts agree with the tokens."""
        unknown = self.sequence.num_tokens - len(self.token_ids)
        assert 0 <= unknown <= int(is_counted_early) * 2, (self.sequence, len(self.token_ids))
        assert self.num_emitted <= self.num_outputs <= self.spec.max_tokens, self.sequence


class Arrivals:
    """Turns submissions into sequences, and numbers them in the order in which they come."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._num_submitted = 0
        self._hashed: tuple[tuple[int, ...], bytes, list[bytes]] | None = None  # the newest prompt and its hashes

    def begin(self, event: Submit) -> LiveSequence:
        """Returns the sequence of a submission, with the tokens that another replica has given it already."""
        spec = event.spec
        sequence = Sequence(
            sequence_id=event.sequence_id,
            num_prompt_tokens=len(spec.prompt_ids),
            max_tokens=spec.max_tokens,
            priority=spec.priority,
            arrival=self._num_submitted,
            block_hashes=self._hash_prompt(spec),
            reuse_prefix=spec.reuse_prefix,
            replays=bool(event.emitted_ids),
            awaits_kv=spec.awaits_kv,
            num_output_tokens=len(event.emitted_ids),
        )
        self._num_submitted += 1
        live = LiveSequence(
            spec=spec,
            sequence=sequence,
            token_ids=[*spec.prompt_ids, *event.emitted_ids],
            num_emitted=len(event.emitted_ids),
            submitted_s=event.submitted_s,
        )
        live.extend_hashes(self._block_size)
        return live

    def _hash_prompt(self, spec: SequenceSpec) -> list[bytes]:
        """Returns the hashes of the prompt's full blocks. The choices of a request share one prompt, hashed once."""
        if self._hashed is None or self._hashed[0] is not spec.prompt_ids or self._hashed[1] != spec.cache_salt:
            hashes = chain_hashes(spec.prompt_ids, self._block_size, spec.cache_salt)
            self._hashed = (spec.prompt_ids, spec.cache_salt, hashes)
        return list(self._hashed[2])
