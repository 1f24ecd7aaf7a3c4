"""The shell around the controller's state machine: runs commands, feeds back events, tells whoever watches.

Knows no Ray: the launcher is a seam, so the shell is tested with real worker processes and no cluster.
"""

import asyncio
import hmac
import logging
import secrets
import time
from collections.abc import AsyncIterator, Mapping
from typing import Protocol

import grpc

from orchestrator.background import BackgroundTasks
from orchestrator.controller import events, wire
from orchestrator.controller import state as machine
from orchestrator.controller.settings import DeploymentSettings
from orchestrator.launcher.agent import Started
from orchestrator.launcher.process import HowEnded, WorkerEnd, WorkerFailed
from placement.errors import cause_of
from placement.planning.plan import Shard
from protos.codec.measured import read_measurements
from protos.heterodyne.control.v1 import control_pb2 as pb
from protos.heterodyne.worker.v1 import worker_pb2, worker_pb2_grpc

logger = logging.getLogger(__name__)

_EXIT_SEEN_S = 0.3
_CHANNEL_OPTIONS = [("grpc.enable_http_proxy", 0)]


class Launcher(Protocol):
    """Starts and stops worker processes. A rank is named (replica, rank)."""

    async def reserve(self, shards: Mapping[tuple[str, int], Shard]) -> None: ...
    async def start(self, key: tuple[str, int], *, epoch: int, shard: Shard) -> Started: ...
    async def wait(self, key: tuple[str, int]) -> WorkerEnd: ...
    async def stop(self, key: tuple[str, int]) -> None: ...
    async def close(self) -> None: ...


def new_epoch() -> int:
    """Of an incarnation of the replicas: greater than all before."""
    return time.time_ns() // 1_000_000


def open_channel(address: str) -> grpc.aio.Channel:
    """To a worker."""
    return grpc.aio.insecure_channel(address, options=_CHANNEL_OPTIONS)


class ControllerShell:
    """Owns the deployment's state and its version; everything happens on one event loop."""

    def __init__(self, *, launcher: Launcher, settings: DeploymentSettings) -> None:
        self._launcher = launcher
        self._settings = settings
        # What the ranks of a replica know each other by is made of it.
        self._secret = secrets.token_bytes(32)
        self._state = machine.State()
        self._version = 0
        self._changed = asyncio.Condition()
        self._starts = BackgroundTasks()
        self._background = BackgroundTasks()

    @property
    def state(self) -> machine.State:
        """The deployment as it stands."""
        return self._state

    async def launch(self, epoch: int | None = None) -> None:
        """Reserve and start everything the plan names; failures become events, not exceptions.

        Args:
            epoch: that of workers which were started early; None: a new one.
        """
        plan = self._settings.plan
        await self.dispatch(events.Launch(plan=plan, epoch=new_epoch() if epoch is None else epoch))

    async def dispatch(self, event: events.Event) -> None:
        """Apply an event, tell the watchers, start what must be done."""
        before = self._state
        self._state, commands = machine.apply(before, event)
        if self._state != before:
            self._version += 1
            _log_changes(before, self._state)
            async with self._changed:
                self._changed.notify_all()
        if commands and isinstance(event, events.Launch):
            self._starts.spawn(self._reserve_then(commands))
        else:
            self._spawn(commands)

    def _spawn(self, commands: tuple[events.Command, ...]) -> None:
        for command in commands:
            tasks = self._starts if isinstance(command, events.StartRank) else self._background
            tasks.spawn(self._run(command))

    async def watch(self) -> AsyncIterator[pb.WatchResponse]:
        """The deployment now, then whenever it changes; a slow watcher skips states in between."""
        seen = -1
        while True:
            async with self._changed:
                while self._version == seen:
                    await self._changed.wait()
            seen = self._version
            yield wire.deployment(self._state, version=seen)

    async def report_lost(self, replica: str, epoch: int, cause: str) -> None:
        """The gateway says that a leader no longer answers.

        Its stream breaks a moment before the process's own end is seen here, and that end is the better cause.
        """
        await asyncio.sleep(_EXIT_SEEN_S)
        await self.dispatch(events.RankFailed(replica=replica, epoch=epoch, rank=0, cause=cause))

    async def shutdown(self, timeout_s: float) -> None:
        """Stop every worker, whatever its state; returns when none is left."""
        # First, so that none comes up behind the back of what follows.
        await self._starts.close()
        await self.dispatch(events.Shutdown())
        try:
            async with asyncio.timeout(timeout_s):
                async with self._changed:
                    await self._changed.wait_for(lambda: self._state.phase is machine.Phase.STOPPED)
        except TimeoutError:
            logger.warning("shutdown_forced")
        await self._launcher.close()
        await self._background.close()

    # -- commands ---------------------------------------------------------------------------------------------

    async def _reserve_then(self, commands: tuple[events.Command, ...]) -> None:
        starts = [command for command in commands if isinstance(command, events.StartRank)]
        try:
            await self._launcher.reserve({(start.replica, start.shard.rank): start.shard for start in starts})
        except Exception as error:
            logger.exception("reserve_failed")
            for start in starts:
                await self._failed(start.replica, start.epoch, start.shard.rank, error)
            return
        self._spawn(commands)

    async def _run(self, command: events.Command) -> None:
        match command:
            case events.StartRank(replica=replica, epoch=epoch, shard=shard):
                try:
                    await self._start(replica, epoch, shard)
                except Exception as error:  # the border: any failure to start is the rank's cause
                    await self._failed(replica, epoch, shard.rank, error)
            case events.LoadRank(replica=replica, epoch=epoch, shard=shard):
                try:
                    await self._load(command)
                except Exception as error:  # likewise
                    await self._failed(replica, epoch, shard.rank, error)
            case events.StopRank(replica=replica, epoch=epoch, rank=rank):
                try:
                    await self._launcher.stop((replica, rank))
                finally:  # nobody waits for a rank that we have let go of
                    await self.dispatch(events.RankStopped(replica=replica, epoch=epoch, rank=rank))

    async def _failed(self, replica: str, epoch: int, rank: int, error: Exception) -> None:
        if isinstance(error, grpc.aio.AioRpcError):
            cause = f"{error.details()} ({error.code().name})"
        elif isinstance(error, WorkerFailed):
            cause = str(error)
        else:
            logger.exception("command_failed", exc_info=error)
            cause = cause_of(error)
        await self.dispatch(events.RankFailed(replica=replica, epoch=epoch, rank=rank, cause=cause))

    async def _start(self, replica: str, epoch: int, shard: Shard) -> None:
        key = (replica, shard.rank)
        started = await self._launcher.start(key, epoch=epoch, shard=shard)
        self._background.spawn(self._follow(key, epoch))
        await self.dispatch(
            events.RankStarted(
                replica=replica,
                epoch=epoch,
                rank=shard.rank,
                node=started.node,
                address=started.address,
                ranks_port=started.ranks_port,
                pid=started.pid,
            )
        )
        if self._ended(key, epoch):
            # Told to stop while it was starting, when there was nothing yet to stop.
            await self._launcher.stop(key)

    def _ended(self, key: tuple[str, int], epoch: int) -> bool:
        return any(
            rank.phase.ended
            for replica in self._state.replicas
            for rank in replica.ranks
            if (replica.name, rank.shard.rank, replica.epoch) == (*key, epoch)
        )

    async def _follow(self, key: tuple[str, int], epoch: int) -> None:
        """Wait for the process to end and say so."""
        replica, rank = key
        end = await self._launcher.wait(key)
        # When all ranks are told to end, those that end first are lost to the others.
        drained = end.how is HowEnded.PEER_LOST and self._state.phase is machine.Phase.DRAINING
        if end.how is HowEnded.STOPPED or drained:
            await self.dispatch(events.RankStopped(replica=replica, epoch=epoch, rank=rank))
            return
        if end.how is HowEnded.PEER_LOST:
            await asyncio.sleep(_EXIT_SEEN_S)  # the other rank's own end may be seen after this
        await self.dispatch(events.RankFailed(replica=replica, epoch=epoch, rank=rank, cause=end.cause))

    async def _load(self, command: events.LoadRank) -> None:
        token = hmac.digest(self._secret, f"{command.replica} {command.epoch}".encode(), "sha256")
        request = self._settings.load_request(
            command.shard, epoch=command.epoch, members=wire.members(command.members), token=token
        )
        replica, epoch, rank = command.replica, command.epoch, command.shard.rank
        timeout_s = self._settings.load_timeout_s
        async with open_channel(command.address) as channel:
            stub: worker_pb2_grpc.WorkerAsyncStub = worker_pb2_grpc.WorkerStub(channel)
            try:
                async for progress in stub.Load(request, timeout=timeout_s):
                    if progress.phase == worker_pb2.LOAD_PHASE_READY:
                        measured = read_measurements(progress.measured)
                        loaded = events.RankLoaded(replica=replica, epoch=epoch, rank=rank, measured=measured)
                        await self.dispatch(loaded)
                    else:
                        size = progress.loaded_bytes
                        event = events.RankProgress(replica=replica, epoch=epoch, rank=rank, loaded_bytes=size)
                        await self.dispatch(event)
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                    late = f"did not load within launch.load_timeout_s = {timeout_s:g} s; raise it or check the disk"
                    raise WorkerFailed(late) from None
                if error.code() is grpc.StatusCode.UNAVAILABLE:
                    # The connection of a process that ends breaks before its end is seen, which is the better cause.
                    await asyncio.sleep(_EXIT_SEEN_S)
                raise


def _log_changes(before: machine.State, after: machine.State) -> None:
    """One structured line for each replica whose phase changed, and for the deployment."""
    old = {replica.name: replica.phase for replica in before.replicas}
    for replica in after.replicas:
        if old.get(replica.name) is not replica.phase:
            failed = replica.phase is machine.Phase.FAILED
            detail = f' cause="{replica.cause}"' if failed else ""
            # Not an error of the controller's: `serve`, which watches it, is who tells the user.
            logger.info(
                "replica=%s epoch=%d phase=%s%s",
                replica.name,
                replica.epoch,
                replica.phase.value,
                detail,
            )
    if before.phase is not after.phase:
        logger.info("deployment phase=%s", after.phase.value)
