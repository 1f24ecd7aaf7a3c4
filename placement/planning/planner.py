"""Plans where weights go, and proves that they fit in memory."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from placement.errors import InvalidConfig
from placement.model.part import Part
from placement.model.quantization import LinearFormat, check_linear_format
from placement.model.specs import ClusterSpec, DeviceSpec, DType, ModelSpec, NodeSpec
from placement.model.weights import shard_tensors
from placement.planning.attention import (
    Attention,
    AttentionSetup,
    Tenant,
    offloading,
    own_blocks,
    place_workers,
    plan_attention,
)
from placement.planning.fitting import Blocks, Placed, rooms
from placement.planning.kv_size import Demand, auto_blocks
from placement.planning.layout import ReplicaLayout, cut, one_each
from placement.planning.limits import ReplicaLimits
from placement.planning.memory import footprint, kv_bytes_per_block
from placement.planning.plan import KvSizedBy, Plan, Replica, Shard, Stage
from placement.planning.remedies import check_fits

LAYOUTS_FIELD = "serving.parallelism.replicas"

# Of a replica, by stage and rank.
_Parts = tuple[tuple[Part, ...], ...]
_Ranks = Sequence[Sequence[Placed]]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sizes:
    """The settings that decide how large every rank is: see :func:`plan_replicas`."""

    model: ModelSpec
    dtype: DType
    kv_cache_bytes: int | None
    max_context_tokens: int | None
    limits: ReplicaLimits
    linear: LinearFormat | None
    attention: AttentionSetup | None = None

    def of(self, layout: ReplicaLayout) -> "_Sizes":
        """Returns the sizes of a replica, which its pool may have of its own."""
        pool = layout.pool
        return dataclasses.replace(self, dtype=pool.dtype or self.dtype, limits=pool.limits_of(self.limits))

    def demand(self, placed: Sequence[_Ranks], workers: Sequence[Placed]) -> Demand:
        """Describes what must fit where, attention workers among it."""
        replicas = tuple(tuple(rank for stage in replica for rank in stage) for replica in placed)
        return Demand(
            replicas=replicas,
            rooms=rooms([*(rank for ranks in replicas for rank in ranks), *workers]),
            kv_cache_bytes=self.kv_cache_bytes,
            max_num_seqs=self.limits.max_num_seqs,
            asked_tokens=self.max_context_tokens,
            model_tokens=self.model.max_context_tokens,
        )

    def place(
        self, replica: int, where: tuple[NodeSpec, DeviceSpec], part: Part, num_ranks: int, leads: bool
    ) -> Placed:
        """Puts a rank, one of the ``num_ranks`` of its stage, on its device."""
        node, device = where
        fixed = footprint(
            self.model,
            part,
            dtype=self.dtype,
            kv_bytes=0,
            limits=self.limits,
            on_cpu=device.kind == "cpu",
            linear=self.linear,
            num_ranks=num_ranks,
            leads=leads,
        )
        block_size = self.limits.block_size
        return Placed(
            node=node,
            device=device,
            replica=replica,
            part=part,
            fixed=fixed,
            block_size=block_size,
            block_bytes=kv_bytes_per_block(self.model, part, dtype=self.dtype, block_size=block_size),
        )


def plan_replicas(
    model: ModelSpec,
    cluster: ClusterSpec,
    *,
    dtype: DType,
    kv_cache_bytes: int | None,
    max_context_tokens: int | None,
    limits: ReplicaLimits,
    linear: LinearFormat | None = None,
    layouts: Sequence[ReplicaLayout] | None = None,
    is_draft: bool = False,
    attention: AttentionSetup | None = None,
) -> Plan:
    """Plans the replicas ``replica-0`` onwards. ``plan.model.max_context_tokens`` is the context that is served.

    Args:
        kv_cache_bytes: the most memory for KV blocks on a rank. All ranks of a replica have the same number of blocks,
            which take less memory on those with fewer layers or KV heads. None: see :func:`auto_blocks`.
        limits: the sizes that each replica serves within, where its pool has none of its own, as for ``dtype``.
        max_context_tokens: the context to serve; None: as much of the model's own as the KV blocks hold.
        linear: the format of linear layers; None: they are held in ``dtype``, as all else.
        layouts: the devices of each replica and their shares; None: each device, in order, has a replica.
        is_draft: whether the plan is made whether it fits or not, with the fewest KV blocks, wherever they are.
        attention: the attention workers, which are no devices of ``cluster``.

    Raises:
        InvalidConfig: the model knows a smaller context, or it cannot be rounded, or cut as a layout says.
        InvalidModel: the sizes of a GPTQ checkpoint contradict each other, or it cannot be cut as a layout says.
        NotEnoughMemory: the KV blocks hold too little, or ranks do not fit where their memory is known.
    """
    sizes = _Sizes(
        model=model,
        dtype=dtype,
        kv_cache_bytes=kv_cache_bytes,
        max_context_tokens=max_context_tokens,
        limits=limits,
        linear=linear,
        attention=attention,
    )
    return _plan(sizes, cluster, one_each(cluster) if layouts is None else layouts, is_draft)


def _plan(sizes: _Sizes, cluster: ClusterSpec, layouts: Sequence[ReplicaLayout], is_draft: bool) -> Plan:
    """Cuts the model, checks that every rank fits where it is placed, and chooses the KV blocks and the context."""
    placed = _place_all(sizes, cluster, layouts)
    setup = sizes.attention
    workers = [] if setup is None else place_workers(setup, sizes.model, sizes.limits, cluster.nodes)
    demand = sizes.demand(placed, workers)
    blocks = _draft_blocks(demand) if is_draft else _checked_blocks(demand)
    attention = Attention()
    tenants = [] if is_draft else _tenants(sizes, layouts, demand)
    if setup is not None and tenants:
        attention = plan_attention(setup, workers, demand.rooms, [count for count, _ in blocks], tenants, sizes.model)
        blocks = [attention.blocks_of(index) or found for index, found in enumerate(blocks)]
    counts = [num_blocks for num_blocks, _ in blocks]
    replicas = tuple(
        Replica(
            name=f"replica-{index}",
            stages=_stages(ranks, counts),
            limits=sizes.of(layout).limits,
            dtype=sizes.of(layout).dtype,
            role=layout.pool.role,
            kv_sized_by=sized_by,
            residency=attention.residencies.get(index),
        )
        for index, (layout, ranks, (_, sized_by)) in enumerate(zip(layouts, placed, blocks, strict=True))
    )
    context = sizes.max_context_tokens or min(sizes.model.max_context_tokens, demand.held_tokens(counts))
    served = dataclasses.replace(sizes.model, max_context_tokens=context)
    return Plan(model=served, dtype=sizes.dtype, replicas=replicas, attention=attention.shards)


def _tenants(sizes: _Sizes, layouts: Sequence[ReplicaLayout], demand: Demand) -> list[Tenant]:
    """Describes the replicas whose keys and values attention workers hold."""
    setup = sizes.attention
    served = [] if setup is None else [it for it, layout in enumerate(layouts) if setup.serves(layout.pool.role)]
    return [
        Tenant(
            replica=index,
            dtype=sizes.of(layouts[index]).dtype,
            block_size=sizes.of(layouts[index]).limits.block_size,
            num_local_blocks=demand.replicas[index][0].num_own_blocks or 0,
            least=demand.least[index],
            most=demand.most[index],
            num_tenants=len(served),
        )
        for index in served
    ]


def _place_all(sizes: _Sizes, cluster: ClusterSpec, layouts: Sequence[ReplicaLayout]) -> list[_Ranks]:
    """Cuts the model, and puts the ranks of every replica on their devices."""
    parts = _cut_all(sizes, layouts)
    _check_context(sizes.model, sizes.max_context_tokens)
    devices = [(node, device) for node in cluster.nodes for device in node.devices]
    placed = []
    for index, (layout, replica_parts) in enumerate(zip(layouts, parts, strict=True)):
        own = sizes.of(layout)
        ranks = _place(own, index, layout, replica_parts, devices)
        if sizes.attention is not None and sizes.attention.serves(layout.pool.role):
            ranks = _offloading(own, sizes.attention, ranks, index)
        placed.append(ranks)
    return placed


def _offloading(sizes: _Sizes, setup: AttentionSetup, ranks: _Ranks, replica: int) -> _Ranks:
    """Returns the ranks of a replica whose KV blocks attention workers hold, but for the local ones."""
    if any(rank.part.stripe is not None for stage in ranks for rank in stage):
        raise InvalidConfig(
            field=f"{LAYOUTS_FIELD}[{replica}]",
            problem="has workers that share sequences, which keep their own keys and values, and serving.attention has "
            "attention workers keep them",
            fix="Use tensor_split or stages instead of sequence_split, or leave serving.attention out.",
        )
    local = own_blocks([rank for stage in ranks for rank in stage], setup.local_kv_cache_bytes)
    return [[offloading(rank, sizes.limits.token_budget, local) for rank in stage] for stage in ranks]


def _checked_blocks(demand: Demand) -> list[tuple[int, KvSizedBy]]:
    """Returns the KV blocks of each replica, with which all ranks fit. Raises NotEnoughMemory."""
    check_fits(demand)
    if demand.kv_cache_bytes is None:
        return auto_blocks(demand)
    return [(num_blocks, "setting") for num_blocks in demand.blocks_of(demand.kv_cache_bytes)]


def _draft_blocks(demand: Demand) -> list[tuple[int, KvSizedBy]]:
    """Returns the KV blocks that are set, or the fewest that there must be where no size is."""
    wanted = demand.least if demand.kv_cache_bytes is None else demand.blocks_of(demand.kv_cache_bytes)
    return [(max(num_blocks, least), "setting") for num_blocks, least in zip(wanted, demand.least, strict=True)]


def _cut_all(sizes: _Sizes, layouts: Sequence[ReplicaLayout]) -> list[_Parts]:
    """Cuts the model for every replica, and checks that the parts can be held in the format of linear layers."""
    model, linear = sizes.model, sizes.linear
    check_linear_format(shard_tensors(model, Part.whole(model)), linear)
    parts = [
        cut(model, layout, linear, block_size=sizes.of(layout).limits.block_size, field=f"{LAYOUTS_FIELD}[{index}]")
        for index, layout in enumerate(layouts)
    ]
    for part in (part for replica_parts in parts for stage in replica_parts for part in stage):
        check_linear_format(shard_tensors(model, part), linear)
    return parts


def _check_context(model: ModelSpec, asked: int | None) -> None:
    if asked is not None and asked > model.max_context_tokens:
        raise InvalidConfig(
            field="model.max_context_tokens",
            value=asked,
            problem=f"is more than the {model.max_context_tokens} tokens that the model was made for",
            fix=f"Set it to {model.max_context_tokens} or less.",
        )


def _place(
    sizes: _Sizes, replica: int, layout: ReplicaLayout, parts: _Parts, devices: Sequence[tuple[NodeSpec, DeviceSpec]]
) -> _Ranks:
    """Puts the ranks of a replica on their devices, by stage."""
    return [
        [
            sizes.place(replica, devices[device], part, len(stage_parts), leads=stage_index == index == 0)
            for index, (device, part) in enumerate(zip(stage.devices, stage_parts, strict=True))
        ]
        for stage_index, (stage, stage_parts) in enumerate(zip(layout.stages, parts, strict=True))
    ]


def _stages(placed: _Ranks, blocks: Blocks) -> tuple[Stage, ...]:
    stages: list[Stage] = []
    rank = 0
    for ranks in placed:
        shards = tuple(_shard(rank + index, shard, blocks) for index, shard in enumerate(ranks))
        stages.append(Stage(layers=ranks[0].part.layers, shards=shards))
        rank += len(shards)
    return tuple(stages)


def _shard(rank: int, placed: Placed, blocks: Blocks) -> Shard:
    need = placed.need(blocks)
    return Shard(
        rank=rank,
        node=placed.node.name,
        device=placed.device,
        part=placed.part,
        num_blocks=blocks[placed.replica] if placed.num_own_blocks is None else placed.num_own_blocks,
        weight_bytes=need.weight_bytes,
        kv_bytes=need.kv_bytes,
        workspace_bytes=need.workspace_bytes,
    )
