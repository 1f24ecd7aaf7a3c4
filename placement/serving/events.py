"""Defines the events that :class:`placement.serving.replica.ReplicaCore` takes and the commands that it answers with.

Both are plain values, so that a log of them can be kept, compared and played again. Times are seconds of a monotonic
clock.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from placement.errors import HeterodyneError
from placement.model.part import Span
from placement.serving.step_plan import StepPlan


class EndReason(Enum):
    """Says why a sequence ended."""

    STOP = "stop"
    LENGTH = "length"
    SHIPPED = "shipped"
    CANCELLED = "cancelled"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceSpec:
    """A request to continue a sequence, as a replica needs it for its decisions.

    Attributes:
        prompt_ids: the tokens to be continued.
        max_tokens: the most tokens of the answer.
        stop_token_ids: the sequence ends after one of these.
        priority: the higher, the earlier it runs and the later it is preempted.
        cache_salt: keys and values are shared among sequences of equal salt.
        reuse_prefix: whether it may take keys and values that others computed.
        awaits_kv: whether the keys and values of the prompt come from another replica.
        ship_to: the transfer by which the keys and values of the prompt go to another replica, once they are computed;
            the answer is then one token long, and nobody wants that. None where it is continued here.
    """

    prompt_ids: tuple[int, ...]
    max_tokens: int
    stop_token_ids: frozenset[int] = frozenset()
    priority: int = 0
    cache_salt: bytes = b""
    reuse_prefix: bool = True
    awaits_kv: bool = False
    ship_to: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Advance:
    """The progress that a step made with one sequence.

    Attributes:
        token_ids: the tokens that the sequence was given: none where the step does not sample, one, or several where it
            verified a draft.
        is_complete: whether the answer is complete, such as by its grammar.
        failed: why the sequence cannot go on, where it cannot.
    """

    token_ids: tuple[int, ...] = ()
    is_complete: bool = False
    failed: str | None = None


# -- events -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Submit:
    """An event: a client submits a sequence.

    Attributes:
        sequence_id: higher than that of every sequence before it.
        emitted_ids: tokens of its answer that another replica gave already; they are replayed, not sampled.
        admitted: whether it was admitted before the replica was told to drain.
        submitted_s: when it was submitted, which may be some time ago.
    """

    sequence_id: int
    spec: SequenceSpec
    submitted_s: float
    emitted_ids: tuple[int, ...] = ()
    admitted: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancel:
    """An event: nobody wants the sequence any more. It may have ended already."""

    sequence_id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Drain:
    """An event: from now on the replica takes no new sequences, and finishes those that it has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepDue:
    """An event: there is room for a step, and it is time to plan it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepEnded:
    """An event: a step was computed. Steps end in the order in which they were run.

    Attributes:
        advances: the progress of the sequence of each chunk of its plan.
    """

    step: int
    advances: Sequence[Advance]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepLost:
    """An event: a step failed, or the replica stops, and no sequence can go on."""

    cause: str


@dataclass(frozen=True, slots=True, kw_only=True)
class KvLost:
    """An event: the keys and values of all blocks are lost, and the steps on their way are not computed.

    Every sequence is computed again, up to the last token that is known, and goes on. Only those end whose keys and
    values go to another replica, which computes them itself.
    """

    cause: str


@dataclass(frozen=True, slots=True, kw_only=True)
class KvArrived:
    """An event: the keys and values of a sequence came from another replica, or nothing will come any more.

    Attributes:
        hold_id: the one of the :class:`Receive` that asked for them.
        num_tokens: the leading tokens whose keys and values are there, all of them checked; 0 where none came, and the
            prompt is to be computed here.
    """

    hold_id: int
    num_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class KvSent:
    """An event: the other replica has all keys and values of a :class:`Ship`."""

    hold_id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class HoldLapsed:
    """An event: the lease of a transfer is over, and nobody reads or writes its blocks any more."""

    hold_id: int


Event = Submit | Cancel | Drain | StepDue | StepEnded | StepLost | KvLost | KvArrived | KvSent | HoldLapsed


# -- commands -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A command: compute a step.

    Attributes:
        token_ids: for each chunk its tokens, as far as they are known: the newest may still be in the step before.
        tables: for each chunk the block table of its sequence. The lists grow later, at their end.
        names: blocks that attention workers hold and that have been given a name since the last Run, with the hash of
            their text: the steps before this one compute them.
        forgotten: blocks of attention workers that have lost their names since then. This step may write to them.
    """

    plan: StepPlan
    token_ids: tuple[Sequence[int], ...]
    tables: tuple[list[int], ...] = field(compare=False, repr=False)
    names: tuple[tuple[int, bytes], ...] = ()
    forgotten: tuple[int, ...] = ()


class Tell(NamedTuple):
    """A command: tell the client which tokens a sequence was given.

    It is a tuple, since one is made for each token, and a dataclass takes twice as long to make.

    Attributes:
        place: the index of its chunk in the step's plan.
        first_index: position of the first of the tokens in the answer.
        num_preemptions: how often the sequence was preempted so far.
        queue_s: time from submission until the sequence is first scheduled, or its blocks are reserved and another
            replica is asked for its prompt; set with the first token.
        prefill_s: time from then until the first token; set with the first token.
        cached_tokens: prompt tokens that were found computed; set with the first token.
    """

    sequence_id: int
    place: int
    first_index: int
    token_ids: tuple[int, ...]
    num_preemptions: int = 0
    queue_s: float | None = None
    prefill_s: float | None = None
    cached_tokens: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """A command: tell the client that a sequence has ended. No other command about the client's answer follows."""

    sequence_id: int
    reason: EndReason
    detail: str = ""
    num_preemptions: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """A command: tell the client that a sequence was not taken, and why."""

    sequence_id: int
    error: HeterodyneError = field(compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Receive:
    """A command: ask another replica for the keys and values of ``tokens``, whose blocks are reserved.

    Attributes:
        hold_id: names the transfer; :class:`KvArrived` ends it.
        table: the block table of the sequence.
    """

    sequence_id: int
    hold_id: int
    tokens: Span
    table: list[int] = field(compare=False, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ship:
    """A command: see to it that another replica gets the keys and values of ``tokens``, which are computed.

    They may have been sent while they were computed. Their blocks are held until it has them all.

    Attributes:
        hold_id: names the transfer; :class:`KvSent` ends it, or :class:`HoldLapsed`.
        table: the block table of the sequence.
    """

    sequence_id: int
    hold_id: int
    tokens: Span
    table: list[int] = field(compare=False, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Revoke:
    """A command: stop a transfer, and tell the other replica that nobody wants its keys and values any more.

    Its blocks are held until it is known to have ended, or lapses.
    """

    hold_id: int


Command = Run | Tell | Ended | Refused | Receive | Ship | Revoke


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadSnapshot:
    """The load of a replica, and its totals so far, between two events.

    Attributes:
        steps: how many steps ended, which is the progress counter of the failure detector.
        num_running: sequences that steps compute; they count until their last token is known.
        num_moving: sequences whose keys and values are on the way, to this replica or from it.
        pending_tokens: tokens known and not computed, those of steps on their way included.
        prompt_tokens: prompt tokens of sequences that were given their first token.
    """

    steps: int
    num_running: int
    num_moving: int
    num_waiting: int
    free_blocks: int
    total_blocks: int
    num_preemptions: int
    pending_tokens: int
    prompt_tokens: int
    output_tokens: int
    prefix_queries: int
    prefix_hits: int
