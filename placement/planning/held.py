"""Says who of the attention workers holds what. Pure."""

from collections.abc import Iterator
from dataclasses import dataclass

from placement.model.part import Span
from placement.planning.attention import held_bytes
from placement.planning.memory import format_bytes
from placement.planning.plan import Plan, Replica, Shard


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """What an attention worker holds of a replica's keys and values.

    Attributes:
        kv_heads: which heads, in words.
        slots: which of the slots of each block, in words; empty: all.
        num_tokens: the tokens that its blocks have room for.
    """

    replica: Replica
    kv_heads: str
    slots: str
    num_tokens: int
    num_bytes: int

    def __str__(self) -> str:
        slots = f", slots {self.slots} of each block" if self.slots else ""
        size = format_bytes(self.num_bytes)
        return f"KV heads {self.kv_heads}{slots} of {self.num_tokens} tokens of {self.replica.name} ({size})"


def held(plan: Plan, worker: Shard) -> Iterator[Held]:
    """Yields what an attention worker holds, a replica after the other."""
    model = plan.model
    for replica in plan.replicas:
        regions = () if replica.residency is None else replica.residency.regions
        for region in regions:
            for holder in (each for each in region.holders if each.worker == worker.rank):
                assert replica.residency is not None
                stripe = holder.stripe
                size = replica.limits.block_size
                yield Held(
                    replica=replica,
                    kv_heads=f"{_range(holder.kv_heads)} of {model.num_kv_heads}",
                    slots="" if stripe is None else f"{_range(Span(stripe.start, stripe.stop))} of {size}",
                    num_tokens=len(region.blocks) * size,
                    num_bytes=held_bytes(replica.residency, worker.rank, model, replica.dtype, size),
                )


def kv_words(replica: Replica, shard: Shard) -> str:
    """Says what a rank of the model keeps of keys and values."""
    if replica.residency is None:
        return f"{format_bytes(shard.kv_bytes)} of KV cache"
    if not shard.num_blocks:
        return f"no KV cache, as attention workers have it (a step takes {format_bytes(shard.kv_bytes)})"
    tokens, all_tokens = shard.num_blocks * replica.limits.block_size, replica.num_kv_tokens
    return (
        f"{format_bytes(shard.kv_bytes)} for {tokens} of {all_tokens} tokens of KV, as attention workers have the rest"
    )


def _range(span: Span) -> str:
    return f"{span.start}-{span.stop - 1}" if len(span) > 1 else str(span.start)
