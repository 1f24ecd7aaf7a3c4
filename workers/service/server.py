"""Implements the worker's gRPC service: loading, measuring, describing, and the leader stream."""

import asyncio
import logging
import os
import socket
import time
from collections.abc import AsyncIterator, Awaitable
from typing import Any, NoReturn, TypeVar

import grpc
import torch

from placement.errors import HeterodyneError, cause_of
from placement.serving.kv.streaming import LEASE_S
from protos.codec.formats import read_dtype, read_quantization
from protos.codec.log_record import said
from protos.codec.measured import measured_message
from protos.codec.replica_ranks import ranks_message
from protos.heterodyne.worker.v1 import worker_pb2 as pb
from protos.heterodyne.worker.v1 import worker_pb2_grpc as pb_grpc
from workers.attention_worker.whereabouts import Address
from workers.engine.moves import NO_EXCHANGE
from workers.engine.types import STOPS, Stopping
from workers.host.device import Device, available_cores
from workers.host.identity import target_of
from workers.replica.kv_leader import KvLeader
from workers.sampling.grammar_compiler import GrammarCompiler
from workers.service import messages as wire
from workers.service.kv_exchange import KvFetcher
from workers.service.lead import LeaderStream
from workers.service.outbox import Outbox
from workers.service.prefill import PrefillCall, PrefillFailed
from workers.startup.loading import Loaded, LoadJob
from workers.startup.speed import Products
from workers.startup.speed_job import SpeedJob

logger = logging.getLogger(__name__)

# How often a load tells how far it is.
_PROGRESS_S = 0.2
# Grammars that may be compiled at once beyond one for each core, so that a few slow ones do not hold up all others.
_MORE_GRAMMARS = 4
# How long the engine's thread, which has nothing left to do, is waited for.
_JOIN_S = 1.0
_T = TypeVar("_T")
_CODES = {code.value[0]: code for code in grpc.StatusCode}


class WorkerService(pb_grpc.WorkerServicer):
    """Serves one rank. It loads once, then serves leader streams of its own epoch, or follows the rank that does.

    Attributes:
        target: what this rank's code is generated for.
    """

    def __init__(self, *, device: Device, epoch: int, listener: socket.socket | None = None) -> None:
        """Serves a rank on a device; other ranks of the replica connect at ``listener``.

        Raises:
            InvalidConfig: the environment names a CPU target that cannot be.
        """
        self._device = device
        self.target = target_of(device.torch_device)
        self._epoch = epoch
        self._listener = listener
        self._phase: pb.LoadPhase.ValueType = pb.LOAD_PHASE_UNSPECIFIED
        self._loaded: Loaded | None = None
        self._grammars: GrammarCompiler | None = None
        self._streams: set[LeaderStream] = set()
        self._fetcher: KvFetcher | None = None
        self._fenced_messages = 0
        self._stopping = asyncio.Event()

    @property
    def failure(self) -> BaseException | None:
        """Returns what ended this rank: the exception of a step, or the loss of another rank; None while it lives."""
        if self._loaded is None:
            return None
        membership = self._loaded.membership
        # A rank may be lost while there is nothing to compute, and nobody waits for it.
        return self._loaded.loop.failure or (None if membership is None else membership.pulse.lost)

    async def Load(
        self, request: pb.LoadRequest, context: grpc.aio.ServicerContext[pb.LoadRequest, pb.LoadResponse]
    ) -> AsyncIterator[pb.LoadResponse]:
        """Loads weights in a thread and reports progress meanwhile."""
        await self._check_epoch(request.epoch, context)
        if self._phase != pb.LOAD_PHASE_UNSPECIFIED:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "this worker has loaded a model already")
        self._phase = pb.LOAD_PHASE_WEIGHTS
        started = time.monotonic()
        job = LoadJob(request=request, device=self._device, listener=self._listener)
        task = asyncio.create_task(asyncio.to_thread(job.run))
        task.add_done_callback(_log_failure)
        try:
            while not task.done() and not self._stopping.is_set():
                await asyncio.wait([task], timeout=_PROGRESS_S)
                self._phase = job.phase
                yield self._progress(job, started)
        finally:
            if not task.done():  # whoever asked for the load has gone, or this worker stops
                job.stop()
        try:
            if not task.done():
                raise Stopping(STOPS)
            self._loaded = task.result()
        except HeterodyneError as error:
            await context.abort(_CODES[wire.error_code(error)], str(error))
        self._begin_fetching(self._loaded)
        self._loaded.loop.thread.start()
        self._phase = pb.LOAD_PHASE_READY
        ready, membership = self._progress(job, started), self._loaded.membership
        if membership is not None:
            ready.measured.CopyFrom(measured_message(membership.measured))
        yield ready

    def _begin_fetching(self, loaded: Loaded) -> None:
        """Has the engine of a leader fetch keys and values from other replicas, where it can."""
        side = loaded.kv_side
        if loaded.engine is None or side is None:
            return
        assert isinstance(side.commands, KvLeader)
        self._fetcher = KvFetcher(
            engine=loaded.engine, leader=side.commands, own=side.own, model=side.model, kv_format=side.kv_format
        )
        loaded.engine.use(self._fetcher)

    def _transfer_counts(self) -> wire.TransferCounts:
        fetcher, side = self._fetcher, None if self._loaded is None else self._loaded.kv_side
        if fetcher is None or side is None:
            return wire.TransferCounts()
        return wire.TransferCounts(
            num_transfers=fetcher.num_transfers,
            num_failures=fetcher.num_failures,
            num_bytes=fetcher.num_bytes,
            num_refused=side.rank.num_refused,
        )

    def _progress(self, job: LoadJob, started: float) -> pb.LoadResponse:
        return pb.LoadResponse(
            epoch=self._epoch,
            phase=self._phase,
            loaded_bytes=job.loaded_bytes,
            total_bytes=job.total_bytes,
            elapsed_s=time.monotonic() - started,
        )

    async def MeasureSpeed(
        self,
        request_iterator: AsyncIterator[pb.MeasureSpeedRequest],
        context: grpc.aio.ServicerContext[pb.MeasureSpeedRequest, pb.MeasureSpeedResponse],
    ) -> AsyncIterator[pb.MeasureSpeedResponse]:
        """Gets ready at the first request, measures at the second, in a thread that ends when the caller has gone."""
        requests = aiter(request_iterator)
        request = await anext(requests, pb.MeasureSpeedRequest())
        await self._check_epoch(request.epoch, context)
        if self._phase != pb.LOAD_PHASE_UNSPECIFIED:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "this worker has loaded a model already")
        job: SpeedJob | None = None
        try:
            quantization = read_quantization(request.quantization)
            job = SpeedJob(self._device, Products(dtype=read_dtype(request.dtype), quantization=quantization))
            if await self._unless_stopping(job.waits()):
                yield pb.MeasureSpeedResponse(epoch=self._epoch)
                if await self._unless_stopping(anext(requests, None)) is None:
                    return
                job.begin()
            speed = await self._unless_stopping(job.speed)
        except HeterodyneError as error:
            await context.abort(_CODES[wire.error_code(error)], str(error))
        finally:
            if job is not None:
                job.leave()
        yield pb.MeasureSpeedResponse(
            epoch=self._epoch, weight_bytes_per_s=speed.weight_bytes_per_s, flops_per_s=speed.flops_per_s
        )

    async def Describe(
        self,
        request: pb.DescribeRequest,
        context: grpc.aio.ServicerContext[pb.DescribeRequest, pb.DescribeResponse],
    ) -> pb.DescribeResponse:
        """Describes this rank: its device, its memory, its phase and its load."""
        await self._check_epoch(request.epoch, context)
        loaded = self._loaded
        return pb.DescribeResponse(
            epoch=self._epoch,
            pid=os.getpid(),
            device=self._device.name,
            target=self.target,
            torch_version=torch.__version__,
            total_memory_bytes=self._device.total_memory_bytes,
            available_memory_bytes=self._device.available_memory_bytes,
            phase=self._phase,
            weight_bytes=loaded.weight_bytes if loaded else 0,
            kv_bytes=loaded.kv_bytes if loaded else 0,
            num_threads=torch.get_num_threads(),
            load=wire.load_report(
                loaded.engine.load,
                fenced_messages=self._fenced_messages,
                budget=loaded.budget,
                transfers=self._transfer_counts(),
            )
            if loaded and loaded.engine
            else None,
        )

    # A coroutine that writes, which is the other form of a handler that streams: a write that waits for a gateway which
    # does not read must not keep the stream from its end.
    async def Lead(  # type: ignore[override]
        self,
        request_iterator: AsyncIterator[pb.LeadRequest],
        context: grpc.aio.ServicerContext[pb.LeadRequest, pb.LeadResponse],
    ) -> None:
        """Serves one gateway until the stream ends, however it ends.

        The status is INTERNAL with the cause when the engine fails, UNAVAILABLE when the worker stops,
        RESOURCE_EXHAUSTED when the gateway does not read, INVALID_ARGUMENT for a message without a known command.
        """
        if self._loaded is None:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "no model is loaded yet")
        engine, grammars = self._loaded.engine, self._loaded.grammars
        if self._loaded.attention_worker is not None:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "this is an attention worker: it leads no replica")
        if engine is None or grammars is None:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "this rank follows: rank 0 leads the replica")
        if self._grammars is None:
            self._grammars = GrammarCompiler(grammars, num_threads=available_cores() + _MORE_GRAMMARS)
        stream = LeaderStream(
            engine=engine,
            grammars=self._grammars,
            epoch=self._epoch,
            outbox=Outbox(),
            budget=self._loaded.budget,
            transfers=self._transfer_counts,
        )
        self._streams.add(stream)
        try:
            await stream.run(request_iterator, context.write)
        finally:
            self._streams.remove(stream)
            self._fenced_messages += stream.fenced_messages
        if stream.status is not None:
            await context.abort(*stream.status)

    async def DescribeRanks(
        self,
        request: pb.DescribeRanksRequest,
        context: grpc.aio.ServicerContext[pb.DescribeRanksRequest, pb.ReplicaRanks],
    ) -> pb.ReplicaRanks:
        """Describes the ranks of the replica, to one that exchanges keys and values with it."""
        await self._check_epoch(request.epoch, context)
        kv_side = None if self._loaded is None or self._loaded.engine is None else self._loaded.kv_side
        if kv_side is None:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, NO_EXCHANGE)
        return ranks_message(kv_side.own)

    async def MoveAttention(
        self,
        request: pb.MoveAttentionRequest,
        context: grpc.aio.ServicerContext[pb.MoveAttentionRequest, pb.MoveAttentionResponse],
    ) -> pb.MoveAttentionResponse:
        """Notes where an attention worker listens from now on. The steps find it there once they have lost it."""
        await self._check_epoch(request.epoch, context)
        whereabouts = None if self._loaded is None else self._loaded.whereabouts
        if whereabouts is None:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "this rank has no attention workers")
        to = request.address
        try:
            whereabouts.move(request.worker, Address(host=to.host, port=to.port, name=to.name))
        except HeterodyneError as error:
            await context.abort(_CODES[wire.error_code(error)], str(error))
        return pb.MoveAttentionResponse(epoch=self._epoch)

    async def Prefill(
        self,
        request_iterator: AsyncIterator[pb.PrefillRequest],
        context: grpc.aio.ServicerContext[pb.PrefillRequest, pb.PrefillResponse],
    ) -> AsyncIterator[pb.PrefillResponse]:
        """Computes a prompt for another replica and sends it the keys and values.

        The status is INVALID_ARGUMENT for what cannot be asked, UNAVAILABLE where it cannot be done now.
        """
        requests = aiter(request_iterator)
        try:
            async with asyncio.timeout(LEASE_S):
                first = await anext(requests, pb.PrefillRequest())
        except TimeoutError:
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "nothing was asked for in time")
        await self._check_epoch(first.epoch, context)
        loaded = self._loaded
        engine = None if loaded is None else loaded.engine
        if loaded is None or engine is None or loaded.kv_side is None:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, NO_EXCHANGE)
        side = loaded.kv_side
        assert isinstance(side.commands, KvLeader)
        call = PrefillCall(engine=engine, leader=side.commands, own=side.own, model=side.model)
        try:
            async for response in call.run(first.start, requests):
                response.epoch = self._epoch
                yield response
        except PrefillFailed as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))
        except TimeoutError:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the other ranks of the replica did not get ready in time")
        except HeterodyneError as error:
            await context.abort(_CODES[wire.error_code(error)], str(error))

    async def _unless_stopping(self, awaited: Awaitable[_T]) -> _T:
        """Waits for it. Raises Stopping where this worker is to stop before."""
        task, stopping = asyncio.ensure_future(awaited), asyncio.create_task(self._stopping.wait())
        try:
            await asyncio.wait([task, stopping], return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise Stopping(STOPS)
            return task.result()
        finally:
            task.cancel()
            stopping.cancel()

    async def _check_epoch(self, epoch: int, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        if epoch != self._epoch:
            self._fenced_messages += 1
            await self._fence(epoch, context)

    async def _fence(self, epoch: int, context: grpc.aio.ServicerContext[Any, Any]) -> NoReturn:
        await context.abort(
            grpc.StatusCode.FAILED_PRECONDITION,
            f"epoch {epoch} is fenced: this replica is at epoch {self._epoch}",
        )

    async def stop(self, timeout_s: float) -> None:
        """Answers everything that is under way, then ends the streams, with UNAVAILABLE.

        It waits at most ``timeout_s`` for the engine; then the streams end, even while a step executes. Loading and
        measuring end by themselves: a call that grpc has to end counts there as an error, which is logged.
        """
        self._stopping.set()
        if self._loaded is None:
            return
        loop = self._loaded.loop
        self._stop_loop(self._loaded)
        await asyncio.wait([asyncio.wrap_future(loop.ended)], timeout=timeout_s)
        if self._fetcher is not None:
            await self._fetcher.close_all()
        if self._loaded.kv_side is not None:
            await asyncio.to_thread(self._loaded.kv_side.stop)
        if self._loaded.membership is not None:
            cause = "stopped" if loop.failure is None else cause_of(loop.failure)
            await asyncio.to_thread(self._loaded.membership.leave, cause)
        for stream in self._streams:
            stream.end_with_engine()

    def _stop_loop(self, loaded: Loaded) -> None:
        """Stops the loop. It names the rank that was lost, if one was: the user reads what the gateway is told."""
        lost = None if loaded.membership is None else loaded.membership.pulse.lost
        if loaded.engine is not None and lost is not None:
            loaded.engine.stop(f"lost {lost}")
        else:
            loaded.loop.stop()

    def close(self) -> None:
        """Ends the threads, as far as they can be ended."""
        if self._grammars is not None:
            self._grammars.close()
        if self._loaded is not None and self._loaded.loop.thread.is_alive():
            self._loaded.loop.stop()
            self._loaded.loop.thread.join(_JOIN_S)


def _log_failure(load: asyncio.Task[Loaded]) -> None:
    """Says why a load failed, for whoever debugs it: whoever asked for it may have gone."""
    if not load.cancelled() and (error := load.exception()) is not None:
        cause = cause_of(error)
        logger.debug("The load failed: %s.", cause, extra=said("load_failed", cause=cause))
