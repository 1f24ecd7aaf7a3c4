"""Keeps the gateway's end of a leader stream: one long-lived stream to the leader of an incarnation of a replica."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import grpc

from orchestrator.gateway.fleet.inbox import Inbox, Loss, Lost, Rounds
from orchestrator.gateway.fleet.ledger import Ledger
from placement.measured.patience import Patience
from placement.planning.plan import Role
from placement.serving.routing.choice import ReplicaLoad
from protos.codec.log_record import said
from protos.heterodyne.worker.v1 import worker_pb2 as pb
from protos.heterodyne.worker.v1 import worker_pb2_grpc as pb_grpc

logger = logging.getLogger(__name__)

# Keepalive notices a host that is cut off; the heartbeat on the stream notices everything else, sooner.
_CHANNEL_OPTIONS = [
    ("grpc.enable_http_proxy", 0),
    ("grpc.keepalive_time_ms", 1000),
    ("grpc.keepalive_timeout_ms", 1500),
    ("grpc.http2.ping_timeout_ms", 1500),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_receive_message_length", 64 << 20),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaderLimits:
    """Says when a leader counts as lost.

    Attributes:
        heartbeat_timeout_s: after this long without any message.
        stall_timeout_s: after this long with running sequences and no step finished, where steps are not so slow that
            :class:`placement.measured.patience.Patience` allows more.
    """

    heartbeat_timeout_s: float
    stall_timeout_s: float


# Given the replica's name and each step that it finished.
StepHook = Callable[[str, pb.StepOutput], None]
# Given the replica that was to compute the prompt of a sequence, the one that answers, and what became of it.
TransferHook = Callable[[str, str, pb.KvTransfer], None]
LeadCall = grpc.aio.StreamStreamCall[pb.LeadRequest, pb.LeadResponse]


class Leader:
    """Speaks with one replica's leader, from connection to loss. Lives on one event loop.

    Args:
        on_step: is told of every step that computed something and is not fenced, after its tokens went on their way.
            It must be quick and raise nothing.
        on_lost: is told once why the replica was given up. It must raise nothing.
        on_room: is told when there may be room for more. It must be quick and raise nothing.
        on_transfer: is told what became of keys and values that another replica was to send. It must raise nothing.

    Attributes:
        ledger: what the replica has to do.
        load: its last report, None before the first.
        lost: why it was given up; None while it lives.
        fenced_messages: messages refused because they carried another epoch.
    """

    def __init__(
        self,
        *,
        name: str,
        epoch: int,
        address: str,
        limits: LeaderLimits,
        on_step: StepHook | None = None,
        on_lost: Callable[[Lost], None] = lambda _: None,
        on_room: Callable[[], None] = lambda: None,
        on_transfer: TransferHook = lambda prefill, replica, transfer: None,
        role: Role = Role.MIXED,
        block_size: int = 0,
    ) -> None:
        self.ledger = Ledger(name, role=role, block_size=block_size)
        self.name = name
        self.epoch = epoch
        self.address = address
        self.load: pb.LoadReport | None = None
        self.lost: Lost | None = None
        self.fenced_messages = 0
        self._limits = limits
        self._on_step = on_step
        self._on_lost = on_lost
        self._on_room = on_room
        self._on_transfer = on_transfer
        self._rounds = Rounds()
        self._reported_s = 0.0
        self._silent_s = 0.0
        self._stalled_s = 0.0
        self._patience = Patience(floor_s=limits.stall_timeout_s)
        self._inboxes: dict[int, Inbox] = {}
        self._num_prompt_tokens: dict[int, int] = {}  # of the sequences that have not ended
        self._helpers: dict[int, Leader] = {}  # by sequence, who is computing its prompt
        self._outbox: asyncio.Queue[pb.LeadRequest | None] = asyncio.Queue()

    # -- sequences --------------------------------------------------------------------------------------------

    def submit(
        self,
        message: pb.Submit,
        inbox: Inbox,
        *,
        new_tokens: int | None = None,
        helper: "Leader | None" = None,
        num_blocks: int = 0,
    ) -> None:
        """Hands sequences over. Their events arrive in ``inbox``; the last one of each says so.

        Args:
            new_tokens: tokens of the prompt that are expected to be computed; None: all.
            helper: the leader of the replica that computes the prompt for this one.
            num_blocks: KV blocks that this one takes for it at once.
        """
        if self.lost is not None:
            inbox.put_now(self.lost)
            return
        num_prompt = len(message.prompt_ids)
        num_tokens = num_prompt if new_tokens is None else new_tokens
        first = message.forks[0].sequence_id
        if helper is not None:
            message.prefill.CopyFrom(pb.PrefillSource(replica=helper.name, epoch=helper.epoch, address=helper.address))
            self._helpers[first] = helper
            helper.ledger.add(first, num_tokens, is_shipped=True)
        for fork in message.forks:
            self._inboxes[fork.sequence_id] = inbox
            self._num_prompt_tokens[fork.sequence_id] = num_prompt
            # As the replica's own report counts them: a sequence is pending with its whole prompt, shared or not.
            pending = 1 if helper is not None else num_tokens if fork.sequence_id == first else num_prompt
            self.ledger.add(fork.sequence_id, pending, num_blocks=num_blocks if fork.sequence_id == first else 0)
        self._send(pb.LeadRequest(submit=message))

    def release(self, sequence_id: int, *, cancel: bool) -> None:
        """Forgets a sequence; ``cancel`` tells the replica to, where it still computes it."""
        self._note_end(sequence_id)
        if self._inboxes.pop(sequence_id, None) is not None and cancel and self.lost is None:
            self._send(pb.LeadRequest(cancel=pb.Cancel(sequence_id=sequence_id)))

    def drain(self) -> None:
        """Tells the replica to finish what it has and to take nothing more."""
        if self.lost is None:
            self._send(pb.LeadRequest(drain=pb.Drain()))

    def _send(self, message: pb.LeadRequest) -> None:
        message.epoch = self.epoch
        self._outbox.put_nowait(message)

    # -- figures ----------------------------------------------------------------------------------------------

    @property
    def accepting(self) -> bool:
        """Says whether the replica can be given sequences: it has reported and is not lost."""
        return self.load is not None and self.lost is None

    @property
    def report_age_s(self) -> float:
        """Returns the age of the last load report."""
        return time.monotonic() - self._reported_s

    def replica_load(self) -> ReplicaLoad:
        """Returns the load for routing: the last report, and what was submitted since."""
        return self.ledger.load(self.load or pb.LoadReport(), accepting=self.accepting)

    # -- the stream -------------------------------------------------------------------------------------------

    async def run(self, on_change: Callable[[], None]) -> None:
        """Keeps the stream until it breaks or falls silent; returns with ``lost`` set.

        Args:
            on_change: is called when the replica begins to accept and when it is lost.
        """
        try:
            lost = await self._follow(on_change)
        except grpc.aio.AioRpcError as error:
            kind = Loss.ENGINE_FAILED if error.code() is grpc.StatusCode.INTERNAL else Loss.STREAM_BROKEN
            lost = Lost(cause=f"the leader stream broke: {error.code().name} {error.details()}", kind=kind)
        except asyncio.CancelledError:
            self.give_up(Lost(cause="the gateway let go of the replica", kind=Loss.STOPPED))
            raise
        except Exception as error:
            # Whatever it is, a replica that is not listened to must not be given requests.
            words = "The stream to %s failed in a way that nobody foresaw."
            logger.exception(words, self.name, extra=said("leader_stream_failed", replica=self.name))
            lost = Lost(cause=f"the leader stream failed: {type(error).__name__}")
        self.give_up(lost)
        on_change()

    async def _follow(self, on_change: Callable[[], None]) -> Lost:
        """Reads and watches side by side; returns why one of them ended."""
        async with grpc.aio.insecure_channel(self.address, options=_CHANNEL_OPTIONS) as channel:
            stub: pb_grpc.WorkerAsyncStub = pb_grpc.WorkerStub(channel)
            call = stub.Lead(self._requests())
            reading = asyncio.ensure_future(self._read(call, on_change))
            watching = asyncio.ensure_future(self._watch())
            try:
                await asyncio.wait({reading, watching}, return_when=asyncio.FIRST_COMPLETED)
                return reading.result() if reading.done() else watching.result()
            finally:
                call.cancel()
                reading.cancel()
                watching.cancel()
                await asyncio.gather(reading, watching, return_exceptions=True)

    async def _read(self, call: LeadCall, on_change: Callable[[], None]) -> Lost:
        while isinstance(message := await call.read(), pb.LeadResponse):
            self._silent_s = 0.0
            self._take(message, on_change)
        code = await call.code()
        kind = Loss.ENGINE_FAILED if code is grpc.StatusCode.INTERNAL else Loss.STREAM_BROKEN
        return Lost(cause=f"the leader ended the stream: {code.name} {await call.details()}", kind=kind)

    async def _watch(self) -> Lost:
        """Waits until the leader is silent for too long, or makes no progress; returns which.

        Time is counted in small sleeps, each for no more than it asked: when this very process was held up, what the
        leader said meanwhile has yet to be read, and the leader is not to blame.
        """
        tick_s = min(self._limits.heartbeat_timeout_s, self._limits.stall_timeout_s) / 10
        while self._silent_s < self._limits.heartbeat_timeout_s:
            await asyncio.sleep(tick_s)
            self._silent_s += tick_s
            # Sequences whose keys and values are on the way run in no step: while there are only such, none is due.
            if self.load is not None and self.load.num_running:
                self._stalled_s += tick_s
            if self._stalled_s >= self._patience.limit_s:
                return Lost(cause=self._patience.stall_words(), kind=Loss.STALLED)
        return Lost(cause=f"no heartbeat for {self._limits.heartbeat_timeout_s:g} s", kind=Loss.NO_HEARTBEAT)

    async def _requests(self) -> AsyncIterator[pb.LeadRequest]:
        while (message := await self._outbox.get()) is not None:
            yield message

    def _take(self, message: pb.LeadResponse, on_change: Callable[[], None]) -> None:
        if message.epoch != self.epoch:
            self.fenced_messages += 1
            return
        match message.WhichOneof("event"):
            case "step":
                self._take_step(message.step)
            case "rejected":
                inbox = self._inboxes.get(message.rejected.sequence_id)
                self._note_end(message.rejected.sequence_id)
                if inbox is not None:
                    inbox.put_now(message.rejected)
            case "load":
                self._take_report(message.load, on_change)

    def _take_step(self, step: pb.StepOutput) -> None:
        computed = step.num_tokens > 0  # others only tell of sequences that ended between steps
        if computed:
            self._stalled_s = 0.0
            self._patience = self._patience.after(step.duration_s)
        inboxes = []
        if step.num_prefill_tokens:
            self.ledger.computed(step.num_prefill_tokens)
            self._on_room()
        for output in step.sequences:
            if not output.index or output.HasField("end"):
                self._note_output(output)
            # A sequence that was cancelled a moment ago has no inbox any more.
            inbox = self._inboxes.get(output.sequence_id)
            if inbox is not None:
                inbox.put(output)
                inboxes.append(inbox)
        self._rounds.wake(inboxes)
        if computed and self._on_step is not None:
            self._on_step(self.name, step)

    def _take_report(self, load: pb.LoadReport, on_change: Callable[[], None]) -> None:
        before, self.load = self.load, load
        self._patience = self._patience.expecting(load.budget.expected_s)
        self._reported_s = time.monotonic()
        self.ledger.reported(load)
        if before is None or before.steps != load.steps or not load.num_running:
            self._stalled_s = 0.0
        if before is None:
            on_change()
        self._on_room()

    def _note_output(self, output: pb.SequenceOutput) -> None:
        """Notes the first token of a sequence, and its end."""
        if output.HasField("index"):
            self.ledger.begun(output.sequence_id)
            helper = self._settle(output.sequence_id)
            if helper is not None and output.HasField("transfer"):
                self._on_transfer(helper.name, self.name, output.transfer)
        if output.HasField("end"):
            self._note_end(output.sequence_id, num_answer_tokens=output.index + 1)

    def _note_end(self, sequence_id: int, num_answer_tokens: int = 0) -> None:
        """Notes that a sequence ended, was refused or is cancelled."""
        self._settle(sequence_id)
        num_tokens = self._num_prompt_tokens.pop(sequence_id, 0) + num_answer_tokens
        if self.ledger.ended(sequence_id, num_tokens):
            self._on_room()

    def _settle(self, sequence_id: int) -> "Leader | None":
        """Returns who computed the prompt of a sequence, once; nothing of it is to be done there any more."""
        helper = self._helpers.pop(sequence_id, None)
        if helper is not None:
            helper.ledger.ended(sequence_id)
        return helper

    def give_up(self, lost: Lost) -> None:
        """Ends every sequence of this incarnation; the first cause stays."""
        if self.lost is None:
            self.lost = lost
            self._on_lost(lost)
            # Debug, as `serve` hears of every loss, and says it with the better cause: that of the process.
            extra = said("replica_lost", replica=self.name, epoch=self.epoch, cause=lost.cause, kind=lost.kind.value)
            logger.debug("The gateway no longer hears %s: %s", self.name, lost.cause, extra=extra)
            for sequence_id in list(self._helpers):
                self._settle(sequence_id)
            for inbox in set(self._inboxes.values()):
                inbox.put_now(self.lost)
            self._outbox.put_nowait(None)
