"""Plans where weights go, and proves that they fit in memory."""

import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from placement.errors import InvalidConfig, NotEnoughMemory
from placement.model.part import Part
from placement.model.quantization import LinearFormat, check_linear_format
from placement.model.specs import ClusterSpec, DeviceSpec, DType, ModelSpec, NodeSpec
from placement.model.weights import shard_tensors
from placement.planning.fitting import Placed, check_memory
from placement.planning.layout import ReplicaLayout, cut, one_each
from placement.planning.limits import ReplicaLimits
from placement.planning.memory import (
    Footprint,
    footprint,
    format_bytes,
    kv_bytes_per_block,
    num_blocks_for,
    num_blocks_of,
    size_setting,
)
from placement.planning.plan import Plan, Replica, Shard, Stage

LAYOUTS_FIELD = "serving.parallelism.replicas"

_Parts = tuple[tuple[Part, ...], ...]  # of a replica, by stage and rank


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sizes:
    """The settings that decide how large every rank is: see :func:`plan_replicas`."""

    model: ModelSpec
    dtype: DType
    kv_cache_bytes: int
    limits: ReplicaLimits
    linear: LinearFormat | None

    def block_bytes(self, part: Part) -> int:
        """Counts the bytes of one KV block on a rank."""
        return kv_bytes_per_block(self.model, part, dtype=self.dtype, block_size=self.limits.block_size)

    def num_blocks(self, parts: _Parts) -> int:
        """Counts the KV blocks of a replica: as many as the rank with the largest ones has room for."""
        return num_blocks_for(self.kv_cache_bytes, bytes_per_block=self.largest_block_bytes(parts))

    def largest_block_bytes(self, parts: _Parts) -> int:
        """Returns the bytes of a block on the rank where it takes most."""
        return max(self.block_bytes(part) for stage in parts for part in stage)

    def footprint(self, part: Part, *, num_blocks: int, on_cpu: bool, num_ranks: int, leads: bool) -> Footprint:
        """Reckons what a rank needs, one of the ``num_ranks`` of its stage."""
        return footprint(
            self.model,
            part,
            dtype=self.dtype,
            kv_bytes=num_blocks * self.block_bytes(part),
            limits=self.limits,
            on_cpu=on_cpu,
            linear=self.linear,
            num_ranks=num_ranks,
            leads=leads,
        )


def plan_replicas(
    model: ModelSpec,
    cluster: ClusterSpec,
    *,
    dtype: DType,
    kv_cache_bytes: int,
    max_context_tokens: int | None,
    limits: ReplicaLimits,
    unmeasured: Collection[tuple[str, str]] = (),
    linear: LinearFormat | None = None,
    layouts: Sequence[ReplicaLayout] | None = None,
) -> Plan:
    """Plans the replicas ``replica-0`` onwards. ``plan.model.max_context_tokens`` is the context that is served.

    Args:
        kv_cache_bytes: the most memory for KV blocks on a rank; whole blocks of it are used. All ranks of a replica
            have the same number of blocks, which take less memory on those with fewer layers or KV heads.
        limits: the sizes that each replica serves within.
        max_context_tokens: the context to serve; None: as much of the model's own as the KV blocks hold.
        unmeasured: (node, device) pairs whose memory is not known yet. The worker checks it when it loads.
        linear: the format of linear layers; None: they are held in ``dtype``, as all else.
        layouts: the devices of each replica and their shares; None: each device, in order, has a replica.

    Raises:
        InvalidConfig: ``max_context_tokens`` is more than the model knows, its layers cannot be rounded, or it cannot
            be cut as a layout says.
        InvalidModel: the sizes of a GPTQ checkpoint contradict each other, or it cannot be cut as a layout says.
        NotEnoughMemory: the KV blocks hold too little, or ranks do not fit in their devices or in their node.
    """
    sizes = _Sizes(
        model=model,
        dtype=dtype,
        kv_cache_bytes=kv_cache_bytes,
        limits=limits,
        linear=linear,
    )
    return _plan(sizes, cluster, one_each(cluster) if layouts is None else layouts, max_context_tokens, unmeasured)


def _plan(
    sizes: _Sizes,
    cluster: ClusterSpec,
    layouts: Sequence[ReplicaLayout],
    max_context_tokens: int | None,
    unmeasured: Collection[tuple[str, str]],
) -> Plan:
    """Cuts the model, chooses the context, and checks that every rank fits where it is placed."""
    parts = _cut_all(sizes, layouts)
    context = _context(sizes, parts, max_context_tokens)
    smallest = num_blocks_of(context if max_context_tokens else 1, block_size=sizes.limits.block_size)
    devices = [(node, device) for node in cluster.nodes for device in node.devices]
    placed = [
        _place(sizes, layout, replica_parts, devices, smallest)
        for layout, replica_parts in zip(layouts, parts, strict=True)
    ]
    check_memory([rank for replica in placed for stage in replica for rank in stage], unmeasured)
    replicas = tuple(_replica(index, stages, sizes.limits) for index, stages in enumerate(placed))
    served = dataclasses.replace(sizes.model, max_context_tokens=context)
    return Plan(model=served, dtype=sizes.dtype, replicas=replicas)


def _cut_all(sizes: _Sizes, layouts: Sequence[ReplicaLayout]) -> list[_Parts]:
    """Cuts the model for every replica, and checks that the parts can be held in the format of linear layers."""
    model, linear = sizes.model, sizes.linear
    check_linear_format(shard_tensors(model, Part.whole(model)), linear)
    parts = [
        cut(model, layout, linear, block_size=sizes.limits.block_size, field=f"{LAYOUTS_FIELD}[{index}]")
        for index, layout in enumerate(layouts)
    ]
    for part in (part for replica_parts in parts for stage in replica_parts for part in stage):
        check_linear_format(shard_tensors(model, part), linear)
    return parts


def _context(sizes: _Sizes, parts: Sequence[_Parts], asked: int | None) -> int:
    """Returns the context that every replica serves: ``asked`` where it is given.

    Where it is None, the context is the model's own, or what the KV blocks hold where that is less. So a small cache
    serves shorter requests instead of none, as long as it holds one block.
    """
    model, block_size = sizes.model, sizes.limits.block_size
    if asked is not None and asked > model.max_context_tokens:
        raise InvalidConfig(
            field="model.max_context_tokens",
            value=asked,
            problem=f"is more than the {model.max_context_tokens} tokens that the model was made for",
            fix=f"Set it to {model.max_context_tokens} or less.",
        )
    block_bytes = max(sizes.largest_block_bytes(replica_parts) for replica_parts in parts)
    num_tokens = num_blocks_for(sizes.kv_cache_bytes, bytes_per_block=block_bytes) * block_size
    wanted = asked or min(model.max_context_tokens, max(num_tokens, 1))
    if num_tokens >= wanted:
        return wanted
    smallest = num_blocks_of(wanted, block_size=block_size) * block_bytes
    fix = f"Set serving.kv_cache to {size_setting(smallest, round_up=True)} or more"
    lower = f", or model.max_context_tokens to {num_tokens} or less" if num_tokens else ""
    raise NotEnoughMemory(
        field="serving.kv_cache",
        value=format_bytes(sizes.kv_cache_bytes),
        problem=f"holds {num_tokens} tokens, and one sequence may have {wanted}"
        if num_tokens
        else f"holds no block: one of {block_size} tokens takes {format_bytes(block_bytes)}",
        fix=f"{fix}{lower}.",
    )


def _place(
    sizes: _Sizes,
    layout: ReplicaLayout,
    parts: _Parts,
    devices: Sequence[tuple[NodeSpec, DeviceSpec]],
    smallest_blocks: int,
) -> list[list[Placed]]:
    """Puts the ranks of a replica on their devices, by stage."""
    num_blocks = sizes.num_blocks(parts)
    setting_bytes = num_blocks * sizes.largest_block_bytes(parts)

    def place(device: int, part: Part, *, num_ranks: int, leads: bool) -> Placed:
        node, spec = devices[device]
        return Placed(
            node=node,
            device=spec,
            part=part,
            num_blocks=num_blocks,
            need=sizes.footprint(
                part, num_blocks=num_blocks, on_cpu=spec.kind == "cpu", num_ranks=num_ranks, leads=leads
            ),
            smallest_kv_bytes=smallest_blocks * sizes.block_bytes(part),
            setting_bytes=setting_bytes,
        )

    return [
        [
            place(device, part, num_ranks=len(stage_parts), leads=stage_index == index == 0)
            for index, (device, part) in enumerate(zip(stage.devices, stage_parts, strict=True))
        ]
        for stage_index, (stage, stage_parts) in enumerate(zip(layout.stages, parts, strict=True))
    ]


def _replica(index: int, placed: Sequence[Sequence[Placed]], limits: ReplicaLimits) -> Replica:
    stages: list[Stage] = []
    rank = 0
    for ranks in placed:
        shards = tuple(_shard(rank + index, shard) for index, shard in enumerate(ranks))
        stages.append(Stage(layers=ranks[0].part.layers, shards=shards))
        rank += len(shards)
    return Replica(name=f"replica-{index}", stages=tuple(stages), limits=limits)


def _shard(rank: int, placed: Placed) -> Shard:
    return Shard(
        rank=rank,
        node=placed.node.name,
        device=placed.device,
        part=placed.part,
        num_blocks=placed.num_blocks,
        weight_bytes=placed.need.weight_bytes,
        kv_bytes=placed.need.kv_bytes,
        workspace_bytes=placed.need.workspace_bytes,
    )
