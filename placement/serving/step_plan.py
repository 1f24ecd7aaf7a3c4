"""Describes what a step computes, and the bounds of a step."""

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerLimits:
    """The bounds that the scheduler keeps in every step.

    Attributes:
        token_budget: the most tokens in a step, decodes counted.
        max_num_seqs: the most sequences that hold blocks. At most ``token_budget``, or decodes could stall.
        num_batches: steps that are in flight at once, in the stages of a pipeline: decodes are dealt out among them.
    """

    token_budget: int
    max_num_seqs: int
    num_batches: int = 1

    def __post_init__(self) -> None:
        assert 1 <= self.max_num_seqs <= self.token_budget and self.num_batches >= 1, self


class Chunk(NamedTuple):
    """A part of a step: the tokens ``[start, start + num_tokens)`` of one sequence.

    It is a tuple, since one is made for each sequence in each step, and a dataclass takes twice as long to make.

    Attributes:
        samples: whether the chunk reaches the sequence's last token, so that the step yields the next one.
        is_decode: whether its one token was generated; the last token of a prompt is no decode.
    """

    sequence_id: int
    start: int
    num_tokens: int
    samples: bool
    is_decode: bool = False

    @property
    def stop(self) -> int:
        """Returns the position behind its last token."""
        return self.start + self.num_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class StepLoad:
    """The size of a step, on which its time depends.

    Attributes:
        num_decodes: tokens that follow generated ones, one of each sequence.
        num_prefill_tokens: tokens of prompts, and of answers that are computed again.
        decode_context_tokens: tokens whose keys and values decodes read, their own included.
        prefill_pairs: pairs of a query and a key that prefills attend to: the sum over their tokens of the position
            counted from 1. Windows are not taken into account.
    """

    num_decodes: int = 0
    num_prefill_tokens: int = 0
    decode_context_tokens: int = 0
    prefill_pairs: int = 0

    @property
    def num_tokens(self) -> int:
        """Counts all tokens of the step."""
        return self.num_decodes + self.num_prefill_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """A decision: what one step computes.

    Attributes:
        step: counts the plans that have chunks, from 1; a plan without chunks is no step and has the last number.
        chunks: decodes first, then prefills, then what is admitted.
        preempted: sequences whose blocks were taken for this step; they wait again.
        reserved: sequences that were given blocks for keys and values that come from elsewhere.
    """

    step: int
    chunks: tuple[Chunk, ...]
    preempted: tuple[int, ...]
    reserved: tuple[int, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Counts the tokens in the batch."""
        return sum(chunk.num_tokens for chunk in self.chunks)

    @property
    def load(self) -> StepLoad:
        """Returns the size of the step."""
        num_decodes = context = num_prefill = pairs = 0
        for chunk in self.chunks:
            if chunk.is_decode:
                num_decodes += 1
                context += chunk.start + chunk.num_tokens
            else:
                num_prefill += chunk.num_tokens
                pairs += (2 * chunk.start + chunk.num_tokens + 1) * chunk.num_tokens // 2
        return StepLoad(
            num_decodes=num_decodes,
            num_prefill_tokens=num_prefill,
            decode_context_tokens=context,
            prefill_pairs=pairs,
        )
