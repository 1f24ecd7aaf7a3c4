"""A worker whose model is nothing: the real engine, scheduler and leader stream around a runner that only waits.

Also plays the controller, so that a real gateway finds it. Says where it listens in one JSON line.
"""

import argparse
import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import grpc

from protos.heterodyne.control.v1 import control_pb2, control_pb2_grpc
from protos.heterodyne.worker.v1 import worker_pb2 as pb
from protos.heterodyne.worker.v1 import worker_pb2_grpc as pb_grpc
from tests.benchmarks.engine.engine_models import read_spec
from tests.benchmarks.gateway.gateway_board import Board
from workers.host.device import Device, open_device
from workers.host.model_files import read_tokenizer_of
from workers.sampling.grammar import GrammarFactory
from workers.sampling.sampling import SampledToken
from workers.service.server import WorkerService
from workers.startup.building import build_engine
from workers.startup.loading import Loaded
from workers.step.types import Batch, StepResult

_EPOCH = 1
_BLOCK_SIZE = 16
_BLOCKS = 1 << 17


class NullRunner:
    """Gives every sequence the token that names the step, once the board's step time has passed."""

    def __init__(self, board: Board) -> None:
        self._board = board

    def prepare(self, batch: Batch) -> Callable[[], StepResult]:
        wanted = [sequence.samples for sequence in batch.sequences]
        return lambda: self._execute(wanted)

    def _execute(self, wanted: list[bool]) -> StepResult:
        started_ns = time.monotonic_ns()
        if step_ns := self._board.step_ns:
            time.sleep(step_ns / 1e9)
        now_ns = time.monotonic_ns()
        token = SampledToken(token_id=self._board.stamp(now_ns))
        tokens = tuple(token if wants else None for wants in wanted)
        return StepResult(tokens=tokens, duration_s=(now_ns - started_ns) / 1e9)


class NullService(WorkerService):
    """A worker that has loaded already."""

    def __init__(self, *, device: Device, loaded: Loaded) -> None:
        super().__init__(device=device, epoch=_EPOCH)
        self._loaded = loaded
        self._phase = pb.LOAD_PHASE_READY


class Control(control_pb2_grpc.ControlServicer):
    """A controller of one replica, which is ready."""

    def __init__(self) -> None:
        self.address = ""

    async def Watch(
        self,
        request: control_pb2.WatchRequest,
        context: grpc.aio.ServicerContext[control_pb2.WatchRequest, control_pb2.WatchResponse],
    ) -> AsyncIterator[control_pb2.WatchResponse]:
        ready = control_pb2.PHASE_READY
        rank = control_pb2.Rank(address=self.address, pid=os.getpid(), phase=ready)
        replica = control_pb2.Replica(name="replica-0", epoch=_EPOCH, phase=ready, ranks=[rank])
        yield control_pb2.WatchResponse(version=1, phase=ready, replicas=[replica])
        await asyncio.Event().wait()

    async def ReportLost(
        self,
        request: control_pb2.ReportLostRequest,
        context: grpc.aio.ServicerContext[control_pb2.ReportLostRequest, control_pb2.ReportLostResponse],
    ) -> control_pb2.ReportLostResponse:
        print(f"the gateway gave the null worker up: {request.cause}", file=sys.stderr, flush=True)
        return control_pb2.ReportLostResponse()


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--board", type=Path, required=True)
    parser.add_argument("--sequences", type=int, required=True, help="most that run at once")
    return parser.parse_args()


async def main(options: argparse.Namespace) -> None:
    """Serve until SIGTERM."""
    model = read_spec(options.model)
    request = pb.LoadRequest(
        epoch=_EPOCH,
        block_size=_BLOCK_SIZE,
        num_blocks=_BLOCKS,
        token_budget=2 * options.sequences,
        max_num_seqs=options.sequences,
        max_context_tokens=model.max_context_tokens,
        prefix_cache=True,
    )
    executor = ThreadPoolExecutor(1, thread_name_prefix="runner")
    engine = build_engine(NullRunner(Board(options.board)), executor, request=request, model=model)
    engine.thread.start()
    read = partial(read_tokenizer_of, options.model, vocab_size=model.vocab_size)
    grammars = GrammarFactory(read, vocab_size=model.vocab_size, eos_token_ids=model.eos_token_ids)
    loaded = Loaded(engine=engine, grammars=grammars, weight_bytes=0, kv_bytes=0)
    service, control = NullService(device=open_device("cpu", 1), loaded=loaded), Control()
    server = grpc.aio.server()
    pb_grpc.add_WorkerServicer_to_server(service, server)
    control_pb2_grpc.add_ControlServicer_to_server(control, server)
    control.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    print(json.dumps({"address": control.address}), flush=True)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await stop.wait()
    await server.stop(0.2)
    service.close()


if __name__ == "__main__":
    asyncio.run(main(parse()))
