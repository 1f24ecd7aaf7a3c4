"""Puts a plan into words: who holds what, in a line for each rank, and what about it will be slow."""

from collections.abc import Iterator

from orchestrator.deployment.known_cluster import LOCAL_NODE
from orchestrator.deployment.preflight import Checked
from orchestrator.event_log import LogLevel, Said
from placement.model.part import Span
from placement.planning.memory import format_bytes


def warning_events(checked: Checked) -> Iterator[Said]:
    """Yields what is odd about the model directory, and what will be slow."""
    path = checked.config.model.path
    for warning in checked.warnings:
        fields = {"model": path, "cause": warning}
        yield Said(event="warning", sentence=f"{path}: {warning}.", fields=fields, level=LogLevel.WARNING)
    shards = [shard for replica in checked.plan.replicas for shard in replica.shards]
    threads = sum(shard.device.num_threads for shard in shards if shard.device.kind == "cpu")
    cores = checked.machine.num_cores
    if checked.config.cluster.is_local and threads > cores:
        effect, fix = "cpu workers slow each other down", "lower threads or count in cluster.workers"
        yield Said(
            event="more_threads_than_cores",
            sentence=f"The workers have {threads} threads for {cores} cores, so {effect}: {fix}.",
            fields={"threads": threads, "cores": cores, "effect": effect, "fix": fix},
            level=LogLevel.WARNING,
        )


def plan_events(checked: Checked) -> Iterator[Said]:
    """Yields for each rank what it will hold."""
    plan = checked.plan
    ranks = [
        (replica, stage, shard)
        for replica in plan.replicas
        for stage, ranks_of_stage in enumerate(replica.stages)
        for shard in ranks_of_stage.shards
    ]
    for replica, stage, shard in ranks:
        part, worker = shard.part, shard.device.worker
        node = shard.node if checked.is_placed(shard) else "any"
        weights, kv = format_bytes(shard.weight_bytes), format_bytes(shard.kv_bytes)
        num_layers = len(part.layers)
        fields: dict[str, object] = {
            "replica": replica.name,
            "stage": stage,
            "rank": shard.rank,
            "worker": worker,
            "node": node,
            "device": shard.device.name,
            "threads": shard.device.num_threads,
            "layers": _range(part.layers),
            "kv_heads": _range(part.kv_heads),
            "ffn_columns": _range(part.ffn_columns),
            "vocab_rows": _range(part.vocab_rows),
            "block_slots": "" if part.stripe is None else f"{part.stripe.start}-{part.stripe.stop}",
            "weights": weights,
            "kv": kv,
            "kv_tokens": shard.num_blocks * replica.limits.block_size,
        }
        sentence = (
            f"Plan: worker {worker} ({shard.device.name} on {_where(node)}) is rank {shard.rank} of {replica.name}: "
            f"{num_layers} of {plan.model.num_layers} layers, {weights} of weights, {kv} of KV cache."
        )
        yield Said(event="plan", sentence=sentence, fields=fields)


def _where(node: str) -> str:
    return {LOCAL_NODE: "this machine", "any": "any node"}.get(node, node)


def _range(span: Span) -> str:
    return f"{span.start}-{span.stop}" if len(span) else "none"
