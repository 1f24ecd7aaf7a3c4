"""Writes what the ranks of a stage measured as messages of the Admin service. Pure."""

from protos.heterodyne.v1 import admin_pb2
from protos.heterodyne.worker.v1 import worker_pb2


def sums(measured: worker_pb2.StageMeasurements) -> list[admin_pb2.MeasuredSum]:
    """Returns how long the ranks take to sum tensors."""
    return [
        admin_pb2.MeasuredSum(num_bytes=item.num_bytes, algorithm=item.algorithm, duration_s=item.duration_s)
        for item in measured.sums
    ]


def lanes(measured: worker_pb2.StageMeasurements) -> list[admin_pb2.MeasuredLanes]:
    """Returns which steps the ranks compute in two lanes."""
    return [
        admin_pb2.MeasuredLanes(
            num_tokens=item.num_tokens, alone_s=item.alone_s, woven_s=item.woven_s, is_woven=item.is_woven
        )
        for item in measured.lanes
    ]


def exchange(measured: worker_pb2.StageMeasurements) -> admin_pb2.MeasuredExchange | None:
    """Returns how the ranks share sequences, or None where they do not."""
    if not measured.HasField("exchange"):
        return None
    message = measured.exchange
    return admin_pb2.MeasuredExchange(
        latency_s=message.latency_s,
        bytes_per_s=message.bytes_per_s,
        pairs_per_s=message.pairs_per_s,
        call_s=message.call_s,
        expected=[
            admin_pb2.ExpectedExchange(
                num_tokens=item.num_tokens, num_before=item.num_before, way=item.way, layer_s=item.layer_s
            )
            for item in message.expected
        ],
    )
