"""Describes a request inside a replica as the scheduler sees it: its phase, its counts and its blocks."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from placement.serving.kv.holds import Hold


class Phase(Enum):
    """Says where a sequence stands between its submission and its end."""

    WAITING = "waiting"
    """It holds no blocks: it is new, or was preempted."""
    AWAITS_KV = "awaits_kv"
    """It holds blocks, and the keys and values of its prompt are on the way to them from another replica."""
    REPLAY = "replay"
    """It recomputes an answer that was begun elsewhere: known tokens are fed as decodes and not sampled again."""
    RUNNING = "running"
    """Steps compute its tokens."""
    SHIPPING = "shipping"
    """Its prompt is computed, and the keys and values are on the way to another replica."""
    LEAVING = "leaving"
    """It has ended, or only its last token is missing: no step computes it any more."""


TRANSITIONS: Mapping[Phase, frozenset[Phase]] = {
    Phase.WAITING: frozenset({Phase.AWAITS_KV, Phase.REPLAY, Phase.RUNNING}),
    Phase.AWAITS_KV: frozenset({Phase.REPLAY, Phase.RUNNING, Phase.WAITING}),
    Phase.REPLAY: frozenset({Phase.RUNNING, Phase.WAITING, Phase.LEAVING}),
    Phase.RUNNING: frozenset({Phase.WAITING, Phase.SHIPPING, Phase.LEAVING}),
    Phase.SHIPPING: frozenset(),
    Phase.LEAVING: frozenset({Phase.WAITING}),
}
"""The phases that may follow each phase. A sequence may also be forgotten in any of them.

One that leaves waits again where the step that was to give its last token is lost, with the keys and values of all.
"""


# Looked up for every sequence in every step, where a class's attribute is slow.
_RUNNING, _REPLAY = Phase.RUNNING, Phase.REPLAY


@dataclass(slots=True, kw_only=True, eq=False)
class Sequence:
    """The progress of one request inside a replica.

    Whoever samples counts ``num_output_tokens`` and extends ``block_hashes``; the scheduler changes the rest.

    Attributes:
        sequence_id: unique within the scheduler.
        max_tokens: the most tokens to generate.
        priority: the higher, the earlier a sequence runs and the later it is preempted. Fixed once added.
        arrival: grows with every request; a preempted sequence keeps it. Fixed once added.
        block_hashes: the hashes of its full blocks, from the first (``placement.serving.prefix.chain_hashes``). The
            list only grows and may lag behind what is computed. Where it is empty, none of the blocks is ever shared.
        reuse_prefix: whether it takes blocks that others computed. Its own are offered to others either way.
        replays: whether its answer is recomputed token by token where it must be recomputed, so that the bits are
            those of the first time.
        awaits_kv: whether the keys and values of its prompt come from another replica.
        num_computed_tokens: tokens whose keys and values are in its blocks, whoever computed them.
        hold: its KV blocks, in the order of tokens; the first ones may be shared, and those are full.
        num_cached_tokens: prompt tokens that were found computed when it was first admitted.
        num_registered_blocks: leading blocks that are computed and can be found in the pool by their hashes.
        num_preemptions: how often its blocks were taken away.
        phase: see :class:`Phase`; changed by :meth:`enter` alone.
        step: the step that computes some of its tokens and is not completed; None where there is none.
    """

    sequence_id: int
    num_prompt_tokens: int
    max_tokens: int
    priority: int = 0
    arrival: int
    block_hashes: list[bytes] = field(default_factory=list)
    reuse_prefix: bool = True
    replays: bool = False
    awaits_kv: bool = False
    num_output_tokens: int = 0
    num_computed_tokens: int = 0
    hold: Hold | None = None
    num_cached_tokens: int = 0
    num_registered_blocks: int = 0
    num_preemptions: int = 0
    phase: Phase = Phase.WAITING
    step: int | None = None

    def enter(self, phase: Phase) -> None:
        """Changes the phase to ``phase``, which must be one that may follow."""
        assert phase in TRANSITIONS[self.phase], (self.phase, phase)
        self.phase = phase

    @property
    def block_table(self) -> list[int]:
        """Returns its KV blocks in the order of tokens; an empty list where it holds none."""
        return [] if self.hold is None else self.hold.blocks

    @property
    def is_computed(self) -> bool:
        """Tells whether steps compute it."""
        return self.phase is _RUNNING or self.phase is _REPLAY

    @property
    def in_flight(self) -> bool:
        """Tells whether a step that is not completed computes some of its tokens."""
        return self.step is not None

    @property
    def rank(self) -> tuple[int, int, int]:
        """Returns the key that sorts sequences: those that run first, and are preempted last, come first."""
        return (-self.priority, self.arrival, self.sequence_id)

    @property
    def num_tokens(self) -> int:
        """Counts the tokens of the prompt and of the answer so far."""
        return self.num_prompt_tokens + self.num_output_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        """Counts the tokens that are still to be computed: 0 after a step that samples, until its token is counted."""
        return self.num_prompt_tokens + self.num_output_tokens - self.num_computed_tokens

    @property
    def num_foreign_tokens(self) -> int:
        """Counts the prompt's tokens whose keys and values can come from another replica; the last is computed here."""
        return max(0, self.num_prompt_tokens - 1 - self.num_computed_tokens)

    @property
    def num_reusable_tokens(self) -> int:
        """Returns the most tokens whose keys and values it may take from others; none of an answer to be replayed."""
        return min(self.num_tokens - 1, self.num_prompt_tokens) if self.replays else self.num_tokens - 1

    @property
    def num_next_tokens(self) -> int:
        """Returns the most tokens that the next step may compute; a replayed answer is computed one by one."""
        if self.phase is not _REPLAY:
            return self.num_uncomputed_tokens
        rest = self.num_prompt_tokens - self.num_computed_tokens
        return rest if rest > 0 else min(1, self.num_uncomputed_tokens)

    @property
    def is_decode(self) -> bool:
        """Tells whether the next step computes only one token of it, one that was generated.

        After a preemption nothing is computed and the prompt has at least one token, so the sequence is a prefill
        again. It is a decode as soon as one token is left to compute, for whatever reason: the cost is the same.
        """
        if self.phase is _RUNNING:
            return self.num_output_tokens > 0 and self.num_uncomputed_tokens == 1
        is_replayed = self.phase is _REPLAY and self.num_computed_tokens >= self.num_prompt_tokens
        return is_replayed and self.num_uncomputed_tokens > 0
