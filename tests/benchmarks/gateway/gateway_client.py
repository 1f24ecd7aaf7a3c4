"""One client process: keeps a number of streams open, and counts what arrives in a window that its parent opens.

Says ``ready`` once every stream flows, waits for a line, measures, and answers with one JSON line. Messages are taken
as bytes and looked at when the window is closed, so that as little as can be of the machine goes into clients.
"""

import argparse
import asyncio
import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from protos.heterodyne.v1 import inference_pb2 as pb
from tests.benchmarks.gateway.gateway_board import Board

_METHOD = "/heterodyne.v1.Inference/Generate"
_OPTIONS = [("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1)]
_PROMPT = tuple(range(1000, 1016))
_CALL_S = 600.0


@dataclass(slots=True)
class Window:
    """What arrived while it was open."""

    open: bool = False
    messages: list[tuple[int, bytes]] = field(default_factory=list)
    num_finished: int = 0


async def stream(
    call: grpc.aio.UnaryStreamMultiCallable, request: bytes, window: Window, flowing: asyncio.Event
) -> None:
    """One request after the other."""
    while True:
        received = 0
        async for message in call(request, timeout=_CALL_S):
            received += 1
            if window.open:
                window.messages.append((time.monotonic_ns(), message))
            if received > 1:  # the first says only that it was accepted
                flowing.set()
        window.num_finished += window.open


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--address", required=True)
    parser.add_argument("--board", type=Path, required=True)
    parser.add_argument("--streams", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--max-tokens", type=int, required=True)
    return parser.parse_args()


async def main(options: argparse.Namespace) -> None:
    """Open the streams, measure when told to, say what was seen."""
    message = pb.GenerateRequest(prompt_ids=pb.TokenIds(ids=_PROMPT), max_tokens=options.max_tokens, ignore_eos=True)
    message.sampling.temperature = 0.0
    request = message.SerializeToString()
    window = Window()
    flowing = [asyncio.Event() for _ in range(options.streams)]
    async with grpc.aio.insecure_channel(options.address, options=_OPTIONS) as channel:
        call = channel.unary_stream(_METHOD)
        tasks = [asyncio.create_task(stream(call, request, window, event)) for event in flowing]
        failed = asyncio.gather(*tasks)
        started = asyncio.gather(*(event.wait() for event in flowing))
        await asyncio.wait({failed, started}, return_when=asyncio.FIRST_COMPLETED)
        if failed.done():
            failed.result()
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        before, cpu_s = time.monotonic(), time.process_time()
        window.open = True
        await asyncio.wait({failed}, timeout=options.seconds)
        window.open = False
        after, cpu_s = time.monotonic(), time.process_time() - cpu_s
        if failed.done():
            failed.result()
        failed.cancel()
        await asyncio.gather(failed, return_exceptions=True)
    print(json.dumps(summary(window, Board(options.board)) | {"seconds": after - before, "cpu_s": cpu_s}), flush=True)


def summary(window: Window, board: Board) -> dict[str, object]:
    """Tokens, messages and requests of the window, and by how much each token came after its step, in microseconds."""
    tokens = 0
    added_us = []
    for at_ns, message in window.messages:
        for token in pb.GenerateResponse.FromString(message).chunk.tokens:
            tokens += 1
            added_us.append((at_ns - board.ended_ns(token.id)) // 1000)
    return {
        "tokens": tokens,
        "messages": len(window.messages),
        "requests": window.num_finished,
        "added_us": added_us,
    }


if __name__ == "__main__":
    asyncio.run(main(parse()))
