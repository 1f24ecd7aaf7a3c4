"""Starts workers before there is a plan for them, and measures them for it. Knows no Ray, like the shell."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace

import grpc

from orchestrator.controller.events import RankKey
from orchestrator.controller.loading import open_channel
from orchestrator.controller.settings import DeploymentSettings
from orchestrator.controller.shell import Launcher, new_epoch
from orchestrator.controller.wire import device_speed
from orchestrator.launcher.agent import Started
from orchestrator.launcher.process import WorkerEnd, WorkerFailed
from placement.errors import cause_of
from placement.measured.speed import DeviceSpeed, NotMeasured
from placement.planning.plan import Shard
from protos.heterodyne.worker.v1 import worker_pb2, worker_pb2_grpc

MEASURE_TIMEOUT_S = 20.0
"""Limit of a measurement, which takes about a second, and more where code is compiled or a GPU is opened."""


class EarlyWorkers:
    """A launcher that may start its workers early, so that the processes that were measured are those that serve.

    A plan that comes later gives them other shards, but the same devices, nodes and cores.
    """

    def __init__(self, launcher: Launcher) -> None:
        self._launcher = launcher
        self._started: dict[RankKey, Started] = {}
        self._measuring: asyncio.Task[tuple[DeviceSpeed | NotMeasured, ...]] | None = None
        self.epoch = new_epoch()

    async def measure(self, settings: DeploymentSettings) -> tuple[DeviceSpeed | NotMeasured, ...]:
        """Starts all workers of the plan, then measures all of them at the same time.

        Returns:
            The speed of each rank of the plan in order, attention workers last, or why it is not known.

        Raises:
            WorkerFailed: they could not be placed, or one of them did not start.
        """
        self._measuring = asyncio.create_task(self._measure(settings))
        return await self._measuring

    async def _measure(self, settings: DeploymentSettings) -> tuple[DeviceSpeed | NotMeasured, ...]:
        shards = settings.shards
        await self._launcher.reserve(shards)
        await self._start_all(shards)
        barrier = _Barrier(len(shards))
        requests = ((self._started[key].address, settings.speed_request(key[0], epoch=self.epoch)) for key in shards)
        return tuple(await asyncio.gather(*(_ask(address, request, barrier) for address, request in requests)))

    async def _start_all(self, shards: Mapping[RankKey, Shard]) -> None:
        starts = [asyncio.create_task(self._start_early(key, shard)) for key, shard in shards.items()]
        try:
            await asyncio.gather(*starts)
        finally:  # where one failed, none of the others comes up behind the back of who ends them
            for start in starts:
                start.cancel()
            await asyncio.wait(starts)

    async def _start_early(self, key: RankKey, shard: Shard) -> None:
        # What it will hold is not known yet; it looks itself whether there is memory for that, when it loads.
        bare = replace(shard, weight_bytes=0, kv_bytes=0, workspace_bytes=0)
        try:
            self._started[key] = await self._launcher.start(key, epoch=self.epoch, shard=bare)
        except WorkerFailed as error:
            raise WorkerFailed(f"{shard.described(key[0])}: {error}") from error

    # -- the launcher's seam ----------------------------------------------------------------------------------

    async def reserve(self, shards: Mapping[RankKey, Shard]) -> None:
        """Stops those that were started early and are in no plan: attention workers that would not pay."""
        if not self._started:
            await self._launcher.reserve(shards)
            return
        assert shards.keys() <= self._started.keys(), (shards.keys(), self._started.keys())
        for key in self._started.keys() - shards.keys():
            await self._launcher.stop(key)
            del self._started[key]

    async def start(self, key: RankKey, *, epoch: int, shard: Shard) -> Started:
        """Returns the worker that was started early, or starts one."""
        return self._started.get(key) or await self._launcher.start(key, epoch=epoch, shard=shard)

    async def wait(self, key: RankKey) -> WorkerEnd:
        """Waits as the launcher does."""
        return await self._launcher.wait(key)

    async def stop(self, key: RankKey) -> None:
        """Stops as the launcher does."""
        await self._launcher.stop(key)

    async def close(self) -> None:
        """Ends a measurement that is under way, then closes the launcher."""
        if self._measuring is not None:
            self._measuring.cancel()
            await asyncio.wait([self._measuring])
        await self._launcher.close()


class _Barrier:
    """Opens once all who are expected have arrived."""

    def __init__(self, num_expected: int) -> None:
        self._num_missing = num_expected
        self.is_open = asyncio.Event()

    def arrive(self) -> None:
        """Is called once by each of them."""
        self._num_missing -= 1
        if not self._num_missing:
            self.is_open.set()


async def _ask(address: str, request: worker_pb2.MeasureSpeedRequest, barrier: _Barrier) -> DeviceSpeed | NotMeasured:
    """Asks a worker how fast it is; it measures once all others are ready to, as they share memory when they serve."""

    async def requests() -> AsyncIterator[worker_pb2.MeasureSpeedRequest]:
        yield request
        await barrier.is_open.wait()
        yield request

    measured = None
    try:
        async with open_channel(address) as channel:
            stub: worker_pb2_grpc.WorkerAsyncStub = worker_pb2_grpc.WorkerStub(channel)
            answers = aiter(stub.MeasureSpeed(requests(), timeout=MEASURE_TIMEOUT_S))
            try:
                await anext(answers, None)  # it is ready
            finally:  # one that cannot be measured keeps none of the others waiting
                barrier.arrive()
            measured = await anext(answers, None)
    except grpc.aio.AioRpcError as error:
        if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
            return NotMeasured(cause=f"was not measured within {MEASURE_TIMEOUT_S:g} s")
        return NotMeasured(cause=f"{error.details() or cause_of(error)} ({error.code().name})")
    speed = None if measured is None else device_speed(measured)
    return speed or NotMeasured(cause="measured no speed that a device can have")
