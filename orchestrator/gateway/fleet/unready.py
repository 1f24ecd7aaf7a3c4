"""Says why no replica takes requests, in the words that a client reads. Pure.

The cause of a loss names nodes, processes and files. It is for the operator, in the status and the log; a client reads
of which kind it is.
"""

from collections.abc import Mapping

from orchestrator.gateway.fleet.inbox import Loss
from protos.codec.loading import READING, doing
from protos.heterodyne.control.v1 import control_pb2 as pb

_LOADING = (pb.PHASE_STARTING, pb.PHASE_LOADING)
_WORDS = {
    Loss.RANK_FAILED: "one of its workers was lost",
    Loss.STREAM_BROKEN: "the connection to it broke",
    Loss.ENGINE_FAILED: "a step of it failed",
    Loss.NO_HEARTBEAT: "nothing is heard of it",
    Loss.STALLED: "it makes no progress",
    Loss.STOPPED: "it was stopped",
}


def why_unready(deployment: pb.WatchResponse, lost: Mapping[tuple[str, int], Loss]) -> str:
    """Returns why, for each replica: how far it has loaded, or of which kind its failure is.

    Args:
        deployment: as the controller last told of it.
        lost: why the gateway gave a replica up, by name and epoch, which it may know before the controller does.
    """
    loading = [f"{replica.name}: {_how_far(replica)}" for replica in deployment.replicas if replica.phase in _LOADING]
    words = [f"still loading ({', '.join(loading)})"] if loading else []
    for replica in deployment.replicas:
        kind = lost.get((replica.name, replica.epoch))
        if replica.phase == pb.PHASE_FAILED or (replica.phase == pb.PHASE_READY and kind is not None):
            words.append(f"{replica.name} failed: {_WORDS[kind] if kind is not None else 'it could not be started'}")
        elif replica.phase == pb.PHASE_READY:
            words.append(f"{replica.name} is ready and is being connected to")
        elif replica.phase not in _LOADING:
            words.append(f"{replica.name} was stopped")
    return "no replica takes requests: " + ("; ".join(words) or "the service is starting")


def _how_far(replica: pb.Replica) -> str:
    """Returns the share of bytes that were read, or what the slowest rank does beside."""
    does = [doing(rank) for rank in replica.ranks]
    if READING not in does:
        return next((each for each in does if each != "ready"), "loading")
    loaded = sum(min(rank.loaded_bytes, _total(rank)) for rank in replica.ranks)
    return f"{100 * loaded // max(1, sum(_total(rank) for rank in replica.ranks))}%"


def _total(rank: pb.Rank) -> int:
    return rank.total_bytes or rank.weight_bytes
