"""Decides which tokens go into a step, from the sequences, the blocks and a token budget.

Stall-free chunked prefill (Sarathi-Serve, Agrawal et al. 2024): every running decode is in every step, and prompts fill
what the token budget leaves, so a long prompt never delays somebody else's next token by more than one step. Full
blocks that others computed are shared (placement.serving.prefix): only the rest of a prompt is computed.
"""

from bisect import insort
from collections.abc import Iterable
from collections.abc import Sequence as Seq

from placement.errors import InvalidRequest
from placement.serving.draft import Draft
from placement.serving.kv.blocks import BlockPool
from placement.serving.kv.holds import Hold, Holds, SequenceOwner, StepOwner, TransferOwner
from placement.serving.prefix import PrefixCache
from placement.serving.sequence import Phase, Sequence
from placement.serving.step_plan import Chunk, SchedulerLimits, StepPlan

# Looked up for every sequence in every step, where a class's attribute is slow.
_LEAVING, _REPLAY, _AWAITS_KV = Phase.LEAVING, Phase.REPLAY, Phase.AWAITS_KV


class Scheduler:
    """Owns the sequences of a replica and their blocks.

    The caller runs each plan, calls ``complete`` for its chunks, then counts every sampled token in
    ``num_output_tokens`` and calls ``remove`` for each sequence that ended. Several plans may be in flight at once
    (micro-batches of a pipeline). For early reuse of blocks (:mod:`placement.serving.replica`) the caller may do all
    that before a plan has run.

    Args:
        prefix_cache: whether computed blocks are kept, as long as there is room, for sequences to come. Otherwise
            sequences share only blocks in use.
    """

    def __init__(self, pool: BlockPool, limits: SchedulerLimits, *, prefix_cache: bool = True) -> None:
        self._pool = pool
        self._holds = Holds(pool)
        self._limits = limits
        self._retain = prefix_cache
        self._prefixes = PrefixCache(pool)
        self._sequences: dict[int, Sequence] = {}
        self._running: list[Sequence] = []  # by rank; these hold blocks
        self._waiting: list[Sequence] = []  # by rank; nothing computed, no blocks
        self._num_steps = 0
        self._num_preemptions = 0

    @property
    def num_running(self) -> int:
        """Returns how many sequences hold blocks."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Returns how many sequences hold no blocks: they are new, or were preempted."""
        return len(self._waiting)

    @property
    def num_preemptions(self) -> int:
        """Returns how many preemptions there were so far."""
        return self._num_preemptions

    @property
    def num_prefix_queries(self) -> int:
        """Returns how many prompt tokens were looked up among computed blocks so far; each sequence counts once."""
        return self._prefixes.num_queries

    @property
    def num_prefix_hits(self) -> int:
        """Returns how many of those prompt tokens were found."""
        return self._prefixes.num_hits

    @property
    def pending_tokens(self) -> int:
        """Counts the tokens of all sequences that are to be computed; those in flight count until they complete.

        Of a prompt whose keys and values come from another replica, only the last token is computed here.
        """
        return sum(
            sequence.num_uncomputed_tokens if sequence.phase is not _AWAITS_KV else 1
            for sequence in self._sequences.values()
            if sequence.phase is not _LEAVING
        )

    def sequence(self, sequence_id: int) -> Sequence:
        """Returns the sequence of that id. Raises KeyError once it has been removed."""
        return self._sequences[sequence_id]

    def add(self, sequence: Sequence) -> None:
        """Queues a new sequence.

        Raises:
            InvalidRequest: it has no prompt or no answer, or could not fit even if it had all blocks.
        """
        assert sequence.sequence_id not in self._sequences, sequence
        assert sequence.phase is Phase.WAITING and not sequence.num_computed_tokens, sequence
        self._refuse_impossible(sequence)
        self._sequences[sequence.sequence_id] = sequence
        insort(self._waiting, sequence, key=lambda other: other.rank)

    def remove(self, sequence_id: int) -> bool:
        """Forgets a sequence that ended or was cancelled, and frees its blocks.

        While a step that is not completed computes it, that step holds the blocks in its place.

        Returns:
            False where it is unknown or already leaving, as when a cancel meets the end.
        """
        sequence = self._sequences.get(sequence_id)
        if sequence is None or sequence.phase is Phase.LEAVING:
            return False
        if sequence.step is None:
            self._forget(sequence)
            return True
        assert sequence.hold is not None, sequence
        self._holds.pass_on(sequence.hold, StepOwner(sequence.step))
        sequence.enter(Phase.LEAVING)
        return True

    def ship(self, sequence_id: int) -> Hold:
        """Forgets a sequence whose keys and values go elsewhere; the transfer holds its blocks from now on."""
        sequence = self._sequences.pop(sequence_id)
        hold = sequence.hold
        assert sequence.step is None and hold is not None, sequence
        self._running.remove(sequence)
        self._prefixes.leave(sequence)
        self._holds.pass_on(hold, TransferOwner(sequence_id))
        sequence.hold = None
        sequence.enter(Phase.SHIPPING)
        return hold

    def expect(self, sequence_id: int) -> Hold:
        """Lets a transfer hold the blocks of a sequence that awaits keys and values, beside the sequence itself."""
        sequence = self._sequences[sequence_id]
        assert sequence.phase is Phase.AWAITS_KV, sequence
        return self._holds.share(sequence.block_table, TransferOwner(sequence_id))

    def arrive(self, sequence_id: int, num_tokens: int) -> None:
        """Goes on with a sequence whose first ``num_tokens`` keys and values have come; the others are computed here.

        At least one token is computed here, since a step has to sample after it.
        """
        sequence = self._sequences[sequence_id]
        sequence.num_computed_tokens = max(sequence.num_computed_tokens, min(num_tokens, sequence.num_tokens - 1))
        self._prefixes.arrive(sequence)
        sequence.enter(_first_phase(sequence))

    def transfers(self) -> list[Hold]:
        """Returns the holds of transfers, oldest first."""
        return self._holds.of(TransferOwner)

    def release(self, hold: Hold) -> None:
        """Ends the hold of a transfer."""
        self._holds.release(hold, retain=self._retain)

    def schedule(self) -> StepPlan:
        """Plans the next step and marks its sequences in flight. With nothing to compute, the plan has no chunks."""
        draft = Draft(step=self._num_steps + 1, budget=self._limits.token_budget)
        self._schedule_decodes(draft)
        self._schedule_prefills(draft)
        if not draft.preempted:
            self._admit(draft)
        self._num_steps += bool(draft.chunks)
        return draft.plan()

    def complete(self, chunks: Seq[Chunk]) -> None:
        """Records that chunks of a step were computed. Call it once for each chunk, in any order."""
        for chunk in chunks:
            sequence = self._sequences[chunk.sequence_id]
            assert sequence.step is not None and sequence.num_computed_tokens == chunk.start, (sequence, chunk)
            sequence.step = None
            sequence.num_computed_tokens += chunk.num_tokens
            self._prefixes.register(sequence)
            if sequence.phase is _LEAVING:
                self._forget(sequence)
            elif sequence.phase is _REPLAY and sequence.num_uncomputed_tokens <= 1:
                sequence.enter(Phase.RUNNING)

    def forget_leaving(self) -> None:
        """Forgets the sequences that leave with a step, since no step ends any more."""
        for sequence in [sequence for sequence in self._running if sequence.phase is _LEAVING]:
            sequence.step = None
            self._forget(sequence)

    def lose_kv(self, left: Iterable[Sequence]) -> None:
        """Has every sequence wait to be computed again, since the keys and values of all blocks are lost.

        Steps on their way are not computed: ``complete`` is not called for them any more.

        Args:
            left: sequences that were removed before their last token was known; they wait again as well.
        """
        self.forget_leaving()
        for sequence in list(self._running):
            sequence.step = None
            self._preempt(sequence)
        for sequence in left:
            assert sequence.hold is None and sequence.step is None, sequence
            self._sequences[sequence.sequence_id] = sequence
            self._wait_again(sequence)
        self._pool.forget_names()

    def check(self) -> None:
        """Asserts what must always hold, between any two calls."""
        self._holds.check()
        self._prefixes.check(self._running, self._waiting)
        assert len(self._running) <= self._limits.max_num_seqs
        assert {s.sequence_id for s in self._running + self._waiting} == self._sequences.keys()
        assert len(self._running) + len(self._waiting) == len(self._sequences)
        for queue in (self._running, self._waiting):
            assert queue == sorted(queue, key=lambda s: s.rank)
        for sequence in self._running:
            self._check_running(sequence)
        for sequence in self._waiting:
            assert sequence.phase is Phase.WAITING and sequence.hold is None, sequence
            assert sequence.step is None and not sequence.num_computed_tokens, sequence

    def _check_running(self, sequence: Sequence) -> None:
        assert sequence.phase not in (Phase.WAITING, Phase.SHIPPING), sequence
        assert sequence.hold is not None, sequence
        is_leaving = sequence.phase is Phase.LEAVING
        assert isinstance(sequence.hold.owner, StepOwner if is_leaving else SequenceOwner), sequence
        assert sequence.step is not None or not is_leaving, sequence
        assert sequence.step is None or sequence.is_computed or is_leaving, sequence
        slots = len(sequence.block_table) * self._pool.block_size
        assert 0 <= sequence.num_computed_tokens <= min(slots, sequence.num_tokens), sequence
        assert sequence.num_output_tokens <= sequence.max_tokens, sequence

    def _refuse_impossible(self, sequence: Sequence) -> None:
        prompt, answer = sequence.num_prompt_tokens, sequence.max_tokens
        capacity = self._pool.num_total * self._pool.block_size
        for field_name, value in (("prompt", prompt), ("max_tokens", answer)):
            if value < 1:
                problem, fix = "must be at least 1 token", "Raise it."
                raise InvalidRequest(field=field_name, value=value, problem=problem, fix=fix)
        if prompt + answer > capacity:
            problem = f"with {prompt} prompt tokens exceeds the {capacity} KV slots"
            fix = "Shorten the prompt or lower max_tokens."
            raise InvalidRequest(field="max_tokens", value=answer, problem=problem, fix=fix)

    def _schedule_decodes(self, draft: Draft) -> None:
        """Adds one token of every running decode, by rank, so that no sequence of the plan is preempted.

        Where several steps are in flight at once, each gets its share of the decodes.
        """
        decodes = [sequence for sequence in self._running if sequence.is_decode]
        most = -(-len(decodes) // self._limits.num_batches)
        block_size, preempted, chunks = self._pool.block_size, draft.preempted, draft.chunks
        for sequence in decodes:
            if len(chunks) == most:
                return
            if sequence.step is not None or (preempted and not sequence.is_decode):
                continue  # preempted a moment ago is no decode either
            num_tokens = sequence.num_prompt_tokens + sequence.num_output_tokens
            if num_tokens <= len(sequence.block_table) * block_size or self._find_room(sequence, draft):
                draft.add(sequence, 1, is_decode=True)

    def _schedule_prefills(self, draft: Draft) -> None:
        """Continues prompts begun earlier, whose blocks were allocated at admission, and sequences that were given
        several tokens at once.
        """
        for sequence in list(self._running):
            if not draft.budget:
                return
            if sequence.step is not None or sequence.is_decode or not sequence.is_computed:
                continue
            num_tokens = min(sequence.num_next_tokens, draft.budget)
            if num_tokens and self._find_room(sequence, draft):
                draft.add(sequence, num_tokens, is_decode=False)

    def _admit(self, draft: Draft) -> None:
        """Starts waiting sequences in their order.

        No sequence overtakes one that does not fit yet. Only one that awaits blocks which another computes is passed.
        """
        index = 0
        while index < len(self._waiting) and draft.budget and len(self._running) < self._limits.max_num_seqs:
            if not self._pool.can_allocate(1 + len(self._running)):
                return  # nothing fits: spares looking up a long prompt
            sequence = self._waiting[index]
            found = self._prefixes.look_up(sequence)
            if found is None:
                index += 1
                continue
            # All its blocks at once, so that a prefill once begun never waits for any; and one spare block
            # for each sequence that runs already, or the next step would preempt what this one admits.
            count = self._pool.blocks_for(sequence.num_tokens) - len(found)
            if not self._pool.can_allocate(count + len(self._running), sharing=found):
                return
            del self._waiting[index]
            self._start(sequence, found, count)
            if sequence.phase is Phase.AWAITS_KV:
                draft.reserved.append(sequence.sequence_id)
            else:
                num_tokens = min(sequence.num_next_tokens, draft.budget)
                draft.add(sequence, num_tokens, is_decode=sequence.is_decode)

    def _start(self, sequence: Sequence, found: list[int], count: int) -> None:
        """Gives a waiting sequence the computed blocks that it starts with and ``count`` of its own."""
        sequence.hold = self._holds.take(SequenceOwner(sequence.sequence_id), count, found=found)
        self._prefixes.begin(sequence, len(found))
        # What is less than a block is sooner computed than sent, as are the prompts of forks but for the first.
        is_sent = sequence.awaits_kv and sequence.num_foreign_tokens >= self._pool.block_size
        self._prefixes.compute(sequence, is_sent=is_sent)
        sequence.enter(Phase.AWAITS_KV if is_sent else _first_phase(sequence))
        insort(self._running, sequence, key=lambda other: other.rank)

    def _find_room(self, sequence: Sequence, draft: Draft) -> bool:
        """Gives a running sequence the blocks that its tokens lack. Returns False where it was preempted instead."""
        while sequence.num_tokens > len(sequence.block_table) * self._pool.block_size:
            if not self._grow(sequence, draft):
                return False
        return True

    def _grow(self, sequence: Sequence, draft: Draft) -> bool:
        """Gives a sequence one more block. Returns False where the sequence itself had to be preempted."""
        while not self._pool.can_allocate(1):
            # What awaits its sampled token is spared: recomputing it now would sample that token twice.
            victim = next(s for s in reversed(self._running) if s.step is None and _can_be_preempted(s))
            self._preempt(victim)
            draft.preempted.append(victim.sequence_id)
            if victim is sequence:
                return False
        assert sequence.hold is not None, sequence
        self._holds.grow(sequence.hold, 1)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Takes the blocks of a sequence, which then waits at its old place in the order to be computed again."""
        self._release(sequence)
        self._wait_again(sequence)

    def _wait_again(self, sequence: Sequence) -> None:
        """Queues a sequence that has no blocks any more at its old place."""
        sequence.enter(Phase.WAITING)
        sequence.awaits_kv = False  # what had come is gone: the prompt is computed here
        sequence.num_computed_tokens = 0
        sequence.num_preemptions += 1
        self._num_preemptions += 1
        insort(self._waiting, sequence, key=lambda other: other.rank)

    def _forget(self, sequence: Sequence) -> None:
        del self._sequences[sequence.sequence_id]
        if sequence.hold is not None:
            self._release(sequence)
        else:
            self._prefixes.leave(sequence)
            self._waiting.remove(sequence)

    def _release(self, sequence: Sequence) -> None:
        assert sequence.hold is not None, sequence
        self._running.remove(sequence)
        self._prefixes.leave(sequence)
        self._holds.release(sequence.hold, retain=self._retain)
        sequence.hold = None


def _first_phase(sequence: Sequence) -> Phase:
    """Returns the phase of a sequence that has its blocks and begins to be computed."""
    is_replay = sequence.replays and sequence.num_output_tokens > 0 and sequence.num_uncomputed_tokens > 1
    return Phase.REPLAY if is_replay else Phase.RUNNING


def _can_be_preempted(sequence: Sequence) -> bool:
    return sequence.is_computed and sequence.num_uncomputed_tokens > 0
