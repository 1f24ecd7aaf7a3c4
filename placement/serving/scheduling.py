"""Which tokens go into a step: sequences + blocks + token budget -> StepPlan.

Stall-free chunked prefill (Sarathi-Serve, Agrawal et al. 2024): every running decode is in every step,
prompts fill what the token budget leaves, so a long prompt never delays somebody else's next token by more
than one step. Full blocks that others computed are shared (placement.serving.prefix): only the rest of a prompt is
computed.
"""

from bisect import insort
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from placement.errors import InvalidConfig, InvalidRequest
from placement.serving.blocks import BlockPool
from placement.serving.prefix import PrefixCache
from placement.serving.sequence import Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerLimits:
    """Bounds of a step.

    Attributes:
        token_budget: most tokens in a step, decodes counted.
        max_num_seqs: most sequences that hold blocks. At most ``token_budget``, or decodes could stall.
        num_batches: steps that are in flight at once, in the stages of a pipeline: decodes are dealt out among them.

    Raises:
        InvalidConfig: a bound is below 1, or the budget cannot hold a decode of every sequence.
    """

    token_budget: int
    max_num_seqs: int
    num_batches: int = 1

    def __post_init__(self) -> None:
        for name in ("token_budget", "max_num_seqs"):
            value = getattr(self, name)
            if value < 1:
                raise InvalidConfig(field=f"serving.{name}", value=value, problem="must be at least 1", fix="Raise it.")
        if self.token_budget < self.max_num_seqs:
            problem = f"is below serving.max_num_seqs ({self.max_num_seqs}), so decodes would stall"
            fix = "Raise token_budget or lower max_num_seqs."
            raise InvalidConfig(field="serving.token_budget", value=self.token_budget, problem=problem, fix=fix)


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Tokens ``[start, start + num_tokens)`` of one sequence.

    Attributes:
        samples: the chunk reaches the sequence's last token, so the step yields the next one.
    """

    sequence_id: int
    start: int
    num_tokens: int
    samples: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """What one step computes.

    Attributes:
        step: counts the plans that have chunks, from 1; one without is no step and has the last number.
        chunks: decodes first, then prefills.
        preempted: sequences whose blocks were taken for this step; they wait again.
    """

    step: int
    chunks: tuple[Chunk, ...]
    preempted: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens in the batch."""
        return sum(chunk.num_tokens for chunk in self.chunks)


@dataclass(slots=True)
class _Draft:
    """A step being put together."""

    budget: int  # tokens that still fit
    chunks: list[Chunk] = field(default_factory=list)
    preempted: list[int] = field(default_factory=list)

    def add(self, sequence: Sequence, num_tokens: int) -> None:
        assert 1 <= num_tokens <= self.budget and not sequence.in_flight, sequence
        chunk = Chunk(
            sequence_id=sequence.sequence_id,
            start=sequence.num_computed_tokens,
            num_tokens=num_tokens,
            samples=num_tokens == sequence.num_uncomputed_tokens,
        )
        self.chunks.append(chunk)
        self.budget -= num_tokens
        sequence.in_flight = True


class Scheduler:
    """Owns the sequences of a replica and their blocks.

    The caller runs each plan, calls ``complete`` for its chunks, then counts every sampled token in
    ``num_output_tokens`` and calls ``remove`` for what ended. Several plans may be in flight at once (micro-batches of
    a pipeline).

    Where plans run strictly in the order in which they were made, ``complete`` may be called, and the token counted,
    before a plan has run: whatever is shared or given back by that is read and written by later plans only.

    Args:
        prefix_cache: keep computed blocks, as long as there is room, for sequences to come. Otherwise sequences share
            only what is in use.
    """

    def __init__(self, pool: BlockPool, limits: SchedulerLimits, *, prefix_cache: bool = True) -> None:
        self._pool = pool
        self._limits = limits
        self._retain = prefix_cache
        self._prefixes = PrefixCache(pool)
        self._sequences: dict[int, Sequence] = {}
        self._running: list[Sequence] = []  # by rank; these hold blocks
        self._waiting: list[Sequence] = []  # by rank; nothing computed, no blocks
        self._removed: set[int] = set()  # ids that leave when the step they are in completes
        self._num_steps = 0
        self._num_preemptions = 0

    @property
    def num_running(self) -> int:
        """Sequences that hold blocks."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Sequences that hold none: new, or preempted."""
        return len(self._waiting)

    @property
    def num_preemptions(self) -> int:
        """Preemptions so far."""
        return self._num_preemptions

    @property
    def num_prefix_queries(self) -> int:
        """Prompt tokens looked up among what was computed, so far; each sequence counts once."""
        return self._prefixes.num_queries

    @property
    def num_prefix_hits(self) -> int:
        """Prompt tokens found there."""
        return self._prefixes.num_hits

    @property
    def pending_tokens(self) -> int:
        """Tokens known and not yet computed, of all sequences; those in flight count until they complete."""
        return sum(
            sequence.num_uncomputed_tokens
            for sequence in self._sequences.values()
            if sequence.sequence_id not in self._removed
        )

    def sequence(self, sequence_id: int) -> Sequence:
        """The sequence of that id. Raises KeyError once it has been removed."""
        return self._sequences[sequence_id]

    def add(self, sequence: Sequence) -> None:
        """Queues a new sequence.

        Raises:
            InvalidRequest: it has no prompt or no answer, or could not fit even if it had all blocks.
        """
        assert sequence.sequence_id not in self._sequences, sequence
        assert not (sequence.block_table or sequence.in_flight or sequence.num_computed_tokens), sequence
        self._refuse_impossible(sequence)
        self._sequences[sequence.sequence_id] = sequence
        insort(self._waiting, sequence, key=lambda other: other.rank)

    def remove(self, sequence_id: int) -> bool:
        """Forgets a sequence that ended or was cancelled and frees its blocks.

        In flight its blocks are being written: then it leaves when that step completes.

        Returns:
            False where it is unknown or already leaving, as when a cancel meets the end.
        """
        sequence = self._sequences.get(sequence_id)
        if sequence is None or sequence_id in self._removed:
            return False
        if sequence.in_flight:
            self._removed.add(sequence_id)
        else:
            self._forget(sequence)
        return True

    def schedule(self) -> StepPlan:
        """Plans the next step and marks its sequences in flight. Without work, the plan has no chunks."""
        draft = _Draft(budget=self._limits.token_budget)
        self._schedule_decodes(draft)
        self._schedule_prefills(draft)
        if not draft.preempted:
            self._admit(draft)
        self._num_steps += bool(draft.chunks)
        return StepPlan(step=self._num_steps, chunks=tuple(draft.chunks), preempted=tuple(draft.preempted))

    def complete(self, chunks: Seq[Chunk]) -> None:
        """Records that chunks of a step were computed. Call it once for each chunk, in any order."""
        for chunk in chunks:
            sequence = self._sequences[chunk.sequence_id]
            assert sequence.in_flight and sequence.num_computed_tokens == chunk.start, (sequence, chunk)
            sequence.in_flight = False
            sequence.num_computed_tokens += chunk.num_tokens
            self._prefixes.register(sequence)
            if chunk.sequence_id in self._removed:
                self._removed.remove(chunk.sequence_id)
                self._forget(sequence)

    def register(self, sequence_id: int) -> None:
        """Lets the blocks of a sequence be shared whose hashes came after their step had completed.

        ``complete`` and ``remove`` do the same; this is for who cannot wait for them. Raises KeyError once it is gone.
        """
        self._prefixes.register(self._sequences[sequence_id])

    def check(self) -> None:
        """Asserts what must always hold, between any two calls."""
        self._prefixes.check(self._running, self._waiting)
        assert len(self._running) <= self._limits.max_num_seqs
        assert {s.sequence_id for s in self._running + self._waiting} == self._sequences.keys()
        assert len(self._running) + len(self._waiting) == len(self._sequences)
        for queue in (self._running, self._waiting):
            assert queue == sorted(queue, key=lambda s: s.rank)
        for sequence in self._running:
            slots = len(sequence.block_table) * self._pool.block_size
            assert 0 <= sequence.num_computed_tokens <= min(slots, sequence.num_tokens), sequence
            assert sequence.num_output_tokens <= sequence.max_tokens, sequence
        for sequence in self._waiting:
            assert not sequence.block_table and not sequence.in_flight and not sequence.num_computed_tokens
        assert all(self._sequences[sequence_id].in_flight for sequence_id in self._removed)

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

    def _schedule_decodes(self, draft: _Draft) -> None:
        """One token of every running decode, by rank, so that nobody is preempted who is in the plan; or, where
        several steps are in flight at once, of as many decodes as each of them gets.
        """
        decodes = [sequence for sequence in self._running if sequence.is_decode]
        most = -(-len(decodes) // self._limits.num_batches)
        for sequence in decodes:
            if len(draft.chunks) == most:
                return
            if sequence.in_flight or not sequence.is_decode:
                continue  # preempted a moment ago is no decode either
            if self._has_slot(sequence) or self._grow(sequence, draft):
                draft.add(sequence, 1)

    def _schedule_prefills(self, draft: _Draft) -> None:
        """Goes on with prompts begun earlier; their blocks were allocated at admission."""
        for sequence in self._running:
            if not draft.budget:
                return
            if not sequence.in_flight and not sequence.is_decode and sequence.num_uncomputed_tokens:
                assert self._has_slot(sequence), sequence
                draft.add(sequence, min(sequence.num_uncomputed_tokens, draft.budget))

    def _admit(self, draft: _Draft) -> None:
        """Starts waiting sequences, in order: only one that awaits what is being computed lets others pass.

        Nobody overtakes one that does not fit yet.
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
            draft.add(sequence, min(sequence.num_uncomputed_tokens, draft.budget))

    def _start(self, sequence: Sequence, found: list[int], count: int) -> None:
        """Gives a waiting sequence the computed blocks it starts with and ``count`` of its own."""
        self._pool.share(found)
        sequence.block_table = found + self._pool.allocate(count, after=found[-1] if found else None)
        self._prefixes.begin(sequence, len(found))
        insort(self._running, sequence, key=lambda other: other.rank)

    def _has_slot(self, sequence: Sequence) -> bool:
        return sequence.num_tokens <= len(sequence.block_table) * self._pool.block_size

    def _grow(self, sequence: Sequence, draft: _Draft) -> bool:
        """Gives a decode one more block. False where the sequence itself had to be preempted."""
        while not self._pool.can_allocate(1):
            # What awaits its sampled token is spared: recomputing it now would sample that token twice.
            victim = next(s for s in reversed(self._running) if not s.in_flight and s.num_uncomputed_tokens)
            self._preempt(victim)
            draft.preempted.append(victim.sequence_id)
            if victim is sequence:
                return False
        sequence.block_table += self._pool.allocate(1, after=sequence.block_table[-1])
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Takes its blocks; it waits, at its old place in the order, to be computed again."""
        self._release(sequence)
        sequence.num_computed_tokens = 0
        sequence.num_preemptions += 1
        self._num_preemptions += 1
        insort(self._waiting, sequence, key=lambda other: other.rank)

    def _forget(self, sequence: Sequence) -> None:
        del self._sequences[sequence.sequence_id]
        if sequence.block_table:
            self._release(sequence)
        else:
            self._prefixes.leave(sequence)
            self._waiting.remove(sequence)

    def _release(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self._prefixes.leave(sequence)
        self._pool.release(sequence.block_table, retain=self._retain)
        sequence.block_table = []


def choose_token_budget(profile: Seq[tuple[int, float]], objective_s: float, tile: int) -> int:
    """The token budget for a time-between-tokens objective: T(budget) <= objective (Sarathi-Serve, 4.3).

    Only measured sizes are chosen, nothing between or beyond them, and only multiples of ``tile``: one token
    over a tile costs as much as a whole one (257 tokens +32 % over 256 in the paper).

    Args:
        profile: measured (tokens in the step, seconds).
        tile: tokens that the matrix kernels compute at once.

    Returns:
        The largest budget that meets the objective; where none does, ``tile``: decodes then exceed the
        objective, but no smaller budget would make the step much shorter.
    """
    assert tile >= 1, tile
    return max(
        (tokens for tokens, step_s in profile if tokens % tile == 0 and tokens and step_s <= objective_s),
        default=tile,
    )
