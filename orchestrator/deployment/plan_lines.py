"""Puts a plan into words: who holds what, in a line for each rank, what context is served, and what will be slow."""

from collections.abc import Iterator

from orchestrator.deployment.known_cluster import LOCAL_NODE
from orchestrator.deployment.offloading import offloading_events
from orchestrator.deployment.preflight import Checked
from orchestrator.deployment.role_lines import own_dtype, role_events, role_word
from orchestrator.event_log import LogLevel, Said
from placement.measured.targets import mixed_words
from placement.model.part import Span
from placement.planning.attention import GROUP
from placement.planning.held import held, kv_words
from placement.planning.kv_size import UNKNOWN_MEMORY_KV_BYTES
from placement.planning.memory import format_bytes, size_words
from placement.planning.plan import Plan, Replica, Shard


def warning_events(checked: Checked) -> Iterator[Said]:
    """Yields what is odd about the model directory, and what will be slow."""
    path = checked.config.model.path
    for warning in checked.warnings:
        fields = {"model": path, "cause": warning}
        yield Said(event="warning", sentence=f"{path}: {warning}.", fields=fields, level=LogLevel.WARNING)
    shards = [*(shard for replica in checked.plan.replicas for shard in replica.shards), *checked.plan.attention]
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
    """Yields what each rank will hold, who computes what, what follows from unequal targets, and the context."""
    yield from _rank_events(checked)
    yield from _attention_events(checked)
    yield from offloading_events(checked.offloading)
    yield from role_events(checked.plan, checked.config.serving)
    yield from _mixed_events(checked)
    yield context_event(checked)


def _rank_events(checked: Checked) -> Iterator[Said]:
    for replica in checked.plan.replicas:
        for stage, ranks in enumerate(replica.stages):
            for shard in ranks.shards:
                fields = _rank_fields(checked, replica, stage, shard)
                yield Said(event="plan", sentence=_rank_words(checked, replica, shard), fields=fields)


def _attention_events(checked: Checked) -> Iterator[Said]:
    """Yields what each attention worker will hold."""
    for shard in checked.plan.attention:
        device = shard.device
        holdings = list(held(checked.plan, shard))
        yield Said(
            event="plan_attention",
            sentence=f"{GROUP} rank {shard.rank}: worker {device.worker}, {device.name} of {place_of(checked, shard)}, "
            f"{_target_words(shard)}{device.num_threads} thread(s): {', '.join(map(str, holdings))}.",
            fields={
                "rank": shard.rank,
                "worker": device.worker,
                "node": shard.node if checked.is_placed(shard) else "any",
                "device": device.name,
                "threads": device.num_threads,
                "kv": format_bytes(shard.kv_bytes),
                "replicas": ",".join(each.replica.name for each in holdings),
                "kv_heads": ",".join(each.kv_heads.replace(" ", "_") for each in holdings),
                "block_slots": ",".join(each.slots.replace(" ", "_") for each in holdings if each.slots),
                "kv_tokens": ",".join(str(each.num_tokens) for each in holdings),
            },
        )


def _rank_fields(checked: Checked, replica: Replica, stage: int, shard: Shard) -> dict[str, object]:
    part = shard.part
    return {
        "replica": replica.name,
        "role": role_word(checked.plan, replica),
        "stage": stage,
        "rank": shard.rank,
        "worker": shard.device.worker,
        "node": shard.node if checked.is_placed(shard) else "any",
        "device": shard.device.name,
        "target": shard.device.target,
        "threads": shard.device.num_threads,
        "layers": _range(part.layers),
        "kv_heads": _range(part.kv_heads),
        "ffn_columns": _range(part.ffn_columns),
        "vocab_rows": _range(part.vocab_rows),
        "block_slots": "" if part.stripe is None else _range(Span(part.stripe.start, part.stripe.stop)),
        "token_budget": replica.limits.budget_words,
        "weights": format_bytes(shard.weight_bytes),
        "kv": format_bytes(shard.kv_bytes),
        "kv_tokens": shard.num_blocks * replica.limits.block_size,
        "kv_sized_by": _sized_by(replica),
        "dtype": own_dtype(checked.plan, replica),
    }


def _rank_words(checked: Checked, replica: Replica, shard: Shard) -> str:
    part, device, model = shard.part, shard.device, checked.plan.model
    return (
        f"{_named(checked.plan, replica)} rank {shard.rank}: worker {device.worker}, "
        f"{device.name} of {place_of(checked, shard)}, {_target_words(shard)}{device.num_threads} thread(s): "
        f"layers {_range(part.layers)} of {model.num_layers}, "
        f"KV heads {_range(part.kv_heads)} of {model.num_kv_heads}, "
        f"{format_bytes(shard.weight_bytes)} of weights, {kv_words(replica, shard)}, "
        f"token budget {replica.limits.budget_words}."
    )


def _named(plan: Plan, replica: Replica) -> str:
    """Names a replica, with its role and its number type where others have different ones."""
    notes = ", ".join(note for note in (role_word(plan, replica), own_dtype(plan, replica)) if note)
    return f"{replica.name} ({notes})" if notes else replica.name


def _target_words(shard: Shard) -> str:
    """Names the target of a rank, with a comma after it; nothing where it is not known."""
    return f"target {shard.device.target}, " if shard.device.target else ""


def _mixed_events(checked: Checked) -> Iterator[Said]:
    """Says of each replica whose ranks have several targets that answers depend on who computes, where they do."""
    for replica in checked.plan.replicas:
        targets = [shard.device.target for shard in replica.shards]
        if words := mixed_words(replica.name, targets, replica.dtype):
            fields = {"replica": replica.name, "effect": words}
            yield Said(event="mixed_targets", sentence=words, fields=fields)


def place_of(checked: Checked, shard: Shard) -> str:
    """Says in words on which machine a rank runs."""
    if not checked.is_placed(shard):
        return "any node"
    return "this machine" if shard.node == LOCAL_NODE else f"node {shard.node}"


def context_event(checked: Checked) -> Said:
    """Says what context is served of what the model has, and what would give more where that is less."""
    words = context_words(checked)
    served, most = checked.context_tokens, checked.model_context_tokens
    sentence = words or f"serves {served} of the model's {most} tokens"
    return Said(
        event="context",
        sentence=f"Context: {sentence}.",
        fields={**context_fields(checked), "cause": words},
        level=LogLevel.WARNING if words else LogLevel.INFO,
    )


def context_fields(checked: Checked) -> dict[str, int]:
    """Returns the context that is served, and what the model was made for, as fields of a line."""
    return {"context_tokens": checked.context_tokens, "model_context_tokens": checked.model_context_tokens}


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
        case "attention workers":
            more = "raise serving.attention.kv_cache, or add attention workers, for more"
        case _:
            more = "free or add memory for more, or choose serving.kv_cache yourself"
    return f"serves {served} of the model's {most} tokens: {more}"


def _sized_by(replica: Replica) -> str:
    if replica.kv_sized_by != "unknown memory":
        return replica.kv_sized_by
    return f"{size_words(UNKNOWN_MEMORY_KV_BYTES)} where memory is not known: set memory for workers"


def _range(span: Span) -> str:
    """Writes a span with its last number, as the picture does."""
    if not len(span):
        return "none"
    return f"{span.start}-{span.stop - 1}" if len(span) > 1 else str(span.start)
