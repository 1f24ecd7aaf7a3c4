"""Converts what the ranks of a stage measured to messages of the worker protocol and back. Pure."""

from placement.measured.collectives import MeasuredSum
from placement.measured.exchange import ExchangeSpeeds, ExpectedExchange, MeasuredExchange
from placement.measured.measurements import StageMeasurements
from placement.measured.overlap import MeasuredOverlap
from protos.heterodyne.worker.v1 import worker_pb2 as pb


def read_measurements(message: pb.StageMeasurements) -> StageMeasurements:
    """Returns the measurements in a message."""
    return StageMeasurements(
        sums=tuple(
            MeasuredSum(num_bytes=row.num_bytes, algorithm=row.algorithm, duration_s=row.duration_s)
            for row in message.sums
        ),
        overlap=tuple(
            MeasuredOverlap(
                num_tokens=row.num_tokens,
                alone_s=row.alone_s,
                overlapped_s=row.overlapped_s,
                is_overlapped=row.is_overlapped,
            )
            for row in message.overlap
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
            ExpectedExchange(num_tokens=row.num_tokens, num_before=row.num_before, way=row.way, layer_s=row.layer_s)
            for row in message.expected
        ),
    )


def measured_message(measured: StageMeasurements) -> pb.StageMeasurements:
    """Returns the message of measurements."""
    return pb.StageMeasurements(
        sums=[
            pb.MeasuredSum(num_bytes=row.num_bytes, algorithm=row.algorithm, duration_s=row.duration_s)
            for row in measured.sums
        ],
        overlap=[
            pb.MeasuredOverlap(
                num_tokens=row.num_tokens,
                alone_s=row.alone_s,
                overlapped_s=row.overlapped_s,
                is_overlapped=row.is_overlapped,
            )
            for row in measured.overlap
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
            pb.ExpectedExchange(num_tokens=row.num_tokens, num_before=row.num_before, way=row.way, layer_s=row.layer_s)
            for row in measured.expected
        ],
    )
