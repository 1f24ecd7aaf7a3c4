"""Turns errors into gRPC statuses, with google.rpc details where a client can act on them."""

import math
from typing import Any, NoReturn

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from orchestrator.gateway.errors import (
    ClientTooSlow,
    DeadlineExceeded,
    Draining,
    Overloaded,
    QueueTimeout,
    ReplicaFault,
    ReplicaUnavailable,
    UnknownModel,
)
from placement.errors import FieldError, HeterodyneError

_CODES: tuple[tuple[type[HeterodyneError], int], ...] = (
    (UnknownModel, code_pb2.NOT_FOUND),
    (FieldError, code_pb2.INVALID_ARGUMENT),
    (Overloaded, code_pb2.RESOURCE_EXHAUSTED),
    (QueueTimeout, code_pb2.DEADLINE_EXCEEDED),
    (DeadlineExceeded, code_pb2.DEADLINE_EXCEEDED),
    (ClientTooSlow, code_pb2.RESOURCE_EXHAUSTED),
    (Draining, code_pb2.UNAVAILABLE),
    (ReplicaUnavailable, code_pb2.UNAVAILABLE),
    (ReplicaFault, code_pb2.INTERNAL),
)


def code_of(error: HeterodyneError) -> int:
    """Returns the google.rpc.Code of an error."""
    return next((code for kind, code in _CODES if isinstance(error, kind)), code_pb2.INTERNAL)


def status_of(error: HeterodyneError) -> status_pb2.Status:
    """Returns the google.rpc.Status of an error: BadRequest names the field, RetryInfo says when to come back."""
    details = []
    if isinstance(error, FieldError):
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=error.field, description=f"{error.problem}. {error.fix}"
        )
        details.append(_any(error_details_pb2.BadRequest(field_violations=[violation])))
    if isinstance(error, Overloaded):
        delay = duration_pb2.Duration(seconds=math.ceil(error.retry_after_s))
        details.append(_any(error_details_pb2.RetryInfo(retry_delay=delay)))
    return status_pb2.Status(code=code_of(error), message=str(error), details=details)


def _any(message: error_details_pb2.BadRequest | error_details_pb2.RetryInfo) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: HeterodyneError) -> NoReturn:
    """Ends the call with the error's status."""
    await context.abort_with_status(rpc_status.to_status(status_of(error)))
    raise AssertionError("abort returned")
