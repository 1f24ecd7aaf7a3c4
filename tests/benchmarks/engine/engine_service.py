"""Heterodyne as it is served: ``python -m orchestrator serve`` in processes of its own, measured through gRPC."""

import asyncio
import random
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import grpc
import psutil

from kernels.cpu.machine.target import VARIABLE
from protos.heterodyne.v1 import inference_pb2 as pb
from protos.heterodyne.v1 import inference_pb2_grpc as pb_grpc
from tests.benchmarks.engine.engine_cases import OURS, Case, Sample
from tests.support.deploying.service import REPOSITORY, serve

# Modules of the worker and the gateway. They are idle between turns, and keep each other's pulse.
_LEFT_RUNNING = re.compile(r"workers|orchestrator\.gateway(\..*)?")
_FIRST_ID = 3
_MEASURE_S = 900.0
_SHOWN_CHARS = 4000


class Service:
    """A running deployment of one replica. Ray's helpers and the controller are frozen except in its turns.

    Attributes:
        versions: none beside this repository's own.
    """

    def __init__(
        self,
        *,
        model: Path,
        threads: int,
        max_sequences: int,
        vocab_size: int,
        settings: Sequence[str],
        name: str = OURS,
        checkout: Path = REPOSITORY,
        target: str = "",
    ) -> None:
        """Start it. Its code is compiled for the kind of CPU named by ``target``; for the best, where it is empty."""
        self.name = name
        self.versions: dict[str, str] = {}
        self._vocab_size = vocab_size
        self._command, self._address = serve(
            f"model.path={model.absolute()}",
            f"cluster.workers.0.threads={threads}",
            f"serving.max_num_seqs={max_sequences}",
            f"gateway.request_timeout_s={_MEASURE_S}",
            *settings,
            checkout=checkout,
            env={VARIABLE: target} if target else None,
        )
        try:
            self._helpers = self._find_helpers()
            self._freeze()
        except BaseException:
            self._command.close()
            raise

    def _find_helpers(self) -> list[psutil.Process]:
        found = []
        top = psutil.Process(self._command.process.pid)
        for process in (top, *top.children(recursive=True)):
            if not any(_LEFT_RUNNING.fullmatch(word) for word in process.cmdline()):
                found.append(process)
        return found

    def _freeze(self) -> None:
        for process in self._helpers:
            if process.is_running():
                process.suspend()

    def _thaw(self) -> None:
        for process in self._helpers:
            if process.is_running():
                process.resume()

    def measure(self, case: Case, seed: int) -> Sample:
        """Thaw, measure, freeze."""
        self._thaw()
        try:
            return asyncio.run(_measure(self._address, case, seed, self._vocab_size))
        except grpc.RpcError:
            print(self._command.output()[-_SHOWN_CHARS:], file=sys.stderr, flush=True)  # why, in the service's words
            raise
        finally:
            self._freeze()

    def close(self) -> None:
        """Stop it, and see that nothing of it is left."""
        self._thaw()
        self._command.stop_cleanly()


async def _measure(address: str, case: Case, seed: int, vocab_size: int) -> Sample:
    draw = random.Random(seed)
    prompts = [
        [draw.randrange(_FIRST_ID, vocab_size) for _ in range(case.num_tokens)] for _ in range(case.num_sequences)
    ]
    requests = [_request(case, prompt_ids) for prompt_ids in prompts]
    batch = Batch(case)
    async with grpc.aio.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        await channel.channel_ready()
        stub: pb_grpc.InferenceAsyncStub = pb_grpc.InferenceStub(channel)
        batch.begin()
        streams = asyncio.gather(*(batch.follow(stub, index, request) for index, request in enumerate(requests)))
        measured = asyncio.create_task(batch.done.wait())
        await asyncio.wait({streams, measured}, return_when=asyncio.FIRST_COMPLETED, timeout=_MEASURE_S)
        if not batch.done.is_set():
            streams.result()
            raise RuntimeError("every stream ended before the measurement did")
        streams.cancel()
        await asyncio.gather(streams, return_exceptions=True)
    return batch.sample()


def _request(case: Case, prompt_ids: list[int]) -> pb.GenerateRequest:
    request = pb.GenerateRequest(prompt_ids=pb.TokenIds(ids=prompt_ids), ignore_eos=True)
    request.sampling.temperature = 0.0
    if case.phase == "prefill":
        request.max_tokens = 1
    return request


class Batch:
    """The streams of one measurement.

    Attributes:
        done: set when what is measured has arrived.
    """

    def __init__(self, case: Case) -> None:
        self._case = case
        self._received = [0] * case.num_sequences
        self._base: list[int] | None = None
        self._started_s = 0.0
        self._stopped_s = 0.0
        self.done = asyncio.Event()

    def begin(self) -> None:
        """The requests leave now."""
        self._started_s = time.perf_counter()

    async def follow(self, stub: "pb_grpc.InferenceAsyncStub", index: int, request: pb.GenerateRequest) -> None:
        """Read one stream; whoever stops following cancels the call."""
        async for response in stub.Generate(request, timeout=_MEASURE_S):
            if response.HasField("chunk"):
                self._take(index, len(response.chunk.tokens))

    def _take(self, index: int, num_tokens: int) -> None:
        self._received[index] += num_tokens
        if self.done.is_set() or not all(self._received):
            return
        if self._base is None:  # every sequence has its first token
            self._base = list(self._received)
            if self._case.phase == "decode":
                self._started_s = time.perf_counter()
                return
        # By the slowest: a step's tokens arrive one after the other, some of them behind the moment that counts.
        gained = min(now - before for now, before in zip(self._received, self._base, strict=True))
        if self._case.phase == "prefill" or gained >= self._case.num_steps:
            self._stopped_s = time.perf_counter()
            self.done.set()

    def sample(self) -> Sample:
        """The measurement, once done."""
        each = self._case.num_tokens if self._case.phase == "prefill" else self._case.num_steps
        return Sample(seconds=self._stopped_s - self._started_s, tokens=each * self._case.num_sequences)
