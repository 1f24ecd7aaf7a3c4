"""Judges a plan with attention workers against the one without them, by what is measured or assumed of devices.

Where it is refused the attention workers would stay idle, so the alternative is the model workers alone. Attention is
expected to read keys and values as fast as products read weights, as both are limited by the memory.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from placement.measured.speed import DeviceSpeed
from placement.model.layers import Gqa
from placement.model.specs import DeviceSpec, DType
from placement.planning.plan import Plan, Replica
from placement.planning.residency import Partition
from placement.serving.offload.choice import AttentionWorker, PartitionChoice, choose_partition, typical_shares
from placement.serving.offload.gate import ModelDevices, Offload, judge
from placement.serving.offload.rotation import MOST_MICRO_BATCHES
from placement.serving.offload.verdict import Verdict
from placement.serving.offload.work import DecodeWork

SpeedOf = Callable[[DeviceSpec], DeviceSpeed]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What is known, or assumed, of the devices and links of a deployment.

    Attributes:
        speed_of: returns the speed of a device.
        link_bytes_per_s: bytes that each network interface carries in a second, both ways together.
        round_trip_s: the least seconds from a query to its answer, with no attention between.
    """

    speed_of: SpeedOf
    link_bytes_per_s: float
    round_trip_s: float


def tenants(plan: Plan) -> tuple[Replica, ...]:
    """Lists the replicas whose keys and values attention workers hold."""
    return tuple(replica for replica in plan.replicas if replica.residency is not None)


def typical_context(most_tokens: int, asked: int | None) -> int:
    """Returns the tokens of a typical sequence, where one may have ``most_tokens``: as asked for, or half of those."""
    return min(asked, most_tokens) if asked else max(1, most_tokens // 2)


def suitable_partition(
    devices: Sequence[DeviceSpec],
    rates: Rates,
    attention: Gqa,
    dtype: DType,
    contexts: Sequence[int],
    *,
    block_size: int,
    asked: Partition | None,
) -> PartitionChoice:
    """Chooses how attention is divided among attention workers on these devices, for sequences with such contexts."""
    workers = [
        AttentionWorker(
            kv_bytes_per_s=rates.speed_of(device).weight_bytes_per_s,
            link_bytes_per_s=rates.link_bytes_per_s,
            kv_cache_bytes=0,
        )
        for device in devices
    ]
    return choose_partition(workers, attention, dtype, contexts, block_size=block_size, asked=asked)


def judge_plan(plan: Plan, alone: Plan | None, rates: Rates, *, partition: Partition, context: int) -> Verdict:
    """Decides whether a plan with attention workers is better than one without.

    Args:
        alone: the model workers without attention workers; None: they cannot serve so.
        context: the tokens of a typical sequence.
    """
    served = tenants(plan)
    replica = served[0]
    work = DecodeWork.of(plan.model, replica.dtype)
    workers = _workers(plan, rates)
    shares, wire_bytes = typical_shares(
        partition,
        workers,
        plan.model.layers[0].attention,
        replica.dtype,
        context,
        block_size=replica.limits.block_size,
    )
    count = min(len(served), MOST_MICRO_BATCHES - 1)
    offload = Offload(
        model=_devices(replica, work, rates),
        workers=workers,
        shares=shares,
        wire_bytes=wire_bytes,
        round_trip_s=rates.round_trip_s,
        num_replicas=count,
    )
    without = [] if alone is None else [it for it in alone.replicas if it.name in {each.name for each in served}]
    return judge(
        work,
        without=_devices(without[0] if without else None, work, rates, like=replica, num_replicas=count),
        offload=offload,
        context=context,
        most_sequences=count * replica.limits.max_num_seqs,
    )


def _workers(plan: Plan, rates: Rates) -> tuple[AttentionWorker, ...]:
    return tuple(
        AttentionWorker(
            kv_bytes_per_s=rates.speed_of(shard.device).weight_bytes_per_s,
            link_bytes_per_s=rates.link_bytes_per_s,
            kv_cache_bytes=shard.kv_bytes,
        )
        for shard in plan.attention
    )


def _devices(
    replica: Replica | None, work: DecodeWork, rates: Rates, *, like: Replica | None = None, num_replicas: int = 1
) -> ModelDevices:
    """Describes the devices of a replica, or of several alike, whose weights fit; without a replica no KV does."""
    shards = (replica or like or _nobody()).shards
    speeds = [rates.speed_of(shard.device) for shard in shards]
    held = sum(shard.weight_bytes for shard in shards)
    # Weights that are rounded take less to read than numbers of the model's type.
    read_per_s = sum(speed.weight_bytes_per_s for speed in speeds)
    kv_bytes = 0 if replica is None else sum(shard.kv_bytes for shard in shards)
    return ModelDevices(
        memory_bytes=work.weight_bytes + num_replicas * kv_bytes,
        weight_bytes_per_s=num_replicas * read_per_s * work.weight_bytes / max(1, held),
        flops_per_s=num_replicas * sum(speed.flops_per_s for speed in speeds),
        kv_bytes_per_s=num_replicas * read_per_s,
        links_bytes_per_s=(rates.link_bytes_per_s,) * len(shards),
    )


def _nobody() -> Replica:
    raise AssertionError("a replica, or one like it")
