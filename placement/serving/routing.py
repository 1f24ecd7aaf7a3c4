"""Chooses the replica that serves a request, from the live load of all replicas."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaLoad:
    """The load that a replica's leader last reported.

    Attributes:
        accepting: whether the replica is ready, and not draining.
        pending_tokens: tokens still to be computed for what waits and runs there.
    """

    name: str
    accepting: bool
    pending_tokens: int
    num_running: int
    num_waiting: int
    free_blocks: int
    total_blocks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """A decision: which replica serves a request, and why."""

    replica: str
    reason: str


def least_loaded(loads: Iterable[ReplicaLoad], num_new_tokens: int) -> Route | None:
    """Chooses the replica with fewest pending tokens (join the shortest queue, as in Splitwise, Patel et al. 2024).

    Ties go to the replica with most free blocks, then to the first by name, so that the choice is
    reproducible.

    Args:
        num_new_tokens: how many tokens the request's prompt has.

    Returns:
        the route, or None where no replica accepts requests.
    """
    accepting = [load for load in loads if load.accepting]
    if not accepting:
        return None
    best = min(accepting, key=lambda load: (load.pending_tokens, -load.free_blocks, load.name))
    reason = (
        f"fewest pending tokens of {len(accepting)} accepting: {best.pending_tokens} "
        f"+ {num_new_tokens} new, {best.free_blocks} of {best.total_blocks} blocks free"
    )
    return Route(replica=best.name, reason=reason)
