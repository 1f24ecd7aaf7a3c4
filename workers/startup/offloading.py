"""Opens the sessions of a rank with attention workers, as its load says."""

from collections.abc import Callable

from protos.heterodyne.worker.v1 import worker_pb2 as pb
from workers.attention_worker.whereabouts import Address, Whereabouts
from workers.offload.offloading import Offloading, OffloadSettings
from workers.startup.checks import CheckedLoad


def open_offloading(request: pb.LoadRequest, checked: CheckedLoad, go_on: Callable[[], None]) -> Offloading | None:
    """Opens the sessions; None where the replica's own ranks hold all keys and values.

    Raises:
        AttentionLost: an attention worker was not found in time, or refuses this rank.
        NotEnoughMemory: it has not the memory.
    """
    if checked.residency is None:
        return None
    said, roster = request.residency, checked.roster
    # Micro-batches of all ranks of a stage are all-reduced in turn, so that all must have attention to wait for.
    can_stagger = not checked.model.ladder and all(len(part.kv_heads) for part in roster.parts)
    settings = OffloadSettings(
        model=checked.model,
        part=roster.part,
        residency=checked.residency,
        block_size=checked.limits.block_size,
        itemsize=checked.dtype.itemsize,
        epoch=request.epoch,
        secret=said.secret,
        replica=said.replica,
        rank=roster.rank,
        q_first=said.q_first,
        staggered=said.staggered and can_stagger,
        resumes=said.resumes and len(roster.parts) == 1,
    )
    addresses = [Address(host=worker.host, port=worker.port, name=worker.name) for worker in said.workers]
    return Offloading(settings, Whereabouts(addresses), go_on)
