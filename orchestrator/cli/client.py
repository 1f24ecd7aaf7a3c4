"""Calls the public service for the command line; calls block, and errors are one line each."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from orchestrator.cli.reach import unreached
from orchestrator.errors import ServiceError
from protos.heterodyne.v1 import admin_pb2, admin_pb2_grpc, inference_pb2, inference_pb2_grpc

CHANNEL_OPTIONS = (
    ("grpc.enable_http_proxy", 0),
    ("grpc.max_receive_message_length", 64 * 2**20),
    # A service that is starting is noticed soon: gRPC's own pause grows to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
)
_RETRY_PAUSE_S = 0.1
_OVERDUE = grpc.StatusCode.DEADLINE_EXCEEDED.name
# How the words of a service's own limit name it; a deadline is the client's otherwise.
_SERVICE_LIMIT = "gateway.request_timeout_s"
# gRPC's words where the client's own clock ended the call, whatever the service was about to say.
_OWN_CLOCK = "Deadline Exceeded"
# How gRPC's words begin where there was no connection.
_NOT_CONNECTED = ("failed to connect", "errors resolving", "DNS resolution failed")
# A service that keeps a deadline may cut the stream off as much before the client's own clock says so.
_EARLY_S = 0.25
_CUT_OFF = (grpc.StatusCode.UNKNOWN, grpc.StatusCode.CANCELLED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Passage:
    """A run of tokens and its text."""

    text: str
    tokens: tuple[inference_pb2.Token, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateResult:
    """A finished answer.

    Attributes:
        choices: the choices, as many as were asked for.
        ends: how each of them ended.
        echo: the prompt, where it was asked for.
    """

    accepted: inference_pb2.Accepted
    finished: inference_pb2.Finished
    choices: tuple[Passage, ...]
    ends: tuple[inference_pb2.ChoiceEnd, ...]
    echo: Passage | None = None

    @property
    def text(self) -> str:
        """The text of the first choice."""
        return self.choices[0].text


def transfer_words(finished: inference_pb2.Finished) -> str:
    """Says what it took to send the keys and values of a prompt to the replica that answered; empty where none went."""
    if not finished.HasField("transfer"):
        return ""
    transfer = finished.transfer
    if not finished.HasField("prefill_replica"):
        return "another replica was to compute the prompt, and its keys and values did not come"
    return (
        f"prompt computed on {finished.prefill_replica} in {transfer.prefill_s * 1e3:.1f} ms, "
        f"{transfer.num_bytes / 1e6:.3g} MB of keys and values sent, {transfer.exposed_s * 1e3:.1f} ms of it not hidden"
    )


def stream_generate(
    address: str,
    request: inference_pb2.GenerateRequest,
    *,
    timeout_s: float,
    on_text: Callable[[str], None] = lambda text: None,
) -> GenerateResult:
    """Runs one request. Leaving early cancels it.

    Args:
        on_text: gets each piece of text as it comes, the prompt's first where it is echoed; nothing where several
            choices were asked for, which come interleaved.

    Raises:
        ServiceError: refused, failed, not done within ``timeout_s``, or answered against the protocol.
    """
    with open_channel(address) as channel, one_line_errors(address, timeout_s):
        # Closing the channel cancels what still runs on it.
        call = inference_pb2_grpc.InferenceStub(channel).Generate(request, timeout=timeout_s)
        return AnswerReader(request, on_text).read(call)


def fetch_status(address: str, *, timeout_s: float = 5.0) -> admin_pb2.GetStatusResponse:
    """Asks a service who holds what, and in which state.

    Raises:
        ServiceError: refused, unreachable, or no answer within ``timeout_s``.
    """
    with open_channel(address) as channel, one_line_errors(address, timeout_s):
        return admin_pb2_grpc.AdminStub(channel).GetStatus(admin_pb2.GetStatusRequest(), timeout=timeout_s)


def fetch_model(address: str, *, timeout_s: float = 5.0) -> inference_pb2.Model:
    """Asks a service for the limits of its only model.

    Raises:
        ServiceError: refused, unreachable, or no answer within ``timeout_s``.
    """
    with open_channel(address) as channel, one_line_errors(address, timeout_s):
        request = inference_pb2.GetModelRequest()
        return inference_pb2_grpc.InferenceStub(channel).GetModel(request, timeout=timeout_s).model


class _Received:
    """Collects what has come of the prompt's echo, or of one choice."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.tokens: list[inference_pb2.Token] = []
        self.end: inference_pb2.ChoiceEnd | None = None

    def take(self, part: inference_pb2.Echo | inference_pb2.Chunk) -> None:
        """Adds a part, which must follow without gap or repeat."""
        if part.first_index != len(self.tokens):
            raise _broken(f"token {len(self.tokens)} was due and token {part.first_index} came")
        self.tokens += part.tokens
        self.texts.append(part.text)

    def passage(self) -> Passage:
        return Passage(text="".join(self.texts), tokens=tuple(self.tokens))


class AnswerReader:
    """Reads the messages of an answer in their order: Accepted, the echo, the chunks of choices, Finished.

    Any other order is an error, as is a gap or a repeat.
    """

    def __init__(
        self, request: inference_pb2.GenerateRequest, on_text: Callable[[str], None] = lambda text: None
    ) -> None:
        self._choices = [_Received() for _ in range(max(1, request.num_choices))]
        self._echo = _Received() if request.echo else None
        self._on_text = on_text if len(self._choices) == 1 else lambda text: None
        self._accepted: inference_pb2.Accepted | None = None
        self._result: GenerateResult | None = None

    def read(self, call: Iterable[inference_pb2.GenerateResponse]) -> GenerateResult:
        """Returns the whole answer."""
        for response in call:
            self.take(response)
        return self.result()

    def take(self, response: inference_pb2.GenerateResponse) -> None:
        """Takes the next message. Raises ServiceError where it says that the request failed, or is out of order."""
        event = response.WhichOneof("event")
        if self._result is not None:
            raise _broken("a message came after the last one")
        if event == "accepted" and self._accepted is None:
            self._accepted = response.accepted
        elif event == "echo" and self._echo is not None and self._accepted is not None and not self._begun():
            self._echo.take(response.echo)
            self._on_text(response.echo.text)
        elif event == "chunk" and self._accepted is not None:
            self._take_chunk(response.chunk, self._accepted)
        elif event == "finished" and self._accepted is not None:
            self._result = self._finish(response.finished, self._accepted)
        else:
            raise _broken(f"{event or 'an unknown message'} came out of order")

    def result(self) -> GenerateResult:
        """Returns the whole answer once no more messages come. Raises ServiceError where the last one is missing."""
        if self._result is None:
            raise _broken("the answer ended without its last message")
        return self._result

    def _begun(self) -> bool:
        return any(choice.texts for choice in self._choices)

    def _take_chunk(self, chunk: inference_pb2.Chunk, accepted: inference_pb2.Accepted) -> None:
        if self._echo is not None and len(self._echo.tokens) != accepted.prompt_tokens:
            raise _broken(f"{len(self._echo.tokens)} of {accepted.prompt_tokens} prompt tokens were echoed")
        if not 0 <= chunk.choice < len(self._choices):
            raise _broken(f"choice {chunk.choice} came of {len(self._choices)}")
        choice = self._choices[chunk.choice]
        if choice.end is not None:
            raise _broken(f"choice {chunk.choice} went on after its end")
        choice.take(chunk)
        if chunk.HasField("end"):
            choice.end = chunk.end
        self._on_text(chunk.text)

    def _finish(self, finished: inference_pb2.Finished, accepted: inference_pb2.Accepted) -> GenerateResult:
        if finished.WhichOneof("outcome") == "error":
            raise ServiceError(code=_code_name(finished.error.code), message=finished.error.message)
        for index, choice in enumerate(self._choices):
            if choice.end is None:
                raise _broken(f"choice {index} has no end")
            if choice.end.completion_tokens != len(choice.tokens):
                raise _broken(f"choice {index} has {len(choice.tokens)} tokens of {choice.end.completion_tokens}")
        return GenerateResult(
            accepted=accepted,
            finished=finished,
            choices=tuple(choice.passage() for choice in self._choices),
            ends=tuple(choice.end for choice in self._choices if choice.end is not None),
            echo=None if self._echo is None else self._echo.passage(),
        )


def _broken(what: str) -> ServiceError:
    return ServiceError(code="DATA_LOSS", message=what)


def _code_name(number: int) -> str:
    names = {code.value[0]: code.name for code in grpc.StatusCode}
    return names.get(number, f"status {number}")


def open_channel(address: str) -> grpc.Channel:
    """Opens a channel to the service, past any proxy."""
    return grpc.insecure_channel(address, options=CHANNEL_OPTIONS)


@contextmanager
def one_line_errors(address: str, timeout_s: float) -> Iterator[None]:
    """Raises a ServiceError in place of each error of gRPC, and of each answer that says only that time was up.

    Args:
        timeout_s: the deadline that the calls within were given.
    """
    started_s = time.monotonic()
    try:
        yield
    except grpc.RpcError as error:
        late = time.monotonic() - started_s >= timeout_s - _EARLY_S
        refused = _service_error(error)
        if late and error.code() in _CUT_OFF:
            refused = ServiceError(code=_OVERDUE, message=_OWN_CLOCK)
        raise _explained(refused, address, timeout_s) from None
    except ServiceError as error:
        raise _explained(error, address, timeout_s) from None


def _explained(error: ServiceError, address: str, timeout_s: float) -> ServiceError:
    """Puts the reason in words that help, where the call did not end as the service meant it to."""
    if error.code == _OVERDUE and _SERVICE_LIMIT not in error.message:
        # The service, or gRPC, knows only what was left of the time when the call arrived.
        if _OWN_CLOCK in error.message:
            return ServiceError(code=_OVERDUE, message=unreached(address) or f"not done within {timeout_s:g} s")
        return ServiceError(code=_OVERDUE, message=f"not done within {timeout_s:g} s ({error.message})")
    if error.code == grpc.StatusCode.UNAVAILABLE.name and error.message.startswith(_NOT_CONNECTED):
        return ServiceError(code=error.code, message=unreached(address) or f"{address} was lost; try again")
    if error.code == grpc.StatusCode.UNIMPLEMENTED.name:
        return ServiceError(code=error.code, message=f"{address} speaks gRPC, but is no such service of Heterodyne")
    return error


def _service_error(error: grpc.RpcError) -> ServiceError:
    """Returns the error of a gRPC status with its details: field violations, and when to try again."""
    code, message = error.code(), error.details() or "no reason was given"
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
