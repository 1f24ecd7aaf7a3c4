"""Puts a plan into words: who holds what, in a line for each rank, and what about it will be slow."""

from collections.abc import Iterator

from orchestrator.deployment.preflight import Checked
from orchestrator.key_values import key_values
from placement.model.part import Span
from placement.planning.memory import format_bytes


def plan_lines(checked: Checked) -> Iterator[str]:
    """Yields a line for each rank that says what it will hold, and then warnings."""
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
        )
    yield from _warnings(checked)


def _warnings(checked: Checked) -> Iterator[str]:
    """Yields a line where the workers of this machine will take each other's cores."""
    shards = [shard for replica in checked.plan.replicas for shard in replica.shards]
    threads = sum(shard.device.num_threads for shard in shards if shard.device.kind == "cpu")
    if checked.config.cluster.is_local and threads > checked.machine.num_cores:
        yield key_values(
            event="more_threads_than_cores",
            threads=threads,
            cores=checked.machine.num_cores,
            effect="cpu workers slow each other down",
            fix="lower threads or count in cluster.workers",
        )


def _range(span: Span) -> str:
    return f"{span.start}-{span.stop}" if len(span) else "none"
