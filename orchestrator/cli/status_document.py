"""Writes a deployment's status as one JSON document with stable names. What is not known is absent, and not 0."""

from collections.abc import Iterable, Mapping
from typing import Any

from orchestrator.cli.measured_status import measured_pairs
from orchestrator.cli.render import mixed_targets, own_dtypes, roles
from protos.heterodyne.v1 import admin_pb2


def status_document(status: admin_pb2.GetStatusResponse) -> dict[str, Any]:
    """Returns the document. Numbers are numbers, in bytes, seconds and shares of 1."""
    of_replicas = {
        "role": roles(status),
        "dtype": own_dtypes(status),
        "mixed_targets": mixed_targets(status),
    }
    return {
        "model": status.model,
        **_known({"context_tokens": status.context_tokens, "model_context_tokens": status.model_context_tokens}),
        **_known({"dtype": status.dtype}),
        "gateway": _gateway(status.gateway),
        "replicas": [
            _replica(replica, {key: words.get(replica.name, "") for key, words in of_replicas.items()})
            for replica in status.replicas
        ],
        **({"attention": _attention(status.attention)} if status.HasField("attention") else {}),
        **_known({"offloading": status.offloading}),
        "measured": [{name: _number(value) for name, value in pairs.items()} for pairs in measured_pairs(status)],
    }


def _gateway(gateway: admin_pb2.GatewayStatus) -> dict[str, Any]:
    return {
        "in_flight": gateway.in_flight,
        "max_in_flight": gateway.max_in_flight,
        "queued": gateway.queued,
        "max_queued": gateway.max_queued,
        "draining": gateway.draining,
        "controller_connected": gateway.controller_connected,
        "fenced_messages": gateway.fenced_messages,
        "uptime_s": round(gateway.uptime_s, 3),
        **_known({"waiting": _counts(gateway.waiting), "routes": _counts(gateway.routes)}),
    }


def _counts(counts: Iterable[admin_pb2.Count]) -> dict[str, int]:
    return {item.kind: item.count for item in counts}


def _replica(replica: admin_pb2.ReplicaStatus, told: Mapping[str, str]) -> dict[str, Any]:
    return {
        "name": replica.name,
        "state": admin_pb2.ReplicaState.Name(replica.state).removeprefix("REPLICA_STATE_"),
        "epoch": replica.epoch,
        **_known({"cause": replica.cause, **told}),
        **({"load": _load(replica.load)} if replica.HasField("load") else {}),
        **({"step_budget": _budget(replica.budget)} if replica.budget.token_budget else {}),
        "ranks": [_rank(rank) for rank in replica.ranks],
    }


def _attention(group: admin_pb2.ReplicaStatus) -> dict[str, Any]:
    return {
        "state": admin_pb2.ReplicaState.Name(group.state).removeprefix("REPLICA_STATE_"),
        "epoch": group.epoch,
        **_known({"cause": group.cause}),
        "ranks": [_rank(rank) | _known({"holds": rank.holds}) for rank in group.ranks],
    }


def _load(load: admin_pb2.ReplicaLoad) -> dict[str, Any]:
    document: dict[str, Any] = {
        "running": load.num_running,
        "waiting": load.num_waiting,
        "free_blocks": load.free_blocks,
        "total_blocks": load.total_blocks,
        "steps": load.steps,
        "preemptions": load.num_preemptions,
        "age_s": round(load.age_s, 3),
    }
    if load.total_blocks:
        document["kv_cache_usage"] = round(1 - load.free_blocks / load.total_blocks, 4)
    for name in ("prompt_tokens_per_s", "generated_tokens_per_s", "prefix_cache_hit_rate"):
        if load.HasField(name):
            document[name] = round(getattr(load, name), 4)
    moved = ("kv_transfers", "kv_failures", "kv_bytes", "kv_refused")
    return document | _known({"moving": load.num_moving, **{name: getattr(load, name) for name in moved}})


def _budget(budget: admin_pb2.StepBudget) -> dict[str, Any]:
    steps = [{"num_tokens": step.num_tokens, "duration_s": round(step.duration_s, 6)} for step in budget.steps]
    return {
        "token_budget": budget.token_budget,
        "auto": budget.is_auto,
        **_known({"expected_s": round(budget.expected_s, 6), "measured": steps}),
    }


def _rank(rank: admin_pb2.RankStatus) -> dict[str, Any]:
    named: dict[str, Any] = {
        "worker": rank.worker,
        "node": rank.node,
        "device": rank.device,
        "target": rank.target,
        "address": rank.address,
        "pid": rank.pid,
        "phase": rank.load_phase,
        "weight_bytes": rank.weight_bytes,
        "kv_bytes": rank.kv_bytes,
        "cause": rank.cause,
    }
    document = {"rank": rank.rank, **_known(named)}
    if rank.weight_bytes:
        document["loaded_bytes"] = rank.loaded_bytes
    if rank.last_layer:
        document |= {"first_layer": rank.first_layer, "last_layer": rank.last_layer - 1}
    for name in ("num_kv_heads", "num_ffn_columns", "token_share"):
        if rank.HasField(name):
            document[name] = getattr(rank, name)
    return document


def _number(value: object) -> object:
    """Returns the number, or the numbers, that a value of a line was written from."""
    words = str(value).split(",")
    try:
        numbers = [float(word) if "." in word else int(word) for word in words]
    except ValueError:
        return value
    return numbers if len(numbers) > 1 else numbers[0]


def _known(values: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves out what a message has no value for."""
    return {name: value for name, value in values.items() if value}
