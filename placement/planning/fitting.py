"""Checks that ranks fit where they are placed: each in its device, and those on CPUs together in their node."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from placement.errors import NotEnoughMemory
from placement.model.part import Part
from placement.model.specs import DeviceSpec, NodeSpec
from placement.planning.memory import Footprint, format_bytes, size_setting


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """A rank on its device, and the memory that it takes there.

    Attributes:
        node, device: the machine and its device that the rank is placed on.
        part: the part of the model that it holds.
        num_blocks: KV blocks that it allocates.
        need: the bytes that it needs.
        smallest_kv_bytes: the fewest KV bytes that would be enough.
        setting_bytes: the KV bytes of the rank of its replica that has most, which ``serving.kv_cache`` sets.
    """

    node: NodeSpec
    device: DeviceSpec
    part: Part
    num_blocks: int
    need: Footprint
    smallest_kv_bytes: int
    setting_bytes: int


def check_memory(ranks: Sequence[Placed], unmeasured: Collection[tuple[str, str]]) -> None:
    """Checks that all ranks fit.

    Args:
        unmeasured: (node, device) pairs whose memory is not known.

    Raises:
        NotEnoughMemory: its field is ``serving.kv_cache`` where smaller KV caches would fit, else ``model.path``. It
            names what would fit.
    """
    known = [rank for rank in ranks if (rank.node.name, rank.device.name) not in unmeasured]
    for rank in known:
        where = f"{rank.device.name} of node {rank.node.name}"
        _check_fits([rank], rank.device.memory_bytes, where)
    on_cpu = [rank for rank in known if rank.device.kind == "cpu"]
    for node in {rank.node.name: rank.node for rank in on_cpu}.values():
        neighbours = [rank for rank in on_cpu if rank.node.name == node.name]
        _check_fits(neighbours, node.memory_bytes, f"node {node.name}")


def _check_fits(ranks: Sequence[Placed], memory_bytes: int, where: str) -> None:
    needs = [rank.need for rank in ranks]
    total = sum(need.total_bytes for need in needs)
    if total <= memory_bytes:
        return
    problem = f"{_needed(needs, total)}, and {where} has {format_bytes(memory_bytes)}"
    kv_bytes = sum(need.kv_bytes for need in needs)
    # The room that is left for KV. One setting scales all KV caches.
    kv_room = memory_bytes - (total - kv_bytes)
    if kv_room > 0 and all(kv_room * rank.need.kv_bytes >= kv_bytes * rank.smallest_kv_bytes for rank in ranks):
        enough = min(rank.setting_bytes * kv_room // kv_bytes for rank in ranks if rank.need.kv_bytes)
        raise NotEnoughMemory(
            field="serving.kv_cache",
            value=format_bytes(max(rank.setting_bytes for rank in ranks)),
            problem=problem,
            fix=f"Set serving.kv_cache to {size_setting(enough, round_up=False)} or less.",
        )
    least = max(rank.need.total_bytes - rank.need.kv_bytes + rank.smallest_kv_bytes for rank in ranks)
    can_run = memory_bytes // least
    first = f"Run {can_run} of them there" if len(ranks) > 1 and can_run else "Free memory"
    room = size_setting(least, round_up=True)
    raise NotEnoughMemory(
        field="model.path",
        value=format_bytes(max(need.weight_bytes for need in needs)),
        problem=problem,
        fix=f"{first}, use a smaller model, or give each worker {room} or more.",
    )


def _needed(needs: Sequence[Footprint], total: int) -> str:
    if len(needs) == 1:
        return f"1 worker needs {format_bytes(total)} ({needs[0]})"
    largest = max(needs, key=lambda need: need.total_bytes)
    shape = f"{largest}, each" if all(need == largest for need in needs) else f"the largest: {largest}"
    return f"{len(needs)} workers need {format_bytes(total)} ({shape})"
