"""Decides who computes what when, where micro-batches alternate between model replicas and the attention workers.

Attention cuts a model into slices: what a model worker computes from one attention to the next, the last of a step and
the first of the next being one. With n micro-batches there are n - 1 model replicas, which share the attention workers.
While one micro-batch is attended to, each of the others is in a slice on a replica of its own. Slice k of micro-batch j
runs on replica (j + k) mod (n - 1): the rotational staggered pipelining of Lamina (Chen et al. 2024). With n = 2 there
is one replica, and two micro-batches take turns.

Time is counted in slots, in which the attention workers attend to one micro-batch once. The workers are so many that a
slice takes n - 1 slots. Then slice k of micro-batch j starts in slot n * k + j: every slot has one start, slot s on
replica s mod (n - 1), and attention follows n - 1 slots later. So nobody does two things at once, and nobody waits.
:func:`period_s` says how long a slice and its attention take where the times are not in this proportion.
"""

from dataclasses import dataclass

MOST_MICRO_BATCHES = 5
"""The schedule is tested for as many, which is four model replicas."""


@dataclass(frozen=True, slots=True, order=True, kw_only=True)
class Turn:
    """A slice of a micro-batch on a model replica, or the attention that follows that slice.

    Attributes:
        index: the number of the slice, counted on from one step to the next.
    """

    micro_batch: int
    index: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """Says what everybody does in a slot; None: nothing yet, as the first micro-batches are on their way.

    Attributes:
        replicas: what each model replica computes.
        attention: what the attention workers attend to.
    """

    replicas: tuple[Turn | None, ...]
    attention: Turn | None


def replica_of(turn: Turn, *, num_micro_batches: int) -> int:
    """Returns the model replica that computes a slice."""
    return (turn.micro_batch + turn.index) % _num_replicas(num_micro_batches)


def model_slots(turn: Turn, *, num_micro_batches: int) -> range:
    """Returns the slots in which a model replica computes a slice."""
    start = num_micro_batches * turn.index + turn.micro_batch
    return range(start, start + _num_replicas(num_micro_batches))


def attention_slot(turn: Turn, *, num_micro_batches: int) -> int:
    """Returns the slot in which the attention that follows a slice is computed."""
    return model_slots(turn, num_micro_batches=num_micro_batches).stop


def slot(number: int, *, num_micro_batches: int) -> Slot:
    """Says what everybody does in a slot. From slot n - 1 on everybody has something to do."""
    num_replicas = _num_replicas(num_micro_batches)
    replicas: list[Turn | None] = [None] * num_replicas
    for start in range(max(0, number - num_replicas + 1), number + 1):
        replicas[start % num_replicas] = _turn(start, num_micro_batches)
    attended = number - num_replicas
    return Slot(replicas=tuple(replicas), attention=_turn(attended, num_micro_batches) if attended >= 0 else None)


def moves_between_replicas(*, num_micro_batches: int) -> bool:
    """Tells whether a micro-batch goes to another replica with each slice, so that replicas must know its sequences."""
    return _num_replicas(num_micro_batches) > 1


def period_s(*, model_s: float, attention_s: float, wire_s: float, num_micro_batches: int) -> float:
    """Returns the seconds from a slice of a micro-batch to its next, once all are on their way.

    With n micro-batches that is max(n / (n - 1) * model_s, n * attention_s, model_s + attention_s + wire_s): whoever
    has most to do never waits, or each micro-batch alone sets the pace. These are the circuits of the schedule as an
    event graph, and any other circuit combines them, so that its mean is not greater. One micro-batch alone is not
    staggered.

    Args:
        model_s: seconds of a slice of a micro-batch.
        attention_s: seconds of its attention.
        wire_s: seconds that messages take, there and back, in which neither computes.
    """
    alone_s = model_s + attention_s + wire_s
    if num_micro_batches == 1:
        return alone_s
    num_replicas = _num_replicas(num_micro_batches)
    return max(num_micro_batches / num_replicas * model_s, num_micro_batches * attention_s, alone_s)


def _turn(start: int, num_micro_batches: int) -> Turn:
    """Returns the slice that starts in a slot."""
    index, micro_batch = divmod(start, num_micro_batches)
    return Turn(micro_batch=micro_batch, index=index)


def _num_replicas(num_micro_batches: int) -> int:
    assert 2 <= num_micro_batches <= MOST_MICRO_BATCHES, num_micro_batches
    return num_micro_batches - 1
