"""Converts what a rank holds of a model to messages of the worker protocol and back. Pure."""

from placement.errors import InvalidRequest
from placement.model.part import Part, Span
from placement.model.specs import ModelSpec
from placement.model.striping import Stripe
from protos.heterodyne.worker.v1 import worker_pb2 as pb


def shard_message(rank: int, part: Part) -> pb.Shard:
    """Returns the message of what a rank holds."""
    stripe = part.stripe
    return pb.Shard(
        rank=rank,
        layers=_range(part.layers),
        kv_heads=_range(part.kv_heads),
        ffn_columns=_range(part.ffn_columns),
        vocab_rows=_range(part.vocab_rows),
        slots=None if stripe is None else pb.Range(start=stripe.start, stop=stripe.stop),
    )


def read_part(shard: pb.Shard, model: ModelSpec, block_size: int, field: str) -> Part:
    """Returns what a rank holds of ``model``. Raises InvalidRequest that names ``field`` for a range outside of it."""
    stripe: Stripe | None = None
    if shard.HasField("slots"):
        slots = _span(shard.slots, field=f"{field}.slots", limit=block_size)
        stripe = Stripe(slots.start, slots.stop, block_size)
    return Part(
        layers=_span(shard.layers, field=f"{field}.layers", limit=model.num_layers),
        kv_heads=_span(shard.kv_heads, field=f"{field}.kv_heads", limit=model.num_kv_heads),
        ffn_columns=_span(shard.ffn_columns, field=f"{field}.ffn_columns", limit=model.ffn_size),
        vocab_rows=_span(shard.vocab_rows, field=f"{field}.vocab_rows", limit=model.vocab_size),
        stripe=stripe,
    )


def _range(span: Span) -> pb.Range:
    return pb.Range(start=span.start, stop=span.stop)


def _span(message: pb.Range, *, field: str, limit: int) -> Span:
    """Returns the span in a message. Raises InvalidRequest for a range outside ``[0, limit)``."""
    if not 0 <= message.start <= message.stop <= limit:
        raise InvalidRequest(
            field=field,
            value=(message.start, message.stop),
            problem="is not a range within the model",
            fix=f"Use 0 <= start <= stop <= {limit}.",
        )
    return Span(message.start, message.stop)
