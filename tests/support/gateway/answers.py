"""What tests ask of a gateway, and what every answer must be like."""

from typing import Any

import grpc
from grpc_status import rpc_status

from protos.heterodyne.v1 import inference_pb2 as pb

PROMPT = "In the beginning"


def request(**fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(**{"prompt": PROMPT, "max_tokens": 8, "ignore_eos": True} | fields)


async def answer(stub: Any, message: pb.GenerateRequest, **call: Any) -> list[pb.GenerateResponse]:
    return [response async for response in stub.Generate(message, timeout=30.0, **call)]


def tokens(responses: list[pb.GenerateResponse]) -> list[int]:
    return [token.id for response in responses for token in response.chunk.tokens]


def text(responses: list[pb.GenerateResponse]) -> str:
    return "".join(response.chunk.text for response in responses)


def check_order(responses: list[pb.GenerateResponse]) -> None:
    """Accepted first, Finished last and once, echo before chunks, each choice with no gap or repeat."""
    kinds = [response.WhichOneof("event") for response in responses]
    assert kinds[0] == "accepted" and kinds[-1] == "finished"
    assert set(kinds[1:-1]) <= {"echo", "chunk"}
    assert kinds[1:-1] == sorted(kinds[1:-1], reverse=True), "echo precedes chunks"
    positions: dict[int, int] = {-1: 0}
    for response in responses[1:-1]:
        part, choice = (response.echo, -1) if response.HasField("echo") else (response.chunk, response.chunk.choice)
        assert part.first_index == positions.get(choice, 0)
        positions[choice] = part.first_index + len(part.tokens)
    del positions[-1]
    assert responses[-1].finished.usage.completion_tokens == sum(positions.values())
    if responses[-1].finished.WhichOneof("outcome") == "finish_reason":
        ends = {r.chunk.choice: r.chunk.end.completion_tokens for r in responses if r.chunk.HasField("end")}
        assert ends == positions


def choices(responses: list[pb.GenerateResponse]) -> dict[int, list[int]]:
    """The tokens of each choice."""
    result: dict[int, list[int]] = {}
    for response in responses:
        if response.HasField("chunk"):
            result.setdefault(response.chunk.choice, []).extend(token.id for token in response.chunk.tokens)
    return result


def details(error: grpc.aio.AioRpcError, kind: Any) -> Any:
    status = rpc_status.from_call(error)
    message = kind()
    assert any(detail.Unpack(message) for detail in status.details)
    return message
