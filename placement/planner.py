"""Where weights go. Owns the plan, and the proof that it fits in memory.

In this version each device holds a whole replica: one stage, one shard.
"""

import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from placement.errors import InvalidConfig, NotEnoughMemory
from placement.memory import (
    Footprint,
    footprint,
    format_bytes,
    kv_bytes_per_block,
    num_blocks_for,
    num_blocks_of,
    size_setting,
)
from placement.plan import Plan, Replica, Shard, Span, Stage
from placement.quantization import LinearFormat, check_linear_format
from placement.specs import ClusterSpec, DeviceSpec, DType, ModelSpec, NodeSpec
from placement.weights import whole_model


@dataclass(frozen=True, slots=True, kw_only=True)
class _Blocks:
    """The KV blocks of a rank.

    Attributes:
        smallest_bytes: the least ``serving.kv_cache`` that would do.
    """

    num_blocks: int
    kv_bytes: int
    context_tokens: int
    smallest_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rank:
    """A whole model on a device, and what it takes there."""

    node: NodeSpec
    device: DeviceSpec
    need: Footprint


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
) -> Plan:
    """One replica on each device of the cluster, ``replica-0`` onwards in the order of nodes and devices.

    ``plan.model.max_context_tokens`` is the context that is served: ``max_context_tokens`` where it is given.
    Where it is None, the model's own, or what the KV blocks hold where that is less: a small cache then
    serves shorter requests instead of none, as long as it holds one block.

    Args:
        kv_cache_bytes: memory for KV blocks on each rank; whole blocks of it are used.
        unmeasured: (node, device) pairs whose memory is not known yet, and so is not checked here: the worker
            checks when it loads.
        linear: how the weights of linear layers are held; None: as all else, in ``dtype``.

    Raises:
        InvalidConfig: ``max_context_tokens`` is more than the model knows, or its layers cannot be rounded.
        InvalidModel: the sizes of a GPTQ checkpoint contradict each other.
        NotEnoughMemory: the KV blocks hold too little, a rank does not fit in its device, or the ranks of a
            node together do not fit in the node.
    """
    check_linear_format(whole_model(model), linear)
    blocks = _blocks(model, dtype, block_size, kv_cache_bytes, max_context_tokens)
    ranks = _ranks(model, cluster, dtype, linear, blocks.kv_bytes, max_num_seqs, token_budget)
    _check_memory([rank for rank in ranks if (rank.node.name, rank.device.name) not in unmeasured], blocks)
    replicas = tuple(_whole_replica(index, model, rank, blocks) for index, rank in enumerate(ranks))
    served = dataclasses.replace(model, max_context_tokens=blocks.context_tokens)
    return Plan(model=served, dtype=dtype, block_size=block_size, replicas=replicas)


def _ranks(
    model: ModelSpec,
    cluster: ClusterSpec,
    dtype: DType,
    linear: LinearFormat | None,
    kv_bytes: int,
    max_num_seqs: int,
    token_budget: int,
) -> list[_Rank]:
    """One rank a device, in the order of nodes and devices."""

    def need(device: DeviceSpec) -> Footprint:
        return footprint(
            model,
            whole_model(model),
            dtype=dtype,
            kv_bytes=kv_bytes,
            max_num_seqs=max_num_seqs,
            token_budget=token_budget,
            on_cpu=device.kind == "cpu",
            linear=linear,
        )

    return [_Rank(node=node, device=device, need=need(device)) for node in cluster.nodes for device in node.devices]


def _blocks(
    model: ModelSpec, dtype: DType, block_size: int, kv_cache_bytes: int, max_context_tokens: int | None
) -> _Blocks:
    if max_context_tokens is not None and max_context_tokens > model.max_context_tokens:
        raise InvalidConfig(
            field="model.max_context_tokens",
            value=max_context_tokens,
            problem=f"is more than the {model.max_context_tokens} tokens that the model was made for",
            fix=f"Set it to {model.max_context_tokens} or less.",
        )
    block_bytes = kv_bytes_per_block(
        model,
        dtype=dtype,
        block_size=block_size,
        layers=Span(0, model.num_layers),
        kv_heads=Span(0, model.num_kv_heads),
    )
    num_blocks = num_blocks_for(kv_cache_bytes, bytes_per_block=block_bytes)
    num_tokens = num_blocks * block_size
    wanted = max_context_tokens or min(model.max_context_tokens, max(num_tokens, 1))
    smallest = num_blocks_of(wanted, block_size=block_size) * block_bytes
    if num_tokens < wanted:
        fix = f"Set serving.kv_cache to {size_setting(smallest, round_up=True)} or more"
        lower = f", or model.max_context_tokens to {num_tokens} or less" if num_tokens else ""
        raise NotEnoughMemory(
            field="serving.kv_cache",
            value=format_bytes(kv_cache_bytes),
            problem=f"holds {num_tokens} tokens, and one sequence may have {wanted}"
            if num_tokens
            else f"holds no block: one of {block_size} tokens takes {format_bytes(block_bytes)}",
            fix=f"{fix}{lower}.",
        )
    return _Blocks(
        num_blocks=num_blocks,
        kv_bytes=num_blocks * block_bytes,
        context_tokens=wanted,
        smallest_bytes=smallest if max_context_tokens else block_bytes,
    )


def _check_memory(ranks: Sequence[_Rank], blocks: _Blocks) -> None:
    """Each rank in its device, then those on CPUs together in their node. Raises NotEnoughMemory."""
    for rank in ranks:
        where = f"{rank.device.name} of node {rank.node.name}"
        _check_fits([rank.need], rank.device.memory_bytes, blocks.smallest_bytes, where)
    on_cpu = [rank for rank in ranks if rank.device.kind == "cpu"]
    for node in {rank.node.name: rank.node for rank in on_cpu}.values():
        needs = [rank.need for rank in on_cpu if rank.node.name == node.name]
        _check_fits(needs, node.memory_bytes, blocks.smallest_bytes, f"node {node.name}")


def _check_fits(needs: list[Footprint], memory_bytes: int, smallest_kv_bytes: int, where: str) -> None:
    """Whether the ranks together fit in ``memory_bytes``; the error names what would.

    Raises:
        NotEnoughMemory: of ``serving.kv_cache`` where smaller KV caches would fit, else of ``model.path``.
    """
    total = sum(need.total_bytes for need in needs)
    if total <= memory_bytes:
        return
    count = len(needs)
    kv_room = (memory_bytes - sum(need.total_bytes - need.kv_bytes for need in needs)) // count
    ranks = "1 worker needs" if count == 1 else f"{count} workers need"
    shape = f"{needs[0]}" if count == 1 else f"{needs[0]}, each"
    problem = f"{ranks} {format_bytes(total)} ({shape}), and {where} has {format_bytes(memory_bytes)}"
    if kv_room >= smallest_kv_bytes:
        raise NotEnoughMemory(
            field="serving.kv_cache",
            value=format_bytes(needs[0].kv_bytes),
            problem=problem,
            fix=f"Set serving.kv_cache to {size_setting(kv_room, round_up=False)} or less.",
        )
    least = max(need.total_bytes - need.kv_bytes for need in needs) + smallest_kv_bytes
    can_run = memory_bytes // least
    first = f"Run {can_run} of them there" if count > 1 and can_run else "Free memory"
    enough = size_setting(least, round_up=True)
    raise NotEnoughMemory(
        field="model.path",
        value=format_bytes(needs[0].weight_bytes),
        problem=problem,
        fix=f"{first}, use a smaller model, or give each worker {enough} or more.",
    )


def _whole_replica(index: int, model: ModelSpec, rank: _Rank, blocks: _Blocks) -> Replica:
    layers = Span(0, model.num_layers)
    shard = Shard(
        rank=0,
        node=rank.node.name,
        device=rank.device,
        layers=layers,
        kv_heads=Span(0, model.num_kv_heads),
        ffn_columns=Span(0, model.ffn_size),
        vocab_rows=Span(0, model.vocab_size),
        num_blocks=blocks.num_blocks,
        weight_bytes=rank.need.weight_bytes,
        kv_bytes=blocks.kv_bytes,
    )
    return Replica(name=f"replica-{index}", stages=(Stage(layers=layers, shards=(shard,)),))
