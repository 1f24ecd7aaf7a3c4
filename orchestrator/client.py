"""Owns the client's side of the public service, as the command line uses it: blocking, errors in one line."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from orchestrator.errors import ServiceError
from protos.heterodyne.v1 import admin_pb2, admin_pb2_grpc, inference_pb2, inference_pb2_grpc

SERVICE = "heterodyne.v1.Inference"
_OPTIONS = (
    ("grpc.enable_http_proxy", 0),
    ("grpc.max_receive_message_length", 64 * 2**20),
    # A service that is starting is noticed soon: gRPC's own pause grows to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
)
_RETRY_PAUSE_S = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateResult:
    """A finished answer."""

    text: str
    accepted: inference_pb2.Accepted
    finished: inference_pb2.Finished


def stream_generate(
    address: str,
    request: inference_pb2.GenerateRequest,
    *,
    timeout_s: float,
    on_text: Callable[[str], None] = lambda text: None,
) -> GenerateResult:
    """Runs one request; ``on_text`` gets each piece of text as it comes. Leaving early cancels the request.

    Raises:
        ServiceError: refused, failed, not done within ``timeout_s``, or answered against the protocol.
    """
    with _channel(address) as channel, _one_line_errors(address):
        # Closing the channel cancels what still runs on it.
        call = inference_pb2_grpc.InferenceStub(channel).Generate(request, timeout=timeout_s)
        return _read_answer(call, on_text)


def fetch_status(address: str, *, timeout_s: float = 5.0) -> admin_pb2.GetStatusResponse:
    """Who holds what, in which state.

    Raises:
        ServiceError: refused, unreachable, or no answer within ``timeout_s``.
    """
    with _channel(address) as channel, _one_line_errors(address):
        return admin_pb2_grpc.AdminStub(channel).GetStatus(admin_pb2.GetStatusRequest(), timeout=timeout_s)


def wait_serving(address: str, *, timeout_s: float, service: str = SERVICE) -> None:
    """Returns once the service says that it serves; it need not be listening yet.

    Raises:
        ServiceError: ``DEADLINE_EXCEEDED`` after ``timeout_s``, with what was seen last; or another status,
            which waiting does not mend.
    """
    deadline, last_seen = time.monotonic() + timeout_s, "unreachable"
    request = health_pb2.HealthCheckRequest(service=service)
    with _channel(address) as channel, _one_line_errors(address):
        stub = health_pb2_grpc.HealthStub(channel)
        while (left_s := deadline - time.monotonic()) > 0:
            try:
                for response in stub.Watch(request, timeout=left_s, wait_for_ready=True):
                    if response.status == health_pb2.HealthCheckResponse.SERVING:
                        return
                    last_seen = health_pb2.HealthCheckResponse.ServingStatus.Name(response.status)
            except grpc.RpcError as error:
                if error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                    raise
                last_seen = last_seen if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED else "unreachable"
            time.sleep(min(_RETRY_PAUSE_S, max(0.0, deadline - time.monotonic())))
    message = f"{service} at {address} did not serve within {timeout_s:g} s (last seen: {last_seen})"
    raise ServiceError(code="DEADLINE_EXCEEDED", message=message)


def _read_answer(call: Iterator[inference_pb2.GenerateResponse], on_text: Callable[[str], None]) -> GenerateResult:
    """Accepted, chunks without gap or repeat, Finished: anything else is an error."""
    accepted: inference_pb2.Accepted | None = None
    texts: list[str] = []
    num_tokens = 0
    for response in call:
        event = response.WhichOneof("event")
        if event == "accepted" and accepted is None:
            accepted = response.accepted
        elif event == "chunk" and accepted is not None:
            if response.chunk.first_index != num_tokens:
                raise _broken(f"token {num_tokens} was due and token {response.chunk.first_index} came")
            num_tokens += len(response.chunk.tokens)
            texts.append(response.chunk.text)
            on_text(response.chunk.text)
        elif event == "finished" and accepted is not None:
            finished = response.finished
            if finished.WhichOneof("outcome") == "error":
                raise ServiceError(code=_code_name(finished.error.code), message=finished.error.message)
            if next(call, None) is not None:
                raise _broken("a message came after the last one")
            return GenerateResult(text="".join(texts), accepted=accepted, finished=finished)
        else:
            raise _broken(f"{event or 'an unknown message'} came out of order")
    raise _broken("the answer ended without its last message")


def _broken(what: str) -> ServiceError:
    return ServiceError(code="DATA_LOSS", message=what)


def _code_name(number: int) -> str:
    names = {code.value[0]: code.name for code in grpc.StatusCode}
    return names.get(number, f"status {number}")


def _channel(address: str) -> grpc.Channel:
    return grpc.insecure_channel(address, options=_OPTIONS)


@contextmanager
def _one_line_errors(address: str) -> Iterator[None]:
    try:
        yield
    except grpc.RpcError as error:
        raise _service_error(error, address) from None


def _service_error(error: grpc.RpcError, address: str) -> ServiceError:
    """The status and its google.rpc details: field violations, and when to try again."""
    code, message = error.code(), error.details() or "no reason was given"
    if code is grpc.StatusCode.UNAVAILABLE and message.startswith("failed to connect"):
        message = f"nothing answers at {address}"
    violations: list[tuple[str, str]] = []
    retry_after_s: float | None = None
    try:
        status = rpc_status.from_call(error)
        for detail in status.details if status is not None else ():
            bad_request, retry = error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
            if detail.Unpack(bad_request):
                violations += [(item.field, item.description) for item in bad_request.field_violations]
            elif detail.Unpack(retry):
                retry_after_s = retry.retry_delay.ToTimedelta().total_seconds()
    except (ValueError, DecodeError):
        pass  # details that contradict the status are dropped; the status itself stands
    return ServiceError(code=code.name, message=message, violations=tuple(violations), retry_after_s=retry_after_s)
