"""Puts a plan into words: who holds what, in a line for each rank, and what context is served."""

from collections.abc import Iterator

from orchestrator.deployment.preflight import Checked
from orchestrator.key_values import key_values
from placement.model.part import Span
from placement.planning.kv_size import UNKNOWN_MEMORY_KV_BYTES
from placement.planning.memory import format_bytes, size_words
from placement.planning.plan import Replica


def plan_lines(checked: Checked) -> Iterator[str]:
    """Yields a line for each rank that says what it will hold, and one where the context is less than the model's."""
    plan, names = checked.plan, checked.config.cluster.worker_names
    ranks = [
        (replica, stage, shard)
        for replica in plan.replicas
        for stage, ranks_of_stage in enumerate(replica.stages)
        for shard in ranks_of_stage.shards
    ]
    for replica, stage, shard in ranks:
        part = shard.part
        yield key_values(
            event="plan",
            replica=replica.name,
            stage=stage,
            rank=shard.rank,
            worker=names[checked.workers[replica.name, shard.rank]],
            device=shard.device.name,
            threads=shard.device.num_threads,
            layers=_range(part.layers),
            kv_heads=_range(part.kv_heads),
            ffn_columns=_range(part.ffn_columns),
            vocab_rows=_range(part.vocab_rows),
            block_slots="" if part.stripe is None else f"{part.stripe.start}-{part.stripe.stop}",
            weights=format_bytes(shard.weight_bytes),
            kv=format_bytes(shard.kv_bytes),
            kv_tokens=shard.num_blocks * replica.limits.block_size,
            kv_sized_by=_sized_by(replica),
            **context_fields(checked),
        )
    words = context_words(checked)
    if words:
        yield key_values(event="context", cause=words)


def context_fields(checked: Checked) -> dict[str, int]:
    """Returns the context that is served, and what the model was made for, as fields of a line."""
    return {"context": checked.context_tokens, "of": checked.model_context_tokens}


def context_words(checked: Checked) -> str:
    """Says what would give more context, where the KV blocks hold less than the model's; else nothing."""
    served, most = checked.context_tokens, checked.model_context_tokens
    if served == most or checked.config.model.max_context_tokens is not None:
        return ""
    smallest = min(checked.plan.replicas, key=lambda replica: replica.num_blocks)
    match smallest.kv_sized_by:
        case "setting":
            more = "raise serving.kv_cache for more"
        case "unknown memory":
            more = "set memory for workers, or serving.kv_cache, for more"
        case _:
            more = "free or add memory for more, or choose serving.kv_cache yourself"
    return f"serves {served} of the model's {most} tokens: {more}"


def _sized_by(replica: Replica) -> str:
    if replica.kv_sized_by != "unknown memory":
        return replica.kv_sized_by
    return f"{size_words(UNKNOWN_MEMORY_KV_BYTES)} where memory is not known: set memory for workers"


def _range(span: Span) -> str:
    return f"{span.start}-{span.stop}" if len(span) else "none"
