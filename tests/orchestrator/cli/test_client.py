"""The client against a real server of the generated protos."""

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from dataclasses import dataclass, field

import grpc
import pytest
from google.protobuf import any_pb2, duration_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from orchestrator.cli.client import fetch_status, stream_generate
from orchestrator.errors import ServiceError
from protos.heterodyne.v1 import admin_pb2, admin_pb2_grpc, inference_pb2, inference_pb2_grpc
from tests.support.clocks import PATIENCE_S

REQUEST = inference_pb2.GenerateRequest(prompt="hello")
Answer = Callable[[grpc.ServicerContext], Iterator[inference_pb2.GenerateResponse]]


@dataclass
class Service(inference_pb2_grpc.InferenceServicer, admin_pb2_grpc.AdminServicer):
    """Answers every request as the test says."""

    answer: Answer | None = None
    expected: inference_pb2.GenerateRequest = field(default_factory=lambda: REQUEST)
    address: str = ""
    ended: threading.Event = field(default_factory=threading.Event)

    def Generate(
        self, request: inference_pb2.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[inference_pb2.GenerateResponse]:
        assert request == self.expected
        assert self.answer is not None
        context.add_callback(self.ended.set)
        yield from self.answer(context)

    def GetStatus(
        self, request: admin_pb2.GetStatusRequest, context: grpc.ServicerContext
    ) -> admin_pb2.GetStatusResponse:
        return admin_pb2.GetStatusResponse(model="demo")


def start(service: Service, address: str = "127.0.0.1:0") -> grpc.Server:
    server = grpc.server(futures.ThreadPoolExecutor(4))
    inference_pb2_grpc.add_InferenceServicer_to_server(service, server)
    admin_pb2_grpc.add_AdminServicer_to_server(service, server)
    service.address = f"127.0.0.1:{server.add_insecure_port(address)}"
    server.start()
    return server


@pytest.fixture
def service() -> Iterator[Service]:
    service = Service()
    server = start(service)
    yield service
    server.stop(None).wait()


@pytest.fixture
def free_address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return f"127.0.0.1:{taken.getsockname()[1]}"


@contextlib.contextmanager
def foreign(behave: Callable[[socket.socket], None]) -> Iterator[str]:
    """The address of a server that does to each connection what ``behave`` says, once the client has spoken."""

    def take() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection, contextlib.suppress(OSError):
                connection.settimeout(PATIENCE_S)
                connection.recv(1024)
                behave(connection)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=take)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(PATIENCE_S)
        assert not thread.is_alive()


ACCEPTED = inference_pb2.GenerateResponse(accepted=inference_pb2.Accepted(request_id="r1", prompt_tokens=1))
FINISHED = inference_pb2.GenerateResponse(
    finished=inference_pb2.Finished(finish_reason=inference_pb2.FINISH_REASON_STOP, replica="replica-0")
)


def some_tokens(first_index: int, num_tokens: int) -> list[inference_pb2.Token]:
    return [inference_pb2.Token(id=first_index + offset) for offset in range(num_tokens)]


def chunk(
    first_index: int, text: str, num_tokens: int = 1, *, choice: int = 0, end: int | None = None
) -> inference_pb2.GenerateResponse:
    """Tokens of a choice; ``end`` says how many it has, with the last of them."""
    message = inference_pb2.Chunk(
        first_index=first_index, text=text, tokens=some_tokens(first_index, num_tokens), choice=choice
    )
    if end is not None:
        message.end.finish_reason, message.end.completion_tokens = inference_pb2.FINISH_REASON_STOP, end
    return inference_pb2.GenerateResponse(chunk=message)


def echo(first_index: int, text: str, num_tokens: int = 1) -> inference_pb2.GenerateResponse:
    message = inference_pb2.Echo(first_index=first_index, text=text, tokens=some_tokens(first_index, num_tokens))
    return inference_pb2.GenerateResponse(echo=message)


def fixed(*responses: inference_pb2.GenerateResponse) -> Answer:
    return lambda context: iter(responses)


def failure(service: Service, timeout_s: float = PATIENCE_S) -> ServiceError:
    with pytest.raises(ServiceError) as caught:
        stream_generate(service.address, service.expected, timeout_s=timeout_s)
    assert "\n" not in str(caught.value)
    return caught.value


def test_text_is_handed_on_as_it_comes(service: Service) -> None:
    service.answer = fixed(ACCEPTED, chunk(0, "Hel", 2), chunk(2, "lo", end=3), FINISHED)
    pieces: list[str] = []
    result = stream_generate(service.address, REQUEST, timeout_s=PATIENCE_S, on_text=pieces.append)
    assert pieces == ["Hel", "lo"]
    assert result.text == "Hello"
    assert result.accepted == ACCEPTED.accepted
    assert result.finished == FINISHED.finished


def test_refusal_carries_field_violations_and_retry_hint(service: Service) -> None:
    def refuse(context: grpc.ServicerContext) -> Iterator[inference_pb2.GenerateResponse]:
        bad = error_details_pb2.BadRequest()
        bad.field_violations.add(field="max_tokens", description="is below 1")
        retry = error_details_pb2.RetryInfo(retry_delay=duration_pb2.Duration(seconds=1, nanos=500_000_000))
        details = [any_pb2.Any(), any_pb2.Any()]
        details[0].Pack(bad)
        details[1].Pack(retry)
        status = status_pb2.Status(code=code_pb2.INVALID_ARGUMENT, message="the request\nwas refused", details=details)
        context.abort_with_status(rpc_status.to_status(status))
        yield from ()

    service.answer = refuse
    error = failure(service)
    assert error.code == "INVALID_ARGUMENT"
    assert error.violations == (("max_tokens", "is below 1"),)
    assert error.retry_after_s == 1.5
    assert str(error) == ("INVALID_ARGUMENT: the request was refused; max_tokens: is below 1; try again in 1.5 s")


def test_refusal_without_details_is_its_code_and_message(service: Service) -> None:
    def refuse(context: grpc.ServicerContext) -> Iterator[inference_pb2.GenerateResponse]:
        context.abort(grpc.StatusCode.UNAVAILABLE, "draining")
        yield from ()

    service.answer = refuse
    assert str(failure(service)) == "UNAVAILABLE: draining"


def test_error_in_the_last_message_is_raised_with_its_code(service: Service) -> None:
    error = inference_pb2.Error(code=code_pb2.INTERNAL, message="the replica was lost")
    last = inference_pb2.GenerateResponse(finished=inference_pb2.Finished(error=error))
    service.answer = fixed(ACCEPTED, chunk(0, "a"), last)
    assert str(failure(service)) == "INTERNAL: the replica was lost"


@pytest.mark.parametrize(
    ("responses", "message"),
    [
        ((ACCEPTED, chunk(0, "a"), chunk(2, "b"), FINISHED), "token 1 was due and token 2 came"),
        ((ACCEPTED, chunk(0, "a"), chunk(0, "a"), FINISHED), "token 1 was due and token 0 came"),
        ((ACCEPTED, chunk(0, "a")), "the answer ended without its last message"),
        ((chunk(0, "a"), FINISHED), "chunk came out of order"),
        ((ACCEPTED, ACCEPTED), "accepted came out of order"),
        ((ACCEPTED, chunk(0, "a", end=1), FINISHED, chunk(1, "a")), "a message came after the last one"),
        ((ACCEPTED, chunk(0, "a"), FINISHED), "choice 0 has no end"),
        ((ACCEPTED, chunk(0, "a", end=2), FINISHED), "choice 0 has 1 tokens of 2"),
        ((ACCEPTED, chunk(0, "a", end=1), chunk(1, "b"), FINISHED), "choice 0 went on after its end"),
        ((ACCEPTED, chunk(0, "a", choice=1), FINISHED), "choice 1 came of 1"),
        ((ACCEPTED, chunk(0, "a", choice=-1), FINISHED), "choice -1 came of 1"),
        ((ACCEPTED, echo(0, "a"), FINISHED), "echo came out of order"),
        ((inference_pb2.GenerateResponse(),), "an unknown message came out of order"),
        ((), "the answer ended without its last message"),
    ],
)
def test_answer_against_the_protocol_is_an_error(
    service: Service, responses: tuple[inference_pb2.GenerateResponse, ...], message: str
) -> None:
    service.answer = fixed(*responses)
    assert str(failure(service)) == f"DATA_LOSS: {message}"


def test_choices_come_interleaved_and_are_told_apart(service: Service) -> None:
    service.expected = inference_pb2.GenerateRequest(prompt="hello", num_choices=2)
    service.answer = fixed(
        ACCEPTED,
        chunk(0, "x", choice=1),
        chunk(0, "a"),
        chunk(1, "y", choice=1, end=2),
        chunk(1, "b", 2, end=3),
        FINISHED,
    )
    pieces: list[str] = []
    result = stream_generate(service.address, service.expected, timeout_s=PATIENCE_S, on_text=pieces.append)
    assert pieces == [], "they would be mixed up"
    assert [choice.text for choice in result.choices] == ["ab", "xy"]
    assert [len(choice.tokens) for choice in result.choices] == [3, 2]
    assert [end.completion_tokens for end in result.ends] == [3, 2]
    assert result.echo is None


def test_an_echoed_prompt_is_handed_on_before_the_answer(service: Service) -> None:
    service.expected = inference_pb2.GenerateRequest(prompt="hello", echo=True)
    accepted = inference_pb2.GenerateResponse(accepted=inference_pb2.Accepted(prompt_tokens=3))
    service.answer = fixed(accepted, echo(0, "he", 2), echo(2, "llo"), chunk(0, "!", end=1), FINISHED)
    pieces: list[str] = []
    result = stream_generate(service.address, service.expected, timeout_s=PATIENCE_S, on_text=pieces.append)
    assert pieces == ["he", "llo", "!"]
    assert result.echo is not None and (result.echo.text, len(result.echo.tokens)) == ("hello", 3)
    assert result.text == "!"


@pytest.mark.parametrize(
    ("responses", "message"),
    [
        ((echo(0, "h"), echo(2, "l")), "token 1 was due and token 2 came"),
        ((echo(0, "h"), chunk(0, "a")), "1 of 3 prompt tokens were echoed"),
        ((chunk(0, "a"),), "0 of 3 prompt tokens were echoed"),
        ((echo(0, "hel", 3), chunk(0, "a"), echo(3, "lo")), "echo came out of order"),
    ],
)
def test_an_echo_against_the_protocol_is_an_error(
    service: Service, responses: tuple[inference_pb2.GenerateResponse, ...], message: str
) -> None:
    service.expected = inference_pb2.GenerateRequest(prompt="hello", echo=True)
    accepted = inference_pb2.GenerateResponse(accepted=inference_pb2.Accepted(prompt_tokens=3))
    service.answer = fixed(accepted, *responses, FINISHED)
    assert str(failure(service)) == f"DATA_LOSS: {message}"


def test_silent_service_ends_at_the_deadline(service: Service) -> None:
    def hang(context: grpc.ServicerContext) -> Iterator[inference_pb2.GenerateResponse]:
        yield ACCEPTED
        service.ended.wait(PATIENCE_S)

    service.answer = hang
    started = time.monotonic()
    assert str(failure(service, timeout_s=0.3)) == "DEADLINE_EXCEEDED: not done within 0.3 s"
    assert time.monotonic() - started < PATIENCE_S / 2


@pytest.mark.parametrize("code", [grpc.StatusCode.UNKNOWN, grpc.StatusCode.CANCELLED])
def test_a_stream_that_is_cut_off_about_the_deadline_has_run_out_of_time(
    service: Service, code: grpc.StatusCode
) -> None:
    def cut_off(context: grpc.ServicerContext) -> Iterator[inference_pb2.GenerateResponse]:
        yield ACCEPTED
        service.ended.wait(0.4)
        context.abort(code, "Stream removed")

    service.answer = cut_off
    assert str(failure(service, timeout_s=0.6)) == "DEADLINE_EXCEEDED: not done within 0.6 s"
    service.ended.clear()
    assert failure(service, timeout_s=PATIENCE_S).code == code.name


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        (
            "the deadline passed before a slot came free",
            "not done within 60 s (the deadline passed before ",
        ),
        ("the request took longer than gateway.request_timeout_s = 5 allows", "the request took longer than gateway."),
    ],
)
def test_the_time_limit_that_is_named_is_the_one_that_was_set(service: Service, said: str, shown: str) -> None:
    error = inference_pb2.Error(code=code_pb2.DEADLINE_EXCEEDED, message=said)
    last = inference_pb2.GenerateResponse(finished=inference_pb2.Finished(error=error))
    service.answer = fixed(ACCEPTED, last)
    assert str(failure(service, timeout_s=60.0)).startswith(f"DEADLINE_EXCEEDED: {shown}")


def test_leaving_early_cancels_the_request(service: Service) -> None:
    def endless(context: grpc.ServicerContext) -> Iterator[inference_pb2.GenerateResponse]:
        yield ACCEPTED
        yield chunk(0, "a")
        service.ended.wait(PATIENCE_S)

    def interrupt(text: str) -> None:
        raise KeyboardInterrupt

    service.answer = endless
    with pytest.raises(KeyboardInterrupt):
        stream_generate(service.address, REQUEST, timeout_s=PATIENCE_S, on_text=interrupt)
    assert service.ended.wait(PATIENCE_S)


def test_absent_service_is_named(free_address: str) -> None:
    with pytest.raises(ServiceError) as caught:
        fetch_status(free_address, timeout_s=PATIENCE_S)
    fix = "Start a service with `heterodyne serve FILE`, or say where it is with --address."
    assert str(caught.value) == f"UNAVAILABLE: nothing listens at {free_address} (connection refused). {fix}"


@pytest.mark.parametrize(
    ("behave", "said"),
    [
        (lambda connection: connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n"), "(it is a web server)"),
        (lambda connection: connection.sendall(b"\x15\x03\x01\x00\x02\x02\x16\x00\x00"), "(it wants TLS)"),
        (lambda connection: connection.sendall(b"SSH-2.0-OpenSSH_9.2\r\n"), "(it speaks another protocol)"),
        (lambda connection: connection.shutdown(socket.SHUT_RDWR), "(it closes the connection)"),
    ],
)
def test_what_listens_and_is_no_grpc_service_is_told_apart(behave: Callable[[socket.socket], None], said: str) -> None:
    with foreign(behave) as address, pytest.raises(ServiceError) as caught:
        fetch_status(address, timeout_s=PATIENCE_S)
    assert str(caught.value) == f"UNAVAILABLE: {address} does not speak gRPC {said}"


def test_what_takes_connections_and_says_nothing_is_no_mere_lateness() -> None:
    with socket.create_server(("127.0.0.1", 0)) as never_reads, pytest.raises(ServiceError) as caught:
        address = f"127.0.0.1:{never_reads.getsockname()[1]}"
        fetch_status(address, timeout_s=0.3)
    said = "takes connections and says nothing: it is another kind of server, or it hangs"
    assert str(caught.value) == f"DEADLINE_EXCEEDED: {address} {said}"


def test_a_name_without_an_address_is_said_to_have_none() -> None:
    with pytest.raises(ServiceError) as caught:
        fetch_status("no.such.host.invalid:1", timeout_s=PATIENCE_S)
    assert str(caught.value) == "UNAVAILABLE: no address is known for the name 'no.such.host.invalid'"


def test_a_grpc_server_of_others_is_told_apart() -> None:
    server = grpc.server(futures.ThreadPoolExecutor(1))
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    with pytest.raises(ServiceError) as caught:
        fetch_status(address, timeout_s=PATIENCE_S)
    server.stop(None).wait()
    assert str(caught.value) == f"UNIMPLEMENTED: {address} speaks gRPC, but is no such service of Heterodyne"


def test_status_is_fetched(service: Service) -> None:
    assert fetch_status(service.address).model == "demo"
