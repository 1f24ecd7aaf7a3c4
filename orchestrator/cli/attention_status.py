"""Says how the attention workers of a deployment are, what each holds, and what was decided about them. Pure."""

from collections.abc import Iterator

from placement.planning.memory import format_bytes
from protos.heterodyne.v1 import admin_pb2


def attention_words(status: admin_pb2.GetStatusResponse) -> Iterator[str]:
    """Yields a line for each attention worker, and one about the decision, where there is something to say."""
    for rank in status.attention.ranks:
        state = rank.load_phase or _state(status)
        cause = f": {rank.cause}" if rank.cause else ""
        who = f"{status.attention.name} rank {rank.rank}"
        yield f"{who} (worker {rank.worker} on {rank.node}) is {state}{cause}; it holds {rank.holds}"
    if status.offloading:
        yield status.offloading


def attention_pairs(status: admin_pb2.GetStatusResponse) -> Iterator[dict[str, object]]:
    """Yields the same as fields of lines."""
    for rank in status.attention.ranks:
        yield {
            "event": "attention",
            "rank": rank.rank,
            "worker": rank.worker,
            "node": rank.node,
            "device": rank.device,
            "state": _state(status),
            "phase": rank.load_phase,
            "pid": rank.pid or "",
            "address": rank.address,
            "kv": format_bytes(rank.kv_bytes),
            "holds": rank.holds,
            "cause": rank.cause,
        }
    if status.offloading:
        yield {"event": "offloading", "decision": status.offloading}


def _state(status: admin_pb2.GetStatusResponse) -> str:
    return admin_pb2.ReplicaState.Name(status.attention.state).removeprefix("REPLICA_STATE_").lower()
