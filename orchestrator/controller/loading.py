"""Asks a worker to load its shard, and tells how far it is."""

import asyncio
from collections.abc import AsyncIterator

import grpc

from orchestrator.controller import wire
from orchestrator.controller.events import LoadRank, RankLoaded, RankProgress
from orchestrator.controller.settings import DeploymentSettings
from orchestrator.launcher.process import WorkerFailed
from placement.planning.attention import GROUP
from protos.codec.measured import read_measurements
from protos.heterodyne.worker.v1 import worker_pb2, worker_pb2_grpc

EXIT_SEEN_S = 0.3
"""How much earlier than a process's end, at most, the end of its connections is seen; its end is the better cause."""

_CHANNEL_OPTIONS = [("grpc.enable_http_proxy", 0)]


def open_channel(address: str) -> grpc.aio.Channel:
    """Opens a channel to a worker, past any proxy."""
    return grpc.aio.insecure_channel(address, options=_CHANNEL_OPTIONS)


async def load_rank(
    command: LoadRank, settings: DeploymentSettings, token: bytes, attention_secret: bytes = b""
) -> AsyncIterator[RankProgress | RankLoaded]:
    """Yields how far the worker is; the last event is that it has loaded.

    Args:
        token: what the ranks of the replica know each other by.
        attention_secret: what model ranks and attention workers know each other by.

    Raises:
        WorkerFailed: it took too long, or ended its answer too soon.
        grpc.aio.AioRpcError: it failed, in its own words.
    """
    if command.replica == GROUP:
        request = settings.attention_request(command.shard, epoch=command.epoch, secret=attention_secret)
    else:
        request = settings.load_request(
            command.replica, command.shard, epoch=command.epoch, members=wire.members(command.members), token=token
        )
        settings.add_residency(request, command.replica, wire.attention_workers(command.attention), attention_secret)
    timeout_s = settings.load_timeout_s
    async with open_channel(command.address) as channel:
        stub: worker_pb2_grpc.WorkerAsyncStub = worker_pb2_grpc.WorkerStub(channel)
        try:
            async for progress in stub.Load(request, timeout=timeout_s):
                event = _event(command, progress)
                yield event
                if isinstance(event, RankLoaded):
                    return
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                late = f"did not load within launch.load_timeout_s = {timeout_s:g} s; raise it or check the disk"
                raise WorkerFailed(late) from None
            if error.code() is grpc.StatusCode.UNAVAILABLE:
                await asyncio.sleep(EXIT_SEEN_S)
            raise
    raise WorkerFailed("ended its answer before it had loaded")


def _event(command: LoadRank, progress: worker_pb2.LoadResponse) -> RankProgress | RankLoaded:
    replica, epoch, rank = command.replica, command.epoch, command.rank
    if progress.phase == worker_pb2.LOAD_PHASE_READY:
        return RankLoaded(replica=replica, epoch=epoch, rank=rank, measured=read_measurements(progress.measured))
    return RankProgress(
        replica=replica,
        epoch=epoch,
        rank=rank,
        loaded_bytes=progress.loaded_bytes,
        total_bytes=progress.total_bytes,
        loading=wire.loading(progress.phase),
    )
