"""What the ranks of a stage measured, as messages of the worker protocol. Pure."""

from placement.measured.collectives import MeasuredSum
from placement.measured.exchange import ExchangeSpeeds, ExpectedExchange, MeasuredExchange
from placement.measured.measurements import StageMeasurements
from placement.measured.overlap import MeasuredOverlap
from protos.heterodyne.worker.v1 import worker_pb2 as pb


def read_measurements(message: pb.StageMeasurements) -> StageMeasurements:
    """The measurements in a message."""
    return StageMeasurements(
        sums=tuple(
            MeasuredSum(num_bytes=it.num_bytes, algorithm=it.algorithm, duration_s=it.duration_s) for it in message.sums
        ),
        overlap=tuple(
            MeasuredOverlap(
                num_tokens=step.num_tokens,
                alone_s=step.alone_s,
                overlapped_s=step.woven_s,
                is_overlapped=step.is_woven,
            )
            for step in message.lanes
        ),
        exchange=_exchange(message.exchange) if message.HasField("exchange") else None,
    )


def _exchange(message: pb.MeasuredExchange) -> MeasuredExchange:
    return MeasuredExchange(
        speeds=ExchangeSpeeds(
            latency_s=message.latency_s,
            bytes_per_s=message.bytes_per_s,
            pairs_per_s=tuple(message.pairs_per_s),
            call_s=message.call_s,
        ),
        expected=tuple(
            ExpectedExchange(num_tokens=it.num_tokens, num_before=it.num_before, way=it.way, layer_s=it.layer_s)
            for it in message.expected
        ),
    )


def measured_message(measured: StageMeasurements) -> pb.StageMeasurements:
    """The message of what was measured."""
    return pb.StageMeasurements(
        sums=[
            pb.MeasuredSum(num_bytes=it.num_bytes, algorithm=it.algorithm, duration_s=it.duration_s)
            for it in measured.sums
        ],
        lanes=[
            pb.MeasuredLanes(
                num_tokens=step.num_tokens,
                alone_s=step.alone_s,
                woven_s=step.overlapped_s,
                is_woven=step.is_overlapped,
            )
            for step in measured.overlap
        ],
        exchange=None if measured.exchange is None else _exchange_message(measured.exchange),
    )


def _exchange_message(measured: MeasuredExchange) -> pb.MeasuredExchange:
    speeds = measured.speeds
    return pb.MeasuredExchange(
        latency_s=speeds.latency_s,
        bytes_per_s=speeds.bytes_per_s,
        pairs_per_s=speeds.pairs_per_s,
        call_s=speeds.call_s,
        expected=[
            pb.ExpectedExchange(num_tokens=it.num_tokens, num_before=it.num_before, way=it.way, layer_s=it.layer_s)
            for it in measured.expected
        ],
    )
