"""Converts a step to the message by which the leader announces it to the other ranks, and back. Pure."""

from collections.abc import Sequence
from itertools import chain, pairwise

from kernels.attention import Run, SharedSpan, num_slots
from placement.errors import InvalidRequest
from placement.measured.exchange import Exchange
from placement.model.part import Span
from placement.serving.kv.peers import TRANSFER_ID_BYTES, Shipment
from protos.heterodyne.worker.v1 import worker_pb2 as pb
from workers.step.scoring import ScoredPrompt
from workers.step.types import Batch, SequenceInput

_EXCHANGES = {
    Exchange.ALL_GATHER: pb.EXCHANGE_ALL_GATHER,
    Exchange.RING: pb.EXCHANGE_RING,
    Exchange.TOKEN_RING: pb.EXCHANGE_TOKEN_RING,
}
_EXCHANGE_OF = {number: exchange for exchange, number in _EXCHANGES.items()}


def step_message(batch: Batch, number: int, *, wait_s: float = 0.0) -> pb.Step:
    """Makes the message of what other ranks must know of a batch. How tokens are sampled is no part of it.

    Args:
        wait_s: how long ranks may wait for each other from this step on; 0: as before.
    """
    return pb.Step(
        number=number,
        sequences=map(_sequence_message, batch.sequences),
        shared=[
            pb.StepShared(
                members=span.members,
                first_token=span.first_token,
                num_tokens=span.num_tokens,
                runs=chain.from_iterable(span.runs),
            )
            for span in batch.shared
        ],
        exchange=_EXCHANGES[batch.exchange],
        wait_s=wait_s,
        closed_transfers=batch.closed,
    )


def _sequence_message(sequence: SequenceInput) -> pb.StepSequence:
    scored = sequence.scored
    return pb.StepSequence(
        token_ids=sequence.token_ids,
        start=sequence.start,
        runs=chain.from_iterable(sequence.runs),
        awaits_token=sequence.awaits_token,
        samples=sequence.samples,
        num_scored=0 if scored is None else len(scored.token_ids),
        first_scored=0 if scored is None else scored.first_index,
        ship=None if sequence.ship is None else _shipment_message(sequence.ship),
        sequence_id=sequence.sequence_id,
    )


def _shipment_message(ship: Shipment) -> pb.KvShipment:
    return pb.KvShipment(
        transfer_id=ship.transfer_id,
        tokens=pb.Range(start=ship.tokens.start, stop=ship.tokens.stop),
        by_layer=ship.by_layer,
    )


def step_batch(message: pb.Step, *, number: int, vocab_size: int, slot_limit: int) -> Batch:
    """Reads the batch, without samplers, from a leader's message.

    Args:
        number: the number that the step must have.
        vocab_size: the limit that all token ids must be below.
        slot_limit: the limit that slots may go up to.

    Raises:
        InvalidRequest: a leader of this plan would not send such a message.
    """
    if message.number != number:
        raise _refusal("step.number", message.number, f"is not the next, {number}")
    if message.exchange not in _EXCHANGE_OF:
        raise _refusal("step.exchange", message.exchange, "is not known")
    return Batch(
        exchange=_EXCHANGE_OF[message.exchange],
        sequences=tuple(_sequence(sequence, vocab_size, slot_limit) for sequence in message.sequences),
        shared=tuple(_shared(span, slot_limit, len(message.sequences)) for span in message.shared),
        closed=tuple(message.closed_transfers),
    )


def _sequence(message: pb.StepSequence, vocab_size: int, limit: int) -> SequenceInput:
    token_ids, runs = list(message.token_ids), _runs(message.runs, limit)
    if token_ids and max(token_ids) >= vocab_size:
        raise _refusal("step.token_ids", max(token_ids), f"is no id of a vocabulary of {vocab_size}")
    num_tokens = len(token_ids) + message.awaits_token
    if message.start < 0 or not num_tokens or message.start + num_tokens != num_slots(runs):
        raise _refusal("step.start", message.start, f"and {num_tokens} tokens do not fill {num_slots(runs)} slots")
    first, count = message.first_scored, message.num_scored
    if count and not message.start + 1 <= first <= first + count <= message.start + num_tokens + 1:
        raise _refusal("step.first_scored", first, f"and {count} tokens are not all of the chunk")
    return SequenceInput(
        token_ids=token_ids,
        start=message.start,
        runs=runs,
        awaits_token=message.awaits_token,
        samples=message.samples,
        scored=ScoredPrompt(first_index=first, token_ids=[0] * count, num_top=0) if count else None,
        ship=_shipment(message.ship, message.start + num_tokens) if message.HasField("ship") else None,
        sequence_id=message.sequence_id,
    )


def _shipment(message: pb.KvShipment, limit: int) -> Shipment:
    start, stop = message.tokens.start, message.tokens.stop
    if len(message.transfer_id) != TRANSFER_ID_BYTES or not 0 <= start < stop <= limit:
        raise _refusal("step.ship", (start, stop), f"are not tokens of a transfer among {limit}")
    return Shipment(transfer_id=message.transfer_id, tokens=Span(start, stop), by_layer=message.by_layer)


def _shared(message: pb.StepShared, limit: int, num_sequences: int) -> SharedSpan:
    members, runs = tuple(message.members), _runs(message.runs, limit)
    if not members or len(set(members)) < len(members) or not 0 <= min(members) <= max(members) < num_sequences:
        raise _refusal("step.shared.members", members, f"are not different places among {num_sequences} sequences")
    if message.first_token < 0 or not 0 < message.num_tokens == num_slots(runs):
        raise _refusal("step.shared.num_tokens", message.num_tokens, f"do not fill {num_slots(runs)} slots")
    return SharedSpan(members=members, first_token=message.first_token, num_tokens=message.num_tokens, runs=runs)


def _runs(ends: Sequence[int], limit: int) -> tuple[Run, ...]:
    runs = tuple(pairwise(ends))[::2]
    if len(ends) % 2 or not all(0 <= start < stop <= limit for start, stop in runs):
        raise _refusal("step.runs", list(ends[:8]), f"are not ranges within {limit} slots")
    return runs


def _refusal(field: str, value: object, problem: str) -> InvalidRequest:
    return InvalidRequest(field=field, value=value, problem=problem, fix="Run the same version on every rank.")
