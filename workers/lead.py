"""The leader stream: one gateway's sequences on this engine, in both directions."""

import asyncio
from collections.abc import AsyncIterator
from collections.abc import Sequence as Seq

import grpc

from placement.errors import FieldError, HeterodyneError, cause_of
from protos.heterodyne.worker.v1 import worker_pb2 as pb
from workers import wire
from workers.engine import Engine
from workers.engine_types import Output

HEARTBEAT_S = 0.4


class LeaderStream:
    """The engine's sink for one stream. Lives on ``loop``; only ``step`` and ``refused`` run elsewhere.

    Attributes:
        status: how the stream ends where this side ends it; None while it lasts or when the gateway closed it.
    """

    def __init__(self, *, engine: Engine, epoch: int, loop: asyncio.AbstractEventLoop) -> None:
        self._engine = engine
        self._epoch = epoch
        self._loop = loop
        self._outbox: asyncio.Queue[pb.LeadResponse | None] = asyncio.Queue()
        self.fenced_messages = 0
        self.status: tuple[grpc.StatusCode, str] | None = None

    # -- called on the engine's thread ------------------------------------------------------------------------

    def step(self, step: int, outputs: Seq[Output]) -> None:
        """Hand one step's outputs over; the message is built on the loop, so the engine goes on at once."""
        self._post(self._send_step, step, outputs)

    def refused(self, sequence_id: int, error: HeterodyneError) -> None:
        """Hand a refusal over."""
        self._post(self._send_refusal, sequence_id, error)

    def _post(self, call: object, *args: object) -> None:
        # A closed loop means that the process ends: there is nobody left to tell.
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(call, *args)  # type: ignore[arg-type]

    # -- called on the loop -----------------------------------------------------------------------------------

    def _send_step(self, step: int, outputs: Seq[Output]) -> None:
        sequences = [wire.sequence_output(output) for output in outputs]
        self._send(pb.LeadResponse(step=pb.StepOutput(step=step, sequences=sequences)))

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
            self._engine.cancel(self, request.cancel.sequence_id)
        elif command == "drain":
            self._engine.drain()
        else:
            self._end(grpc.StatusCode.INVALID_ARGUMENT, "a message holds no command that this worker knows")

    def _submit(self, message: pb.Submit) -> None:
        try:
            submission = wire.submission(message)
        except FieldError as error:
            self._send_refusal(message.sequence_id, error)
        else:
            self._engine.submit(self, message.sequence_id, submission)

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
