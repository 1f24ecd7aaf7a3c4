"""Knows the replicas: follows the controller and keeps a leader stream to each replica that is ready.

A controller that cannot be reached changes nothing: the last deployment it told of stays in force.
"""

import asyncio
import contextlib
import itertools
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import grpc

from orchestrator.background import BackgroundTasks
from orchestrator.gateway.errors import ReplicaUnavailable
from orchestrator.gateway.fleet.binding import BindingQueue
from orchestrator.gateway.fleet.inbox import Inbox, Loss, Lost
from orchestrator.gateway.fleet.leader import Leader, LeaderLimits, StepHook
from orchestrator.gateway.fleet.unready import why_unready
from placement.planning.limits import ReplicaLimits
from placement.planning.plan import Role
from placement.serving.routing.binding import Bindings, Waiting, WaitReason, bind, share
from placement.serving.routing.choice import ReplicaLoad, Route, RouteKind
from placement.serving.routing.router import Disaggregation, Prompt, Router
from placement.serving.step_plan import StepLoad
from protos.codec.log_record import said
from protos.heterodyne.control.v1 import control_pb2 as pb
from protos.heterodyne.control.v1 import control_pb2_grpc as pb_grpc
from protos.heterodyne.worker.v1 import worker_pb2

logger = logging.getLogger(__name__)

_RECONNECT_S = 0.5
_CHANNEL_OPTIONS = [("grpc.enable_http_proxy", 0)]
_REPORT_TIMEOUT_S = 2.0
_ROLES = {pb.ROLE_PREFILL: Role.PREFILL, pb.ROLE_DECODE: Role.DECODE}


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """Says which replicas serve a request. It is to be submitted at once.

    Attributes:
        leader: of the replica that computes the answer.
        helper: of the one that computes the prompt for it; None: it computes the prompt itself.
        num_blocks: KV blocks that are taken for the prompt where the answer is computed, before it comes.
    """

    leader: Leader
    route: Route
    helper: Leader | None = None
    num_blocks: int = 0

    def submit(self, message: worker_pb2.Submit, inbox: Inbox) -> None:
        """Hands the request's sequences over. Their events arrive in ``inbox``."""
        self.leader.submit(
            message, inbox, new_tokens=self.route.new_tokens, helper=self.helper, num_blocks=self.num_blocks
        )


class Fleet:
    """Holds every replica and routes requests to them. Lives on one event loop.

    Attributes:
        deployment: the deployment that the controller last told of.
        controller_connected: whether the controller can still be heard.
        losses: how often each replica was lost, by its name and the kind of cause.
        routes: how many requests were bound, by the kind of their route.
        transfers: how many prompts were computed for another replica, by both names and by whether they came.

    Args:
        limits: says when a leader counts as lost.
        sizes: the sizes that every replica serves within.
        disaggregation: whether one replica computes a prompt and another its answer.
        kv_bytes_per_token: bytes of the keys and values of a token, as replicas send them; 0: not known.
    """

    def __init__(
        self,
        *,
        control_address: str,
        limits: LeaderLimits,
        sizes: ReplicaLimits,
        on_change: Callable[[], None],
        on_step: StepHook | None = None,
        disaggregation: Disaggregation = "auto",
        kv_bytes_per_token: int = 0,
    ) -> None:
        self.deployment = pb.WatchResponse()
        self.controller_connected = False
        self.losses: Counter[tuple[str, Loss]] = Counter()
        self.routes: Counter[RouteKind] = Counter()
        self.transfers: Counter[tuple[str, str, bool]] = Counter()
        self._is_stopped = False
        self._control_address = control_address
        self._limits = limits
        self._on_change = on_change
        self._on_step = on_step
        self._sizes = sizes
        self._router = Router(sizes, mode=disaggregation, kv_bytes_per_token=kv_bytes_per_token)
        self._queue = BindingQueue(self._bind)
        self._numbers = itertools.count()
        self._reserved: dict[int, list[Leader]] = {}  # by request, where it is bound and not yet submitted
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
        self._queue.wake()  # what waits goes elsewhere, or nowhere

    def leader(self, name: str, epoch: int) -> Leader | None:
        """Returns the leader of that incarnation, if it was ever ready."""
        return self._leaders.get((name, epoch))

    @property
    def num_waiting(self) -> int:
        """Counts the requests that wait for a replica with room."""
        return len(self._queue)

    def waiting(self) -> Counter[WaitReason]:
        """Counts the requests that wait for a replica with room, by what is short."""
        return self._queue.counts()

    async def route(self, prompt: Prompt, *, priority: int = 0, timeout_s: float | None = None) -> Bound:
        """Waits for a replica that has room for a request, which is to be submitted to it at once.

        Where one has, this returns without a turn of the loop. Else it waits by priority, then in order of arrival.

        Raises:
            ReplicaUnavailable: no replica is ready.
            QueueTimeout: none had room within ``timeout_s``.
        """
        loop = asyncio.get_running_loop()
        overdue_s = None if timeout_s is None else loop.time() + timeout_s
        request = Waiting(number=next(self._numbers), prompt=prompt, priority=priority)
        try:
            while True:
                left_s = None if overdue_s is None else max(0.0, overdue_s - loop.time())
                route = await self._queue.take(request, timeout_s=left_s)
                bound = self._bound(route, prompt)
                if bound is not None:
                    self.routes[route.kind] += 1
                    return bound
                self._unreserve(request.number)  # a replica was lost meanwhile: it waits again, in its old place
        except BaseException:
            self._queue.wake()  # somebody else may have the room
            raise
        finally:
            self._unreserve(request.number)

    def _bind(self, waiting: Sequence[Waiting]) -> Bindings:
        """Decides which requests are bound, and reserves room for them. Raises ReplicaUnavailable."""
        loads = self.loads()
        if not loads:
            raise ReplicaUnavailable(self._why_none())
        num_tokens = sum(len(request.prompt.token_ids) for request in waiting)
        self._router.balance(loads, waiting_tokens=num_tokens, num_waiting=len(waiting))
        bindings = bind(waiting, loads, self._sizes, self._router.choose)
        prompts = {request.number: request.prompt for request in waiting}
        by_name = {load.name: load for load in loads}
        live = self._live()
        for number, route in bindings.bound.items():
            self._router.sent(route, loads, prompts[number])
            for name in {route.replica, route.prefill or route.replica}:
                part = share(by_name[name], route, prompts[number], self._sizes)
                live[name].ledger.add(
                    _reservation(number),
                    part.num_tokens,
                    num_sequences=part.num_sequences,
                    num_blocks=part.num_blocks,
                )
                self._reserved.setdefault(number, []).append(live[name])
        return bindings

    def _bound(self, route: Route, prompt: Prompt) -> Bound | None:
        """Returns the leaders of a route; None where one of them is lost."""
        live = self._live()
        leader, helper = live.get(route.replica), None if route.prefill is None else live.get(route.prefill)
        if leader is None or (route.prefill is not None and helper is None):
            return None
        part = share(leader.replica_load(), route, prompt, self._sizes)
        return Bound(leader=leader, route=route, helper=helper, num_blocks=part.num_blocks)

    def _unreserve(self, number: int) -> None:
        for leader in self._reserved.pop(number, []):
            leader.ledger.drop(_reservation(number))

    def _live(self) -> dict[str, Leader]:
        return {leader.name: leader for leader in self._leaders.values() if leader.accepting}

    def _why_none(self) -> str:
        if self._is_stopped:
            return "the service was stopped"
        lost = {key: leader.lost.kind for key, leader in self._leaders.items() if leader.lost is not None}
        return why_unready(self.deployment, lost)

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
                self._connect(replica)
            elif replica.phase in (pb.PHASE_FAILED, pb.PHASE_STOPPED) and key in self._leaders:
                kind = Loss.RANK_FAILED if replica.phase == pb.PHASE_FAILED else Loss.STOPPED
                self._leaders[key].give_up(Lost(cause=replica.cause or "the replica was stopped", kind=kind))
                self._tasks[key].cancel()
        self._on_change()

    def _connect(self, replica: pb.Replica) -> None:
        key = name, epoch = replica.name, replica.epoch
        leader = Leader(
            name=name,
            epoch=epoch,
            address=replica.ranks[0].address,
            limits=self._limits,
            on_step=self._stepped,
            on_lost=partial(self._count_loss, name),
            on_room=self._queue.wake,
            on_transfer=self._transferred,
            role=_ROLES.get(replica.role, Role.MIXED),
            block_size=replica.block_size or self._sizes.block_size,
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

    def _transferred(self, prefill: str, replica: str, transfer: worker_pb2.KvTransfer) -> None:
        """Learns what became of keys and values that one replica was to send to another."""
        came = not transfer.problem
        self.transfers[prefill, replica, came] += 1
        if not came:
            self._router.transfer_failed(prefill, replica)
        elif transfer.num_tokens:
            self._router.transferred(
                prefill,
                replica,
                num_tokens=transfer.num_tokens,
                num_bytes=transfer.num_bytes,
                exposed_s=transfer.exposed_s,
            )

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


def _reservation(number: int) -> tuple[str, int]:
    """Returns what a ledger knows a request by that is bound and not yet submitted."""
    return "bound", number
