"""A request inside a worker as scheduling sees it: counts and blocks. Token ids live with the executor."""

from dataclasses import dataclass, field


@dataclass(slots=True, kw_only=True, eq=False)
class Sequence:
    """Progress of one request.

    Whoever samples counts ``num_output_tokens`` and extends ``block_hashes``; the scheduler changes the rest.

    Attributes:
        sequence_id: unique within the scheduler.
        max_tokens: most tokens to generate.
        priority: higher runs first and is preempted last. Fixed once added.
        arrival: grows with every request; a preempted sequence keeps it. Fixed once added.
        block_hashes: of its full blocks, from the first (``placement.serving.prefix.chain_hashes``); it only grows, and
            may lag behind what is computed. Empty: none of its blocks is ever shared.
        reuse_prefix: take blocks that others computed. Its own are offered to others either way.
        num_computed_tokens: tokens whose keys and values are in its blocks, whoever computed them.
        block_table: its KV blocks, in token order; the first ones may be shared, those are full.
        num_cached_tokens: prompt tokens found computed when it was first admitted.
        num_registered_blocks: leading blocks that are computed and whose hashes the pool has been told.
        num_preemptions: times its blocks were taken away.
        in_flight: part of a step that has not completed.
    """

    sequence_id: int
    num_prompt_tokens: int
    max_tokens: int
    priority: int = 0
    arrival: int
    block_hashes: list[bytes] = field(default_factory=list)
    reuse_prefix: bool = True
    num_output_tokens: int = 0
    num_computed_tokens: int = 0
    block_table: list[int] = field(default_factory=list)
    num_cached_tokens: int = 0
    num_registered_blocks: int = 0
    num_preemptions: int = 0
    in_flight: bool = False

    @property
    def rank(self) -> tuple[int, int, int]:
        """Sorts sequences: those that run first, and are preempted last, come first."""
        return (-self.priority, self.arrival, self.sequence_id)

    @property
    def num_tokens(self) -> int:
        """Prompt and answer so far."""
        return self.num_prompt_tokens + self.num_output_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        """Tokens still to be computed; 0 between a step that samples and the arrival of its token."""
        return self.num_prompt_tokens + self.num_output_tokens - self.num_computed_tokens

    @property
    def is_decode(self) -> bool:
        """Whether only its newest token, one it generated, is uncomputed.

        After a preemption nothing is computed and the prompt has at least one token, so the sequence is a
        prefill again. It is a decode from the moment when one token is left, however that came: the work is
        the same.
        """
        return self.num_output_tokens > 0 and self.num_uncomputed_tokens == 1
