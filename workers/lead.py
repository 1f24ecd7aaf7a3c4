"""The leader stream: one gateway's sequences on this engine, in both directions."""

import asyncio
import logging
from collections.abc import AsyncIterator
from collections.abc import Sequence as Seq

import grpc

from placement.errors import FieldError, HeterodyneError, cause_of
from protos.heterodyne.worker.v1 import worker_pb2 as pb
from workers import wire
from workers.engine import Engine
from workers.engine_types import Output, StepStats
from workers.grammar import Grammar, GrammarFactory, GrammarSpec

logger = logging.getLogger(__name__)

HEARTBEAT_S = 0.4


class LeaderStream:
    """The engine's sink for one stream. Lives on ``loop``; only ``step`` and ``refused`` run elsewhere.

    Attributes:
        status: how the stream ends where this side ends it; None while it lasts or when the gateway closed it.
    """

    def __init__(
        self, *, engine: Engine, grammars: GrammarFactory, epoch: int, loop: asyncio.AbstractEventLoop
    ) -> None:
        self._engine = engine
        self._grammars = grammars
        self._compiling: dict[int, asyncio.Task[None]] = {}
        self._epoch = epoch
        self._loop = loop
        self._outbox: asyncio.Queue[pb.LeadResponse | None] = asyncio.Queue()
        self.fenced_messages = 0
        self.status: tuple[grpc.StatusCode, str] | None = None

    # -- called on the engine's thread ------------------------------------------------------------------------

    def step(self, stats: StepStats, outputs: Seq[Output]) -> None:
        """Hand one step's outputs over; the message is built on the loop, so the engine goes on at once."""
        self._post(self._send_step, stats, outputs)

    def refused(self, sequence_id: int, error: HeterodyneError) -> None:
        """Hand a refusal over."""
        self._post(self._send_refusal, sequence_id, error)

    def _post(self, call: object, *args: object) -> None:
        # A closed loop means that the process ends: there is nobody left to tell.
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(call, *args)  # type: ignore[arg-type]

    # -- called on the loop -----------------------------------------------------------------------------------

    def _send_step(self, stats: StepStats, outputs: Seq[Output]) -> None:
        self._send(pb.LeadResponse(step=wire.step_output(stats, outputs)))

    def _send_refusal(self, sequence_id: int, error: HeterodyneError) -> None:
        self._refuse(sequence_id, wire.error_code(error), str(error))

    def _refuse(self, sequence_id: int, code: int, message: str) -> None:
        self._send(pb.LeadResponse(rejected=pb.Rejected(sequence_id=sequence_id, code=code, message=message)))

    def _send(self, message: pb.LeadResponse) -> None:
        message.epoch = self._epoch
        self._outbox.put_nowait(message)

    async def read(self, requests: AsyncIterator[pb.LeadRequest]) -> None:
        """Take commands until the gateway closes the stream."""
        try:
            async for request in requests:
                self._take(request)
        finally:
            self._outbox.put_nowait(None)

    def close(self) -> None:
        """Nothing is handed to the engine any more."""
        for compiling in self._compiling.values():
            compiling.cancel()

    def _take(self, request: pb.LeadRequest) -> None:
        command = request.WhichOneof("command")
        if request.epoch != self._epoch:
            self.fenced_messages += 1
            if command == "submit":
                self._refuse(
                    request.submit.sequence_id,
                    wire.FAILED_PRECONDITION,
                    f"epoch {request.epoch} is fenced: this replica is at epoch {self._epoch}",
                )
        elif command == "submit":
            self._submit(request.submit)
        elif command == "cancel":
            self._cancel(request.cancel.sequence_id)
        elif command == "drain":
            self._engine.drain()
        else:
            self._end(grpc.StatusCode.INVALID_ARGUMENT, "a message holds no command that this worker knows")

    def _submit(self, message: pb.Submit) -> None:
        """Hand a sequence to the engine; one with a grammar once that is compiled, while others go on."""
        try:
            spec = wire.grammar_spec(message)
        except FieldError as error:
            self._send_refusal(message.sequence_id, error)
            return
        if spec is None:
            self._hand_over(message, None)
            return
        compiling = self._loop.create_task(self._compile(message, spec))
        self._compiling[message.sequence_id] = compiling
        compiling.add_done_callback(lambda _: self._compiling.pop(message.sequence_id, None))

    async def _compile(self, message: pb.Submit, spec: GrammarSpec) -> None:
        try:
            grammar = await asyncio.to_thread(self._grammars.compile, spec)
        except HeterodyneError as error:
            self._send_refusal(message.sequence_id, error)
        except Exception as error:  # the border of the task: whatever it was, the gateway must hear of it
            logger.exception("grammar_not_compiled")
            self._refuse(message.sequence_id, wire.UNAVAILABLE, cause_of(error))
        else:
            self._hand_over(message, grammar)

    def _hand_over(self, message: pb.Submit, grammar: Grammar | None) -> None:
        try:
            submission = wire.submission(message, vocab_size=self._engine.limits.vocab_size, grammar=grammar)
        except FieldError as error:
            self._send_refusal(message.sequence_id, error)
        else:
            self._engine.submit(self, message.sequence_id, submission)

    def _cancel(self, sequence_id: int) -> None:
        compiling = self._compiling.pop(sequence_id, None)
        # One that has ended by now has handed its sequence over.
        if compiling is None or not compiling.cancel():
            self._engine.cancel(self, sequence_id)

    async def beat(self) -> None:
        """Send a load report every heartbeat, for as long as the stream lasts."""
        while True:
            report = wire.load_report(self._engine.load, fenced_messages=self.fenced_messages)
            self._send(pb.LeadResponse(load=report))
            await asyncio.sleep(HEARTBEAT_S)

    async def end_with_engine(self) -> None:
        """Wait for the engine's failure, then end the stream, behind the outputs that carry the cause."""
        await asyncio.shield(asyncio.wrap_future(self._engine.ended, loop=self._loop))
        if self._engine.failure is not None:
            self._end(grpc.StatusCode.INTERNAL, f"the engine failed: {cause_of(self._engine.failure)}")

    def _end(self, code: grpc.StatusCode, details: str) -> None:
        self.status = self.status or (code, details)
        self._outbox.put_nowait(None)

    async def write(self) -> AsyncIterator[pb.LeadResponse]:
        """What goes to the gateway, in order, until either side ends the stream."""
        while (message := await self._outbox.get()) is not None:
            yield message
