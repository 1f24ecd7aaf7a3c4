"""What the ranks of a stage measured, from the control protocol's messages to those of the Admin service. Pure."""

from protos.heterodyne.v1 import admin_pb2
from protos.heterodyne.worker.v1 import worker_pb2


def sums(measured: worker_pb2.StageMeasurements) -> list[admin_pb2.MeasuredSum]:
    """How they sum tensors."""
    return [
        admin_pb2.MeasuredSum(num_bytes=it.num_bytes, algorithm=it.algorithm, duration_s=it.duration_s)
        for it in measured.sums
    ]


def lanes(measured: worker_pb2.StageMeasurements) -> list[admin_pb2.MeasuredLanes]:
    """Which steps they compute in two lanes."""
    return [
        admin_pb2.MeasuredLanes(num_tokens=it.num_tokens, alone_s=it.alone_s, woven_s=it.woven_s, is_woven=it.is_woven)
        for it in measured.lanes
    ]


def exchange(measured: worker_pb2.StageMeasurements) -> admin_pb2.MeasuredExchange | None:
    """How they share sequences, where they do."""
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
                num_tokens=it.num_tokens, num_before=it.num_before, way=it.way, layer_s=it.layer_s
            )
            for it in message.expected
        ],
    )
