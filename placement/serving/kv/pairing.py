"""Checks that the replicas of a plan can send each other keys and values."""

from placement.errors import InvalidConfig, InvalidRequest
from placement.model.part import Part
from placement.planning.plan import Plan
from placement.serving.kv.rectangles import transfer_plan


def check_exchange(plan: Plan) -> None:
    """Checks that each replica holds every key and value of a sequence, as whoever sends or takes them must.

    Replicas may differ in all else: their shares, stages, stripes, block sizes and number types.

    Raises:
        InvalidConfig: some are held by no rank of a replica.
    """
    for index, replica in enumerate(plan.replicas):
        parts = [shard.part for shard in replica.shards]
        try:
            transfer_plan(parts, [Part.whole(plan.model)], replica.limits.block_size)
        except InvalidRequest as error:
            raise InvalidConfig(
                field=f"serving.parallelism.replicas[{index}]",
                value=replica.name,
                problem=f"cannot exchange keys and values with other replicas: {error.problem}",
                fix="Cut it so that its ranks hold all layers and KV heads, or set serving.disaggregation to never.",
            ) from error
