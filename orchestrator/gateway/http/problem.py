"""Turns errors into HTTP statuses and the error objects of the OpenAI API. Pure."""

import math
from typing import Any

from orchestrator.gateway.errors import (
    ContextExceeded,
    DeadlineExceeded,
    Draining,
    Overloaded,
    QueueTimeout,
    ReplicaFault,
    ReplicaUnavailable,
    UnknownModel,
)
from placement.errors import FieldError, HeterodyneError

_INVALID, _SERVER = "invalid_request_error", "server_error"
# The status, the type and the code.
_KINDS: tuple[tuple[type[HeterodyneError], tuple[int, str, str | None]], ...] = (
    (UnknownModel, (404, _INVALID, "model_not_found")),
    (ContextExceeded, (400, _INVALID, "context_length_exceeded")),
    (FieldError, (400, _INVALID, None)),
    (Overloaded, (429, "rate_limit_error", "rate_limit_exceeded")),
    (QueueTimeout, (504, _SERVER, "timeout")),
    (DeadlineExceeded, (504, _SERVER, "timeout")),
    (Draining, (503, _SERVER, "unavailable")),
    (ReplicaUnavailable, (503, _SERVER, "unavailable")),
    (ReplicaFault, (500, _SERVER, None)),
)


class HttpError(HeterodyneError):
    """A request that is wrong as HTTP, before its body counts."""

    def __init__(self, status: int, message: str) -> None:
        self.status = status
        super().__init__(message)


def _kind_of(error: HeterodyneError) -> tuple[int, str, str | None]:
    if isinstance(error, HttpError):
        return error.status, _INVALID if error.status < 500 else _SERVER, None
    return next((kind for cls, kind in _KINDS if isinstance(error, cls)), (500, _SERVER, None))


def status_of(error: HeterodyneError) -> int:
    """Returns the HTTP status of an error."""
    return _kind_of(error)[0]


def problem_of(error: HeterodyneError) -> dict[str, Any]:
    """Returns the error object, which names the field where there is one."""
    _, kind, code = _kind_of(error)
    param = error.field if isinstance(error, FieldError) else None
    return {"error": {"message": str(error), "type": kind, "param": param, "code": code}}


def headers_of(error: HeterodyneError) -> dict[str, str]:
    """Returns the headers that say when to come back."""
    return {"retry-after": str(math.ceil(error.retry_after_s))} if isinstance(error, Overloaded) else {}
