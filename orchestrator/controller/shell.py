"""The shell around the controller's decisions: keeps the state, does what is planned, tells whoever watches.

Knows no Ray: the launcher is a seam, so the shell is tested with real worker processes and no cluster.
"""

import asyncio
import hmac
import logging
import secrets
import time
from collections.abc import AsyncIterator, Mapping
from functools import partial
from typing import Protocol

import grpc

from orchestrator.background import BackgroundTasks
from orchestrator.controller import events, wire
from orchestrator.controller import state as machine
from orchestrator.controller.events import RankKey
from orchestrator.controller.loading import EXIT_SEEN_S, load_rank
from orchestrator.controller.settings import DeploymentSettings
from orchestrator.controller.supervision import Observed, plan
from orchestrator.launcher.agent import Started
from orchestrator.launcher.process import HowEnded, WorkerEnd, WorkerFailed
from placement.errors import cause_of
from placement.planning.attention import GROUP
from placement.planning.plan import Shard
from protos.codec.log_record import said
from protos.heterodyne.control.v1 import control_pb2 as pb

logger = logging.getLogger(__name__)


class Launcher(Protocol):
    """Starts and stops worker processes. A rank is named (replica, rank)."""

    async def reserve(self, shards: Mapping[RankKey, Shard]) -> None: ...
    async def start(self, key: RankKey, *, epoch: int, shard: Shard) -> Started: ...
    async def wait(self, key: RankKey) -> WorkerEnd: ...
    async def stop(self, key: RankKey) -> None: ...
    async def close(self) -> None: ...


def new_epoch() -> int:
    """Returns the epoch of a new incarnation of the replicas, greater than all before."""
    return time.time_ns() // 1_000_000


class ControllerShell:
    """Owns the deployment's state and its version; everything happens on one event loop.

    After every event, and whenever a command has ended, it begins what is planned and not yet under way.
    """

    def __init__(self, *, launcher: Launcher, settings: DeploymentSettings) -> None:
        self._launcher = launcher
        self._settings = settings
        # The token by which the ranks of a replica know each other is made of it.
        self._secret = secrets.token_bytes(32)
        self._state = machine.State()
        self._version = 0
        self._changed = asyncio.Condition()
        self._reserved = False
        self._processes: set[RankKey] = set()
        self._followed: set[RankKey] = set()
        self._under_way: set[tuple[object, ...]] = set()
        self._closed = False
        self._starts = BackgroundTasks()
        self._background = BackgroundTasks()

    @property
    def state(self) -> machine.State:
        """The deployment as it is now."""
        return self._state

    async def launch(self, epoch: int | None = None) -> None:
        """Reserves and starts everything the plan names; failures become events, not exceptions.

        Args:
            epoch: that of workers which were started early; None: a new one.
        """
        epoch = new_epoch() if epoch is None else epoch
        await self.dispatch(events.Launch(plan=self._settings.plan, epoch=epoch))

    async def dispatch(self, event: events.Event) -> None:
        """Applies an event, tells the watchers, begins what is to be done."""
        await self._apply(event)
        self._supervise()

    async def _apply(self, event: events.Event) -> None:
        before = self._state
        self._state = machine.apply(before, event)
        if self._state != before:
            self._version += 1
            _log_changes(before, self._state)
            async with self._changed:
                self._changed.notify_all()

    def _supervise(self) -> None:
        """Begins what is planned and not under way."""
        if self._closed:
            return
        observed = Observed(
            reserved=self._reserved, processes=frozenset(self._processes), followed=frozenset(self._followed)
        )
        for command in plan(self._state, observed):
            name = _name_of(command)
            if name not in self._under_way:
                self._under_way.add(name)
                is_start = isinstance(command, events.Reserve | events.StartRank)
                task = (self._starts if is_start else self._background).spawn(self._run(command))
                task.add_done_callback(partial(self._ended, name))

    def _ended(self, name: tuple[object, ...], _task: "asyncio.Task[None]") -> None:
        self._under_way.discard(name)
        self._supervise()

    async def watch(self) -> AsyncIterator[pb.WatchResponse]:
        """Yields the deployment now, then whenever it changes; a slow watcher skips states in between."""
        seen = -1
        while True:
            async with self._changed:
                while self._version == seen:
                    await self._changed.wait()
            seen = self._version
            yield wire.deployment(
                self._state, version=seen, plan=self._settings.plan, offloading=self._settings.offloading
            )

    async def report_lost(self, replica: str, epoch: int, cause: str) -> None:
        """Takes the gateway's word that a leader no longer answers.

        Its stream breaks a moment before the process's own end is seen here, and that end is the better cause.
        """
        await asyncio.sleep(EXIT_SEEN_S)
        await self.dispatch(events.RankFailed(replica=replica, epoch=epoch, rank=0, cause=cause))

    async def shutdown(self, timeout_s: float) -> None:
        """Stops every worker, whatever its state; returns when none is left."""
        await self._apply(events.Shutdown())
        # Before anything is stopped, so that no worker comes up behind the back of what follows.
        await self._starts.close()
        self._supervise()
        try:
            async with asyncio.timeout(timeout_s):
                async with self._changed:
                    await self._changed.wait_for(lambda: self._state.phase is machine.Phase.STOPPED)
        except TimeoutError:
            words = "Some workers did not end within %g s; they are killed."
            logger.warning(words, timeout_s, extra=said("shutdown_forced", timeout_s=timeout_s))
        self._closed = True
        await self._launcher.close()
        await self._background.close()

    # -- commands ---------------------------------------------------------------------------------------------

    async def _run(self, command: events.Command) -> None:
        """Runs a command to its end; whatever goes wrong becomes the cause of the rank's failure."""
        match command:
            case events.Reserve():
                await self._reserve(command)
            case events.StopRank():
                await self._stop(command)
            case events.StartRank() | events.FollowRank() | events.LoadRank():
                try:
                    await self._run_worker(command)
                except Exception as error:  # the border: a worker may fail in any way
                    await self._failed((command.replica, command.rank), command.epoch, _why(error))

    async def _run_worker(self, command: events.StartRank | events.FollowRank | events.LoadRank) -> None:
        match command:
            case events.StartRank():
                await self._start(command)
            case events.FollowRank():
                await self._follow(command)
            case events.LoadRank():
                await self._load(command)

    async def _failed(self, key: RankKey, epoch: int, cause: str) -> None:
        replica, rank = key
        await self.dispatch(events.RankFailed(replica=replica, epoch=epoch, rank=rank, cause=cause))

    async def _reserve(self, command: events.Reserve) -> None:
        try:
            await self._launcher.reserve(dict(command.shards))
            self._reserved = True
        except Exception as error:  # the border, likewise
            cause = _why(error)
            for key, _ in command.shards:
                await self._failed(key, command.epoch, cause)

    async def _start(self, command: events.StartRank) -> None:
        key = (command.replica, command.rank)
        try:
            started = await self._launcher.start(key, epoch=command.epoch, shard=command.shard)
        finally:  # also where the start failed half-way, or came up after the rank was stopped
            self._processes.add(key)
        event = events.RankStarted(
            replica=command.replica,
            epoch=command.epoch,
            rank=command.rank,
            node=started.node,
            address=started.address,
            ranks_port=started.ranks_port,
            pid=started.pid,
            target=started.target,
        )
        await self.dispatch(event)

    async def _stop(self, command: events.StopRank) -> None:
        key = (command.replica, command.rank)
        try:
            await self._launcher.stop(key)
        finally:  # nobody waits for a rank that we have let go of
            self._processes.discard(key)
            stopped = events.RankStopped(replica=command.replica, epoch=command.epoch, rank=command.rank)
            await self.dispatch(stopped)

    async def _load(self, command: events.LoadRank) -> None:
        token = hmac.digest(self._secret, f"{command.replica} {command.epoch}".encode(), "sha256")
        attention_secret = hmac.digest(self._secret, f"{GROUP} {command.epoch}".encode(), "sha256")
        async for event in load_rank(command, self._settings, token, attention_secret):
            await self.dispatch(event)

    async def _follow(self, command: events.FollowRank) -> None:
        """Waits for the process to end and says so."""
        key = (command.replica, command.rank)
        self._followed.add(key)
        try:
            await self._dispatch_end(command, await self._launcher.wait(key))
        finally:
            self._followed.discard(key)

    async def _dispatch_end(self, command: events.FollowRank, end: WorkerEnd) -> None:
        replica, epoch, rank = command.replica, command.epoch, command.rank
        # When all ranks are told to end, those that end first are lost to the others.
        drained = end.how is HowEnded.PEER_LOST and self._state.phase is machine.Phase.DRAINING
        if end.how is HowEnded.STOPPED or drained:
            await self.dispatch(events.RankStopped(replica=replica, epoch=epoch, rank=rank))
            return
        if end.how is HowEnded.PEER_LOST:
            await asyncio.sleep(EXIT_SEEN_S)  # the other rank's own end may be seen after this
        await self.dispatch(events.RankFailed(replica=replica, epoch=epoch, rank=rank, cause=end.cause))


def _why(error: Exception) -> str:
    """Returns the cause to tell of a command that failed; what nobody foresaw is logged with its traceback as well."""
    if isinstance(error, grpc.aio.AioRpcError):
        return error.details() or error.code().name
    if isinstance(error, WorkerFailed):
        return str(error)
    logger.exception("A command failed in a way that nobody foresaw.", exc_info=error, extra=said("command_failed"))
    return cause_of(error)


def _name_of(command: events.Command) -> tuple[object, ...]:
    """Returns what makes a command the same as one that is under way."""
    if isinstance(command, events.Reserve):
        return events.Reserve, command.epoch
    return type(command), command.replica, command.epoch, command.rank


def _log_changes(before: machine.State, after: machine.State) -> None:
    """Logs one line for each replica whose phase changed, and for the deployment."""
    old = {replica.name: replica.phase for replica in before.replicas}
    for replica in after.replicas:
        if old.get(replica.name) is not replica.phase:
            failed = replica.phase is machine.Phase.FAILED
            cause = replica.cause if failed else ""
            name, epoch, phase = replica.name, replica.epoch, replica.phase.value
            extra = said("controller_replica", replica=name, epoch=epoch, phase=phase, cause=cause)
            # `serve`, which watches the controller, is who tells the user.
            logger.debug("%s is %s %s", name, phase, cause, extra=extra)
    if before.phase is not after.phase:
        phase = after.phase.value
        logger.debug("The deployment is %s.", phase, extra=said("controller_deployment", phase=phase))
