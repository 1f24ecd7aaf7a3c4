"""Converts where keys and values are to the message of a load, and back. Pure."""

from collections.abc import Sequence

from placement.errors import InvalidRequest
from placement.model.part import Span
from placement.model.specs import ModelSpec
from placement.model.striping import Stripe
from placement.planning.residency import Holder, Region, Residency
from protos.heterodyne.worker.v1 import worker_pb2 as pb

SECRET_BYTES = 32


def residency_message(residency: Residency, workers: Sequence[pb.AttentionWorker]) -> pb.KvResidency:
    """Returns the message of a residency, whose attention workers listen where ``workers`` say."""
    return pb.KvResidency(
        workers=workers,
        regions=[
            pb.KvRegion(blocks=_range(region.blocks), holders=[_holder_message(holder) for holder in region.holders])
            for region in residency.regions
        ],
    )


def _holder_message(holder: Holder) -> pb.KvHolder:
    stripe = holder.stripe
    return pb.KvHolder(
        worker=holder.worker,
        kv_heads=_range(holder.kv_heads),
        slots=None if stripe is None else pb.Range(start=stripe.start, stop=stripe.stop),
    )


def _range(span: Span) -> pb.Range:
    return pb.Range(start=span.start, stop=span.stop)


def read_residency(message: pb.KvResidency, model: ModelSpec, *, num_blocks: int, block_size: int) -> Residency:
    """Returns where the keys and values of ``num_blocks`` blocks are.

    Raises:
        InvalidRequest: the regions are not all of the blocks, or a region's holders are not all of each block.
    """
    if len(message.secret) != SECRET_BYTES:
        raise _refusal("secret", f"{len(message.secret)} bytes", f"is not one of {SECRET_BYTES} bytes")
    for index, worker in enumerate(message.workers):
        if not worker.host or not 0 < worker.port < 1 << 16:
            raise _refusal(f"workers[{index}]", f"{worker.host}:{worker.port}", "is no address")
    regions = tuple(
        _region(region, model, block_size, len(message.workers), f"regions[{index}]")
        for index, region in enumerate(message.regions)
    )
    stops = [0, *(region.blocks.stop for region in regions)]
    follow = all(
        region.blocks.start == stop and len(region.blocks) for region, stop in zip(regions, stops, strict=False)
    )
    if not regions or not follow or stops[-1] != num_blocks or any(region.is_local for region in regions[1:]):
        raise _refusal("regions", [str(region.blocks) for region in regions], f"are not all of {num_blocks} blocks")
    return Residency(regions=regions)


def _region(message: pb.KvRegion, model: ModelSpec, block_size: int, num_workers: int, field: str) -> Region:
    blocks = _span(message.blocks, f"{field}.blocks", 1 << 31)
    holders = tuple(
        _holder(holder, model, block_size, num_workers, f"{field}.holders[{index}]")
        for index, holder in enumerate(message.holders)
    )
    # Each head of each slot must be somewhere, and at one place alone.
    held = sum(len(holder.kv_heads) * holder.slots_per_block(block_size) for holder in holders)
    cells = {
        (head, slot)
        for holder in holders
        for head in range(holder.kv_heads.start, holder.kv_heads.stop)
        for slot in _slots(holder, block_size)
    }
    if holders and not held == len(cells) == model.num_kv_heads * block_size:
        raise _refusal(f"{field}.holders", held, "do not hold all KV heads of all slots, each once")
    return Region(blocks=blocks, holders=holders)


def _slots(holder: Holder, block_size: int) -> range:
    return range(block_size) if holder.stripe is None else range(holder.stripe.start, holder.stripe.stop)


def _holder(message: pb.KvHolder, model: ModelSpec, block_size: int, num_workers: int, field: str) -> Holder:
    if not 0 <= message.worker < num_workers:
        raise _refusal(f"{field}.worker", message.worker, f"is none of {num_workers} attention workers")
    stripe = None
    if message.HasField("slots"):
        slots = _span(message.slots, f"{field}.slots", block_size)
        stripe = Stripe(slots.start, slots.stop, block_size)
    heads = _span(message.kv_heads, f"{field}.kv_heads", model.num_kv_heads)
    return Holder(worker=message.worker, kv_heads=heads, stripe=stripe)


def _span(message: pb.Range, field: str, limit: int) -> Span:
    if not 0 <= message.start < message.stop <= limit:
        raise _refusal(field, (message.start, message.stop), f"is not a range within {limit}")
    return Span(message.start, message.stop)


def _refusal(field: str, value: object, problem: str) -> InvalidRequest:
    return InvalidRequest(
        field=f"residency.{field}", value=value, problem=problem, fix="Send the plan's own residency."
    )
