"""Where weights go. Owns the plan, and the proof that it fits in memory."""

import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from placement.errors import InvalidConfig, NotEnoughMemory
from placement.model.part import Part, Span
from placement.model.quantization import LinearFormat, check_linear_format
from placement.model.specs import ClusterSpec, DeviceSpec, DType, ModelSpec, NodeSpec
from placement.model.weights import shard_tensors
from placement.planning.fitting import Placed, check_memory
from placement.planning.layout import ReplicaLayout, cut, one_each
from placement.planning.memory import (
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
    """What all ranks are sized by: see :func:`plan_replicas`."""

    model: ModelSpec
    dtype: DType
    block_size: int
    kv_cache_bytes: int
    max_num_seqs: int
    token_budget: int
    linear: LinearFormat | None

    def block_bytes(self, part: Part) -> int:
        """Of one KV block on a rank."""
        return kv_bytes_per_block(self.model, part, dtype=self.dtype, block_size=self.block_size)

    def num_blocks(self, parts: _Parts) -> int:
        """KV blocks of a replica: as many as the rank with the largest ones has room for."""
        return num_blocks_for(self.kv_cache_bytes, bytes_per_block=self.largest_block_bytes(parts))

    def largest_block_bytes(self, parts: _Parts) -> int:
        """Of the rank that a block takes most of."""
        return max(self.block_bytes(part) for stage in parts for part in stage)


def plan_replicas(
    model: ModelSpec,
    cluster: ClusterSpec,
    *,
    dtype: DType,
    block_size: int,
    kv_cache_bytes: int,
    max_context_tokens: int | None,
    max_num_seqs: int,
    token_budget: int,
    unmeasured: Collection[tuple[str, str]] = (),
    linear: LinearFormat | None = None,
    layouts: Sequence[ReplicaLayout] | None = None,
) -> Plan:
    """The replicas ``replica-0`` onwards, as ``layouts`` say; None: one on each device, in the order of nodes and
    devices.

    ``plan.model.max_context_tokens`` is the context that is served: ``max_context_tokens`` where it is given.
    Where it is None, the model's own, or what the KV blocks hold where that is less: a small cache then
    serves shorter requests instead of none, as long as it holds one block.

    Args:
        kv_cache_bytes: the most memory for KV blocks on a rank; whole blocks of it are used. The ranks of a replica
            have as many blocks each, and those with fewer layers or KV heads take less memory for them.
        unmeasured: (node, device) pairs whose memory is not known yet, and so is not checked here: the worker
            checks when it loads.
        linear: how the weights of linear layers are held; None: as all else, in ``dtype``.

    Raises:
        InvalidConfig: ``max_context_tokens`` is more than the model knows, its layers cannot be rounded, or it cannot
            be cut as a layout says.
        InvalidModel: the sizes of a GPTQ checkpoint contradict each other, or it cannot be cut so.
        NotEnoughMemory: the KV blocks hold too little, a rank does not fit in its device, or the ranks of a
            node together do not fit in the node.
    """
    sizes = _Sizes(
        model=model,
        dtype=dtype,
        block_size=block_size,
        kv_cache_bytes=kv_cache_bytes,
        max_num_seqs=max_num_seqs,
        token_budget=token_budget,
        linear=linear,
    )
    check_linear_format(shard_tensors(model, Part.whole(model)), linear)
    asked = one_each(cluster) if layouts is None else layouts
    devices = [(node, device) for node in cluster.nodes for device in node.devices]
    parts = [
        cut(model, layout, linear, block_size=block_size, field=f"{LAYOUTS_FIELD}[{i}]")
        for i, layout in enumerate(asked)
    ]
    for its_parts in parts:
        for part in (part for stage in its_parts for part in stage):
            check_linear_format(shard_tensors(model, part), linear)
    context = _context(sizes, parts, max_context_tokens)
    smallest = num_blocks_of(context if max_context_tokens else 1, block_size=block_size)
    placed = [_place(sizes, layout, its, devices, smallest) for layout, its in zip(asked, parts, strict=True)]
    check_memory([rank for replica in placed for stage in replica for rank in stage], unmeasured)
    replicas = tuple(_replica(index, stages) for index, stages in enumerate(placed))
    served = dataclasses.replace(model, max_context_tokens=context)
    return Plan(model=served, dtype=dtype, block_size=block_size, replicas=replicas)


def _context(sizes: _Sizes, parts: Sequence[_Parts], asked: int | None) -> int:
    """The context that every replica serves."""
    model, block_size = sizes.model, sizes.block_size
    if asked is not None and asked > model.max_context_tokens:
        raise InvalidConfig(
            field="model.max_context_tokens",
            value=asked,
            problem=f"is more than the {model.max_context_tokens} tokens that the model was made for",
            fix=f"Set it to {model.max_context_tokens} or less.",
        )
    block_bytes = max(sizes.largest_block_bytes(its) for its in parts)
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
    """The ranks of a replica on their devices, by stage."""
    num_blocks = sizes.num_blocks(parts)

    def rank(device: int, part: Part, num_ranks: int, leads: bool) -> Placed:
        node, spec = devices[device]
        need = footprint(
            sizes.model,
            part,
            dtype=sizes.dtype,
            kv_bytes=num_blocks * sizes.block_bytes(part),
            max_num_seqs=sizes.max_num_seqs,
            token_budget=sizes.token_budget,
            on_cpu=spec.kind == "cpu",
            linear=sizes.linear,
            num_ranks=num_ranks,
            leads=leads,
        )
        smallest = smallest_blocks * sizes.block_bytes(part)
        return Placed(
            node=node,
            device=spec,
            part=part,
            num_blocks=num_blocks,
            need=need,
            smallest_kv_bytes=smallest,
            setting_bytes=num_blocks * sizes.largest_block_bytes(parts),
        )

    return [
        [
            rank(device, part, len(its_parts), leads=stage_index == at == 0)
            for at, (device, part) in enumerate(zip(stage.devices, its_parts, strict=True))
        ]
        for stage_index, (stage, its_parts) in enumerate(zip(layout.stages, parts, strict=True))
    ]


def _replica(index: int, placed: Sequence[Sequence[Placed]]) -> Replica:
    stages: list[Stage] = []
    rank = 0
    for ranks in placed:
        shards: list[Shard] = []
        for one in ranks:
            shards.append(_shard(rank, one))
            rank += 1
        layers: Span = ranks[0].part.layers
        stages.append(Stage(layers=layers, shards=tuple(shards)))
    return Replica(name=f"replica-{index}", stages=tuple(stages))


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
