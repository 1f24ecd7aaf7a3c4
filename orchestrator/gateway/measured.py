"""Writes what the ranks of a stage, or a leader, measured as messages of the Admin service. Pure."""

from protos.heterodyne.v1 import admin_pb2
from protos.heterodyne.worker.v1 import worker_pb2


def step_budget(budget: worker_pb2.StepBudget) -> admin_pb2.StepBudget:
    """Returns how large a replica's steps are, and how long they take."""
    return admin_pb2.StepBudget(
        token_budget=budget.token_budget,
        is_auto=budget.is_auto,
        expected_s=budget.expected_s,
        steps=[admin_pb2.MeasuredStep(num_tokens=step.num_tokens, duration_s=step.duration_s) for step in budget.steps],
    )


def sums(measured: worker_pb2.StageMeasurements) -> list[admin_pb2.MeasuredSum]:
    """Returns how long the ranks take to sum tensors."""
    return [
        admin_pb2.MeasuredSum(num_bytes=item.num_bytes, algorithm=item.algorithm, duration_s=item.duration_s)
        for item in measured.sums
    ]


def overlap(measured: worker_pb2.StageMeasurements) -> list[admin_pb2.MeasuredOverlap]:
    """Returns which steps the ranks compute in two micro-batches."""
    return [
        admin_pb2.MeasuredOverlap(
            num_tokens=item.num_tokens,
            alone_s=item.alone_s,
            overlapped_s=item.overlapped_s,
            is_overlapped=item.is_overlapped,
        )
        for item in measured.overlap
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
