"""Knows the replicas: follows the controller and keeps a leader stream to each replica that is ready.

A controller that cannot be reached changes nothing: the last deployment it told of stays in force.
"""

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Callable
from functools import partial

import grpc

from orchestrator.background import BackgroundTasks
from orchestrator.gateway.errors import ReplicaUnavailable
from orchestrator.gateway.fleet.inbox import Loss, Lost
from orchestrator.gateway.fleet.leader import Leader, LeaderLimits, StepHook
from orchestrator.gateway.fleet.unready import why_unready
from placement.planning.limits import ReplicaLimits
from placement.serving.routing.choice import ReplicaLoad, Route
from placement.serving.routing.router import Prompt, Router
from placement.serving.step_plan import StepLoad
from protos.codec.log_record import said
from protos.heterodyne.control.v1 import control_pb2 as pb
from protos.heterodyne.control.v1 import control_pb2_grpc as pb_grpc
from protos.heterodyne.worker.v1 import worker_pb2

logger = logging.getLogger(__name__)

_RECONNECT_S = 0.5
_CHANNEL_OPTIONS = [("grpc.enable_http_proxy", 0)]
_REPORT_TIMEOUT_S = 2.0


class Fleet:
    """Holds every replica and routes requests to them. Lives on one event loop.

    Attributes:
        deployment: the deployment that the controller last told of.
        controller_connected: whether the controller can still be heard.
        losses: how often each replica was lost, by its name and the kind of cause.

    Args:
        limits: says when a leader counts as lost.
        sizes: the sizes that every replica serves within.
    """

    def __init__(
        self,
        *,
        control_address: str,
        limits: LeaderLimits,
        sizes: ReplicaLimits,
        on_change: Callable[[], None],
        on_step: StepHook | None = None,
    ) -> None:
        self.deployment = pb.WatchResponse()
        self.controller_connected = False
        self.losses: Counter[tuple[str, Loss]] = Counter()
        self._is_stopped = False
        self._control_address = control_address
        self._limits = limits
        self._on_change = on_change
        self._on_step = on_step
        self._router = Router(sizes)
        self._leaders: dict[tuple[str, int], Leader] = {}
        self._tasks: dict[tuple[str, int], asyncio.Task[None]] = {}
        self._background = BackgroundTasks()

    @property
    def accepting(self) -> bool:
        """Says whether any replica takes requests."""
        return any(leader.accepting for leader in self._leaders.values())

    @property
    def fenced_messages(self) -> int:
        """Counts messages refused from passed epochs, on either side of the leader streams."""
        return sum(
            leader.fenced_messages + (leader.load.fenced_messages if leader.load else 0)
            for leader in self._leaders.values()
        )

    def loads(self) -> list[ReplicaLoad]:
        """Returns the last load of every replica that lives."""
        return [leader.replica_load() for leader in self._leaders.values() if leader.accepting]

    def reports(self) -> dict[tuple[str, int], worker_pb2.LoadReport]:
        """Returns the last report of every replica that lives, by its name and epoch."""
        return {
            key: leader.load for key, leader in self._leaders.items() if leader.lost is None and leader.load is not None
        }

    def _count_loss(self, name: str, lost: Lost) -> None:
        if lost.kind is not Loss.STOPPED:
            self.losses[name, lost.kind] += 1

    def leader(self, name: str, epoch: int) -> Leader | None:
        """Returns the leader of that incarnation, if it was ever ready."""
        return self._leaders.get((name, epoch))

    def route(self, prompt: Prompt) -> tuple[Leader, Route]:
        """Returns the leader that should serve a request, which is to be submitted to it at once.

        Raises:
            ReplicaUnavailable: no replica is ready.
        """
        live = {leader.name: leader for leader in self._leaders.values() if leader.accepting}
        route = self._router.route(self.loads(), prompt)
        if route is None:
            if self._is_stopped:
                raise ReplicaUnavailable("the service was stopped")
            lost = {key: leader.lost.kind for key, leader in self._leaders.items() if leader.lost is not None}
            raise ReplicaUnavailable(why_unready(self.deployment, lost))
        return live[route.replica], route

    async def follow(self) -> None:
        """Follows the controller for as long as the gateway lives."""
        while True:
            try:
                async with grpc.aio.insecure_channel(self._control_address, options=_CHANNEL_OPTIONS) as channel:
                    stub: pb_grpc.ControlAsyncStub = pb_grpc.ControlStub(channel)
                    async for deployment in stub.Watch(pb.WatchRequest()):
                        self.controller_connected = True
                        self._update(deployment)
            except grpc.aio.AioRpcError as error:
                if self.controller_connected:
                    # `serve` watches the controller too, and says so.
                    logger.debug(
                        "The controller cannot be heard.", extra=said("controller_lost", code=error.code().name)
                    )
            except Exception:
                # A gateway that no longer follows would serve an old plan for good.
                words = "What the controller said could not be followed."
                logger.exception(words, extra=said("controller_message_failed"))
            self.controller_connected = False
            await asyncio.sleep(_RECONNECT_S)

    def _update(self, deployment: pb.WatchResponse) -> None:
        """Opens streams to replicas that became ready; gives up those that no longer are."""
        self.deployment = deployment
        for replica in deployment.replicas:
            key = (replica.name, replica.epoch)
            if replica.phase == pb.PHASE_READY and key not in self._leaders:
                self._connect(key, replica.ranks[0].address)
            elif replica.phase in (pb.PHASE_FAILED, pb.PHASE_STOPPED) and key in self._leaders:
                kind = Loss.RANK_FAILED if replica.phase == pb.PHASE_FAILED else Loss.STOPPED
                self._leaders[key].give_up(Lost(cause=replica.cause or "the replica was stopped", kind=kind))
                self._tasks[key].cancel()
        self._on_change()

    def _connect(self, key: tuple[str, int], address: str) -> None:
        name, epoch = key
        count = partial(self._count_loss, name)
        leader = Leader(
            name=name, epoch=epoch, address=address, limits=self._limits, on_step=self._stepped, on_lost=count
        )
        self._router.restarted(name)
        # Of older incarnations only the newest is kept, for its cause.
        for old in [old for old in self._leaders if old[0] == key[0]]:
            self._leaders.pop(old)
            self._tasks.pop(old).cancel()
        self._leaders[key] = leader
        self._tasks[key] = self._background.spawn(self._keep(leader))

    def _stepped(self, replica: str, step: worker_pb2.StepOutput) -> None:
        """Learns of a step that a replica has run, and passes it on."""
        load = StepLoad(
            num_decodes=step.num_decodes,
            num_prefill_tokens=step.num_prefill_tokens,
            decode_context_tokens=step.decode_context_tokens,
            prefill_pairs=step.prefill_pairs,
        )
        # The last token's place in the answer tells how many it has.
        answers = [output.index + 1 for output in step.sequences if output.HasField("end") and output.HasField("index")]
        self._router.stepped(replica, load, step.duration_s, answers)
        if self._on_step is not None:
            self._on_step(replica, step)

    async def _keep(self, leader: Leader) -> None:
        """Follows a leader to its loss, then tells the controller until it knows."""
        await leader.run(self._on_change)
        assert leader.lost is not None
        report = pb.ReportLostRequest(replica=leader.name, epoch=leader.epoch, cause=leader.lost.cause)
        while self._believed_ready(leader):
            # The controller may be gone or slow; as long as it holds the replica for well, it is told again.
            with contextlib.suppress(grpc.aio.AioRpcError):
                async with grpc.aio.insecure_channel(self._control_address, options=_CHANNEL_OPTIONS) as channel:
                    stub: pb_grpc.ControlAsyncStub = pb_grpc.ControlStub(channel)
                    await stub.ReportLost(report, timeout=_REPORT_TIMEOUT_S)
            await asyncio.sleep(_RECONNECT_S)

    def _believed_ready(self, leader: Leader) -> bool:
        return any(
            (replica.name, replica.epoch, replica.phase) == (leader.name, leader.epoch, pb.PHASE_READY)
            for replica in self.deployment.replicas
        )

    def drain(self) -> None:
        """Tells every replica to take nothing more. Called when the last request has been submitted."""
        for leader in self._leaders.values():
            leader.drain()

    def stop(self) -> None:
        """Ends every sequence of every replica: the service stops now."""
        self._is_stopped = True
        for leader in self._leaders.values():
            leader.give_up(Lost(cause="the service was stopped", kind=Loss.STOPPED))

    async def close(self) -> None:
        """Closes every leader stream."""
        await self._background.close()
