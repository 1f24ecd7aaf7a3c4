"""Plans attention workers: the memory that they have for keys and values, and who of them holds which KV blocks.

Their memory is divided equally among the replicas that answer. Model ranks of those keep no KV blocks but the local
ones, and behind them a row for each token of a step, where keys and values wait to be sent.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from placement.errors import NotEnoughMemory
from placement.model.part import Part, Span, kept_states
from placement.model.specs import DeviceSpec, DType, ModelSpec, NodeSpec
from placement.planning.fitting import Blocks, Placed, Room, worker_name
from placement.planning.kv_size import CPU_SHARE, GPU_SHARE, UNKNOWN_MEMORY_KV_BYTES
from placement.planning.limits import ReplicaLimits
from placement.planning.memory import (
    CPU_PROCESS_BYTES,
    CUDA_PROCESS_BYTES,
    Footprint,
    format_bytes,
    num_blocks_for,
    rounded_size,
    size_words,
)
from placement.planning.plan import KvSizedBy, Role, Shard
from placement.planning.residency import Holder, Partition, Residency, resident

GROUP = "attention"
"""Names the attention workers together, where ranks are named by their replica."""
FIELD = "serving.attention"
NO_PART = Part(layers=Span(0, 0), kv_heads=Span(0, 0), ffn_columns=Span(0, 0), vocab_rows=Span(0, 0))
"""The part of the model that an attention worker has: it holds no weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSetup:
    """The attention workers of a deployment, as they are asked for.

    Attributes:
        places: the machine and the device of each.
        weights: how fast each attends, in any unit.
        kv_cache_bytes: what each has for keys and values; None: a share of the memory that is left there.
        local_kv_cache_bytes: what each model rank keeps itself, at the rank with the largest blocks.
    """

    places: tuple[tuple[NodeSpec, DeviceSpec], ...]
    weights: tuple[float, ...]
    partition: Partition = Partition.KV_HEADS
    kv_cache_bytes: int | None = None
    local_kv_cache_bytes: int = 0

    def serves(self, role: Role) -> bool:
        """Tells whether replicas of this role have their keys and values there: those that answer."""
        return role is not Role.PREFILL


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenant:
    """A replica whose keys and values attention workers hold.

    Attributes:
        replica: its place among all replicas.
        num_local_blocks: the KV blocks that its own ranks hold.
        least, most: the fewest KV blocks that it must have, and the most that its sequences can use.
        num_tenants: the replicas that share the attention workers' memory.
    """

    replica: int
    dtype: DType
    block_size: int
    num_local_blocks: int
    least: int
    most: int
    num_tenants: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """What attention workers hold.

    Attributes:
        shards: those that hold something, each with all of its keys and values; their number is their rank.
        residencies: where the blocks of each replica are, by its place.
    """

    shards: tuple[Shard, ...] = ()
    residencies: dict[int, Residency] = field(default_factory=dict)

    def blocks_of(self, replica: int) -> tuple[int, KvSizedBy] | None:
        """Counts the KV blocks of a replica, and says what decided it; None where its own ranks hold all."""
        residency = self.residencies.get(replica)
        return None if residency is None else (residency.num_blocks, "attention workers")


def own_blocks(ranks: Sequence[Placed], local: int) -> int:
    """Counts the KV blocks that the ranks of a replica hold themselves, where each may use ``local`` bytes for them.

    Raises:
        NotEnoughMemory: no block fits into these bytes, which are more than none.
    """
    largest = max(rank.block_bytes for rank in ranks)
    count = num_blocks_for(local, bytes_per_block=largest)
    if local and not count:
        raise NotEnoughMemory(
            field=f"{FIELD}.local_kv_cache",
            value=format_bytes(local),
            problem=f"holds no block: one of {ranks[0].block_size} tokens takes {format_bytes(largest)}",
            fix=f"Set it to {size_words(rounded_size(largest, up=True))} or more, or to 0.",
        )
    return count


def offloading(placed: Placed, token_budget: int, num_local_blocks: int) -> Placed:
    """Returns a rank that holds local blocks, and staging rows for a step, instead of blocks as the replica has."""
    num_layers = len(placed.part.layers) if num_local_blocks else 1
    token_bytes = placed.block_bytes // placed.block_size // max(1, len(placed.part.layers))
    staged = token_budget * token_bytes * num_layers
    held = num_local_blocks * placed.block_bytes + staged
    return replace(placed, fixed=replace(placed.fixed, kv_bytes=held), block_bytes=0, num_own_blocks=num_local_blocks)


def place_workers(
    setup: AttentionSetup, model: ModelSpec, limits: ReplicaLimits, nodes: Sequence[NodeSpec]
) -> list[Placed]:
    """Puts attention workers on their devices, with all that they need but keys and values.

    Args:
        nodes: those of the model ranks; a node of that name counts as the same, with what is known of it there.
    """
    known = {node.name: node for node in nodes}
    workspace = attention_workspace_bytes(model, limits.token_budget)
    return [
        Placed(
            node=known.get(node.name, node),
            device=device,
            replica=0,
            part=NO_PART,
            fixed=Footprint(
                weight_bytes=0,
                kv_bytes=0,
                workspace_bytes=workspace,
                process_bytes=CPU_PROCESS_BYTES if device.kind == "cpu" else CUDA_PROCESS_BYTES,
            ),
            block_size=limits.block_size,
            block_bytes=0,
        )
        for node, device in setup.places
    ]


def attention_workspace_bytes(model: ModelSpec, token_budget: int) -> int:
    """Estimates what an attention worker allocates for a step: rows as they arrive, answers and their parts, twice."""
    width = (3 * model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    return 2 * token_budget * width * 4


def plan_attention(
    setup: AttentionSetup,
    workers: Sequence[Placed],
    rooms: Sequence[Room],
    blocks: Blocks,
    tenants: Sequence[Tenant],
    model: ModelSpec,
) -> Attention:
    """Divides the memory of attention workers among replicas.

    Args:
        workers: as :func:`place_workers` gives them, which are in ``rooms``, too.
        blocks: the KV blocks of replicas that hold their own.

    Raises:
        NotEnoughMemory: a size that is set does not fit, or the workers hold less than one sequence.
    """
    cache_bytes = [_cache_bytes(setup, worker, rooms, blocks) for worker in workers]
    used = tuple(range(len(workers)))
    while True:  # whoever gets nothing is left out, so that ranks are numbered without gaps
        weights = [setup.weights[worker] for worker in used]
        caches = [cache_bytes[worker] // tenants[0].num_tenants for worker in used]
        residencies = {tenant.replica: _residency(setup, tenant, weights, caches, model) for tenant in tenants}
        holding = {worker for residency in residencies.values() for worker in residency.workers}
        if len(holding) == len(used):
            break
        used = tuple(worker for place, worker in enumerate(used) if place in holding)
    shards = tuple(
        _shard(rank, workers[worker], sum(
            held_bytes(residencies[tenant.replica], rank, model, tenant.dtype, tenant.block_size) for tenant in tenants
        ))
        for rank, worker in enumerate(used)
    )  # fmt: skip
    return Attention(shards=shards, residencies=residencies)


def _shard(rank: int, worker: Placed, kv_bytes: int) -> Shard:
    return Shard(
        rank=rank,
        node=worker.node.name,
        device=worker.device,
        part=NO_PART,
        num_blocks=0,
        weight_bytes=0,
        kv_bytes=kv_bytes,
        workspace_bytes=worker.fixed.workspace_bytes,
    )


def _cache_bytes(setup: AttentionSetup, worker: Placed, rooms: Sequence[Room], blocks: Blocks) -> int:
    """Returns the bytes that a worker has for keys and values: as set, or its part of what is left. They fit."""
    left: list[int] = []
    for room in rooms:
        if worker in room.ranks:
            num_workers = sum(rank.part == NO_PART for rank in room.ranks)
            free = room.memory_bytes - sum(need.total_bytes for need in room.needs(blocks))
            left.append(max(0, free) // num_workers)
    name = worker_name(worker.node, worker.device)
    if setup.kv_cache_bytes is None:
        share = CPU_SHARE if worker.device.kind == "cpu" else GPU_SHARE
        return int(share * min(left)) if left else UNKNOWN_MEMORY_KV_BYTES
    if left and setup.kv_cache_bytes > min(left):
        fits = min(left)
        smaller = f"set it to {size_words(rounded_size(fits, up=False))} or less, or " if fits else ""
        fix = f"{smaller}free {size_words(rounded_size(setup.kv_cache_bytes - fits, up=True))} there."
        raise NotEnoughMemory(
            field=f"{FIELD}.kv_cache",
            value=format_bytes(setup.kv_cache_bytes),
            problem=f"is more than the {format_bytes(fits)} that {name} has left for keys and values",
            fix=f"{fix[0].upper()}{fix[1:]}",
        )
    return setup.kv_cache_bytes


def _residency(
    setup: AttentionSetup, tenant: Tenant, weights: Sequence[float], cache_bytes: Sequence[int], model: ModelSpec
) -> Residency:
    """Returns where the blocks of a replica are, of which each worker has so many bytes. Raises NotEnoughMemory."""

    def residency(num_remote: Sequence[int], num_local: int) -> Residency:
        return resident(
            setup.partition,
            weights,
            num_kv_heads=model.num_kv_heads,
            block_size=tenant.block_size,
            num_local_blocks=num_local,
            num_remote_blocks=num_remote,
        )

    holders = {each.worker: each for it in residency([1] * len(weights), 0).regions for each in it.holders}
    sizes = {
        worker: holder_block_bytes(holder, model, tenant.dtype, tenant.block_size) for worker, holder in holders.items()
    }
    most = max(0, tenant.most - tenant.num_local_blocks)
    counts = [
        min(most, num_blocks_for(size, bytes_per_block=sizes[worker])) if worker in sizes else 0
        for worker, size in enumerate(cache_bytes)
    ]
    is_whole = setup.partition is Partition.REQUESTS
    remote = sum(counts) if is_whole else min(counts[worker] for worker in holders)
    lacking = tenant.least - tenant.num_local_blocks - remote
    if remote < 1 or lacking > 0:
        raise _too_small(setup, tenant, remote, max(sizes.values()), len(weights) if is_whole else 1)
    return residency(counts, tenant.num_local_blocks)


def _too_small(
    setup: AttentionSetup, tenant: Tenant, remote: int, block_bytes: int, num_regions: int
) -> NotEnoughMemory:
    needed = max(1, tenant.least - tenant.num_local_blocks)
    # A sequence may have blocks in several regions; and workers have their memory for all replicas.
    least = -(-needed // num_regions) * block_bytes * tenant.num_tenants
    held = (tenant.num_local_blocks + remote) * tenant.block_size
    words = (
        f"holds {held} tokens of replica-{tenant.replica}, and one sequence may have {tenant.least * tenant.block_size}"
    )
    smaller = f", or set model.max_context_tokens to {held} or less" if held else ""
    return NotEnoughMemory(
        field=f"{FIELD}.kv_cache",
        value=None if setup.kv_cache_bytes is None else format_bytes(setup.kv_cache_bytes),
        problem=words,
        fix=f"Set it to {size_words(rounded_size(least, up=True))} or more{smaller}.",
    )


def holder_block_bytes(holder: Holder, model: ModelSpec, dtype: DType, block_size: int) -> int:
    """Counts the bytes of what an attention worker holds of a block, in all layers."""
    states = kept_states(model, Span(0, model.num_layers), holder.kv_heads)
    numbers = sum(state.elements_per_token for state in states)
    return holder.slots_per_block(block_size) * dtype.itemsize * numbers


def held_bytes(residency: Residency, worker: int, model: ModelSpec, dtype: DType, block_size: int) -> int:
    """Counts the bytes of all that an attention worker holds of a replica."""
    return sum(
        len(region.blocks) * holder_block_bytes(holder, model, dtype, block_size)
        for region in residency.regions
        for holder in region.holders
        if holder.worker == worker
    )
