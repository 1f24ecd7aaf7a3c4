"""Refuses what does not fit in memory, and names changes that make it fit: each of them works when it is followed."""

from collections.abc import Sequence, Set
from dataclasses import replace

from placement.errors import NotEnoughMemory, Remedy
from placement.model.specs import ClusterSpec, DeviceSpec, NodeSpec
from placement.planning.fitting import EACH_WORKER, Blocks, Room, first_lacking, worker_name
from placement.planning.kv_size import Demand, most_setting
from placement.planning.memory import format_bytes, rounded_size, size_words


def check_fits(demand: Demand) -> None:
    """Checks that every replica holds a sequence in its KV blocks, and that all ranks fit.

    Raises:
        NotEnoughMemory: its field is ``serving.kv_cache`` where that can be set so that everything fits,
            ``model.max_context_tokens`` where a smaller context would fit, else ``model.path``.
    """
    if demand.kv_cache_bytes is None:
        _check_auto(demand)
    elif demand.kv_cache_bytes < demand.least_setting:
        raise _too_small(demand, demand.kv_cache_bytes)
    elif room := first_lacking(demand.rooms, demand.blocks_of(demand.kv_cache_bytes)):
        raise _too_large(demand, demand.kv_cache_bytes, room)


def _check_auto(demand: Demand) -> None:
    room = first_lacking(demand.rooms, demand.least)
    if room is None:
        return
    remedies = [_more_memory(demand, demand.least)]
    fewer = _most_tokens(demand)
    if fewer:
        remedies.append(Remedy(max_context_tokens=fewer))
    problem = room.describe(demand.least, f" to serve {demand.least_tokens} tokens")
    raise refusal(
        field="model.max_context_tokens" if fewer else "model.path",
        value=demand.asked_tokens if fewer else None,
        problem=problem,
        remedies=remedies,
        first=_first(room, demand.least),
    )


def _most_tokens(demand: Demand) -> int:
    """Counts the tokens of a sequence whose blocks fit in every replica; 0 where no block does."""
    low, high = 0, demand.least_tokens - 1
    while low < high:
        middle = (low + high + 1) // 2
        if first_lacking(demand.rooms, demand.holding(middle)):
            high = middle - 1
        else:
            low = middle
    return low


def _too_small(demand: Demand, setting: int) -> NotEnoughMemory:
    """Refuses a KV cache that holds less than one sequence."""
    least = demand.least_setting
    most = most_setting(demand, demand.rooms, 2 * least)
    if most is not None:
        remedies = [Remedy(kv_cache_bytes=rounded_size(least, up=True, most=most), is_more_kv=True)]
    else:
        enough = rounded_size(least, up=True)
        more = _more_memory(demand, demand.blocks_of(enough))
        remedies = [replace(more, kv_cache_bytes=enough, is_more_kv=True)]
    num_tokens = demand.held_tokens(demand.blocks_of(setting))
    if num_tokens and first_lacking(demand.rooms, demand.blocks_of(setting)) is None:
        remedies.append(Remedy(max_context_tokens=num_tokens))
    block_bytes, block_size = max(zip(demand.largest_block_bytes, demand.block_sizes, strict=True))
    block = f"one of {block_size} tokens takes {format_bytes(block_bytes)}"
    return refusal(
        field="serving.kv_cache",
        value=format_bytes(setting),
        problem=f"holds {num_tokens} tokens, and one sequence may have {demand.least_tokens}"
        if num_tokens
        else f"holds no block: {block}",
        remedies=remedies,
    )


def _too_large(demand: Demand, setting: int, room: Room) -> NotEnoughMemory:
    """Refuses a KV cache that does not fit beside the weights."""
    blocks, least = demand.blocks_of(setting), demand.least_setting
    problem = room.describe(blocks)
    most = most_setting(demand, demand.rooms, setting)
    if most is not None:
        smaller = Remedy(kv_cache_bytes=rounded_size(most, up=False, least=least))
        return refusal(field="serving.kv_cache", value=format_bytes(setting), problem=problem, remedies=[smaller])
    remedy = _more_memory(demand, blocks)
    in_nodes = most_setting(demand, [each for each in demand.rooms if each.node], setting)
    if remedy.free_bytes and in_nodes is not None:  # no node needs more, if the KV caches are smaller
        smaller_bytes = rounded_size(in_nodes, up=False, least=least)
        blocks = demand.blocks_of(smaller_bytes)
        remedy = replace(_more_memory(demand, blocks), kv_cache_bytes=smaller_bytes)
    return refusal(field="model.path", problem=problem, remedies=[remedy], first=_first(room, blocks))


def _more_memory(demand: Demand, blocks: Blocks) -> Remedy:
    """Returns the memory with which all ranks fit."""
    lacking = [room for room in demand.rooms if room.lacking(blocks)]
    return Remedy(
        worker_bytes=_worker_bytes(demand, {room.name for room in lacking if room.node is None}, blocks),
        free_bytes={room.node: rounded_size(room.lacking(blocks), up=True) for room in lacking if room.node},
    )


def _worker_bytes(demand: Demand, lacking: Set[str], blocks: Blocks) -> dict[str, int]:
    """Returns what workers need, by the names of those that have less, or for each worker where one size does."""
    needs: dict[str, int] = {}
    for rank in (rank for ranks in demand.replicas for rank in ranks):
        name = worker_name(rank.node, rank.device)
        needs[name] = max(needs.get(name, 0), rank.need(blocks).total_bytes)
    sizes = {name: rounded_size(need, up=True) for name, need in needs.items() if name in lacking}
    if len(set(sizes.values())) == 1 and max(sizes.values()) >= max(needs.values()):
        return {EACH_WORKER: max(sizes.values())}
    return sizes


def _first(room: Room, blocks: Blocks) -> list[str]:
    """Says what else may help: fewer replicas on the node, a smaller model."""
    sizes = sorted(need.total_bytes for need in room.needs(blocks))
    can_run = sum(sum(sizes[: index + 1]) <= room.memory_bytes for index in range(len(sizes)))
    are_whole = len({rank.replica for rank in room.ranks}) == len(room.ranks)
    fewer = [f"run {can_run} of them there"] if len(sizes) > 1 and can_run and are_whole else []
    return [*fewer, "use a smaller model"]


def refusal(
    *, field: str, value: object = None, problem: str, remedies: Sequence[Remedy], first: Sequence[str] = ()
) -> NotEnoughMemory:
    """Returns the error whose fix says one of ``remedies`` is to be followed, or what ``first`` says.

    Args:
        value: the value that the user gave; None where they gave none.
    """
    ways = [*first, *(_words(remedy) for remedy in remedies)]
    fix = ", or ".join([*([", ".join(ways[:-1])] if len(ways) > 1 else []), ways[-1]])
    return NotEnoughMemory(
        field=field, value=value, problem=problem, fix=f"{fix[0].upper()}{fix[1:]}.", remedies=tuple(remedies)
    )


def _words(remedy: Remedy) -> str:
    changes: list[str] = []
    if remedy.kv_cache_bytes is not None:
        side = "more" if remedy.is_more_kv else "less"
        changes.append(f"set serving.kv_cache to {size_words(remedy.kv_cache_bytes)} or {side}")
    if remedy.max_context_tokens is not None:
        changes.append(f"set model.max_context_tokens to {remedy.max_context_tokens} or less")
    if remedy.worker_bytes:
        sizes = (f"{who} {size_words(size)} or more" for who, size in remedy.worker_bytes.items())
        changes.append(f"give {' and '.join(sizes)}")
    if remedy.free_bytes:
        sizes = (f"{size_words(size)} on node {node}" for node, size in remedy.free_bytes.items())
        changes.append(f"free {' and '.join(sizes)}")
    return " and ".join(changes)


def followed(cluster: ClusterSpec, remedy: Remedy) -> ClusterSpec:
    """Returns the cluster once the memory was given that a remedy asks for."""
    return ClusterSpec(nodes=tuple(_followed(node, remedy) for node in cluster.nodes))


def _followed(node: NodeSpec, remedy: Remedy) -> NodeSpec:
    freed = None if node.memory_bytes is None else node.memory_bytes + remedy.free_bytes.get(node.name, 0)

    def given(device: DeviceSpec) -> DeviceSpec:
        if freed is not None and device.kind == "cpu" and device.memory_bytes == node.memory_bytes:
            return replace(device, memory_bytes=freed)
        names = (EACH_WORKER, worker_name(node, device))
        sizes = [remedy.worker_bytes[name] for name in names if name in remedy.worker_bytes]
        return replace(device, memory_bytes=max([*sizes, device.memory_bytes or 0])) if sizes else device

    return replace(node, memory_bytes=freed, devices=tuple(map(given, node.devices)))
