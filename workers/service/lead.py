"""Serves the leader stream, which carries one gateway's sequences to this engine and the answers back."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from collections.abc import Sequence as Seq
from dataclasses import replace

import grpc

from placement.errors import HeterodyneError, cause_of
from placement.serving.admission import repeated
from placement.serving.events import EndReason
from placement.serving.token_budget import StepBudget
from protos.codec.log_record import said
from protos.heterodyne.worker.v1 import worker_pb2 as pb
from workers.engine.engine import Engine
from workers.engine.types import Output, StepStats, Submission
from workers.sampling.grammar import GrammarSpec
from workers.sampling.grammar_compiler import GrammarCompiler
from workers.service import messages as wire
from workers.service.outbox import Outbox

logger = logging.getLogger(__name__)

HEARTBEAT_S = 0.4


class LeaderStream:
    """Serves one stream, as the engine's sink. It lives on one event loop; only ``step`` and ``refused`` run elsewhere.

    When either side ends the stream, its sequences are cancelled. When the outbox is full, since the gateway does not
    read, the gateway counts as lost: the stream ends with RESOURCE_EXHAUSTED.

    Attributes:
        status: the gRPC status by which this side ends the stream; None while it lasts or when the gateway closed it.
        fenced_messages: how many messages were refused because they carried another epoch.
    """

    def __init__(
        self,
        *,
        engine: Engine,
        grammars: GrammarCompiler,
        epoch: int,
        outbox: Outbox,
        budget: StepBudget | None = None,
        transfers: Callable[[], wire.TransferCounts] = wire.TransferCounts,
    ) -> None:
        """Takes what every load report has.

        Args:
            budget: the budget of the engine's steps.
            transfers: returns the counts of transfers of keys and values.
        """
        self._transfers = transfers
        self._engine = engine
        self._budget = budget
        self._grammars = grammars
        self._compiling: dict[int, asyncio.Task[None]] = {}
        self._epoch = epoch
        self._loop = asyncio.get_running_loop()
        self._outbox = outbox
        self._is_open = True
        self._writing: asyncio.Task[None] | None = None
        self.fenced_messages = 0
        self.status: tuple[grpc.StatusCode, str] | None = None

    # -- called on the engine's thread ------------------------------------------------------------------------

    def step(self, stats: StepStats, outputs: Seq[Output]) -> None:
        """Hands one step's outputs to the event loop, which builds the message, so that the engine goes on at once."""
        self._post(self._send_step, stats, outputs)

    def refused(self, sequence_id: int, error: HeterodyneError) -> None:
        """Hands a refusal to the event loop."""
        self._post(self._send_refusal, sequence_id, error)

    def _post(self, call: Callable[..., None], *args: object) -> None:
        # A closed loop means that the process ends: there is nobody left to tell.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(call, *args)

    # -- called on the loop -----------------------------------------------------------------------------------

    async def run(
        self, requests: AsyncIterator[pb.LeadRequest], write: Callable[[pb.LeadResponse], Awaitable[None]]
    ) -> None:
        """Serves until either side ends the stream, however it ends; then its sequences are computed no more."""
        self._writing = asyncio.create_task(self._write(write))
        self._engine.observe(self)
        parts = (self._read(requests), self._beat(), self._end_with_engine())
        tasks = [self._writing, *map(asyncio.create_task, parts)]
        for part in tasks[1:]:  # a part that fails takes the stream with it
            part.add_done_callback(lambda _: self._close())
        try:
            await asyncio.wait([self._writing])
        finally:
            self._close()
            tasks += self._compiling.values()
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
        for result in results:
            if isinstance(result, Exception) and not isinstance(result, grpc.RpcError):
                raise result

    def end(self, code: grpc.StatusCode, details: str) -> None:
        """Ends the stream from this side, behind the messages that were sent before."""
        if not self._is_open:
            return
        for sequence_id in self._compiling:
            self._refuse(sequence_id, wire.UNAVAILABLE, details)
        if self._is_open:  # those refusals may have been too many
            self.status = (code, details)
            self._close()

    def end_with_engine(self) -> None:
        """Ends the stream because the engine has ended, or must be given up."""
        if self._engine.failure is None:
            self.end(grpc.StatusCode.UNAVAILABLE, self._engine.stop_cause)
        else:
            self.end(grpc.StatusCode.INTERNAL, f"the engine failed: {cause_of(self._engine.failure)}")

    def _close(self) -> None:
        """Stops messages in both directions; those that wait in the outbox still go out."""
        if self._is_open:
            self._is_open = False
            self._outbox.close()
            self._engine.abandon(self)
            for compiling in self._compiling.values():
                compiling.cancel()

    async def _write(self, write: Callable[[pb.LeadResponse], Awaitable[None]]) -> None:
        while (message := await self._outbox.take()) is not None:
            await write(message)

    async def _beat(self) -> None:
        """Sends a load report every heartbeat, for as long as the stream lasts."""
        while True:
            report = wire.load_report(
                self._engine.load,
                fenced_messages=self.fenced_messages,
                budget=self._budget,
                transfers=self._transfers(),
            )
            self._send(pb.LeadResponse(load=report))
            await asyncio.sleep(HEARTBEAT_S)

    async def _end_with_engine(self) -> None:
        """Waits for the engine's end, then ends the stream, behind the outputs that carry the cause."""
        await asyncio.shield(asyncio.wrap_future(self._engine.ended))
        self.end_with_engine()

    def _send_step(self, stats: StepStats, outputs: Seq[Output]) -> None:
        if self._is_open:  # else the message need not be built
            self._send(pb.LeadResponse(step=wire.step_output(stats, outputs)))

    def _send_refusal(self, sequence_id: int, error: HeterodyneError) -> None:
        self._send(pb.LeadResponse(rejected=wire.rejected(sequence_id, error)))

    def _refuse(self, sequence_id: int, code: int, message: str) -> None:
        self._send(pb.LeadResponse(rejected=pb.Rejected(sequence_id=sequence_id, code=code, message=message)))

    def _send(self, message: pb.LeadResponse) -> None:
        message.epoch = self._epoch
        if self._is_open and not self._outbox.put(message):
            self._give_up_gateway()

    def _give_up_gateway(self) -> None:
        """Drops the waiting messages of a gateway that does not read; its connection learns why the stream ends."""
        assert self._writing is not None, "an outbox is not full before anything is written"
        self.status = (grpc.StatusCode.RESOURCE_EXHAUSTED, "the gateway does not read what its sequences are given")
        words = "The gateway does not read what its sequences are given; its stream is ended."
        logger.warning(words, extra=said("gateway_lost", cause="it does not read", status="RESOURCE_EXHAUSTED"))
        self._close()
        self._writing.cancel()

    # -- commands ---------------------------------------------------------------------------------------------

    async def _read(self, requests: AsyncIterator[pb.LeadRequest]) -> None:
        """Takes commands until the gateway closes the stream."""
        try:
            async for request in requests:
                if not self._is_open:
                    return
                self._take(request)
        finally:
            self._close()

    def _take(self, request: pb.LeadRequest) -> None:
        command = request.WhichOneof("command")
        if request.epoch != self._epoch:
            self.fenced_messages += 1
            if command == "submit":
                fenced = f"epoch {request.epoch} is fenced: this replica is at epoch {self._epoch}"
                for fork in request.submit.forks:
                    self._refuse(fork.sequence_id, wire.FAILED_PRECONDITION, fenced)
        elif command == "submit":
            self._submit(request.submit)
        elif command == "cancel":
            self._cancel(request.cancel.sequence_id)
        elif command == "drain":
            self._engine.drain()
        else:
            self.end(grpc.StatusCode.INVALID_ARGUMENT, "a message holds no command that this worker knows")

    def _submit(self, message: pb.Submit) -> None:
        """Hands each fork to the engine. One with a grammar follows once that is compiled, while others go on."""
        if not message.forks:
            self.end(grpc.StatusCode.INVALID_ARGUMENT, "a Submit holds no fork")
            return
        try:
            self._engine.admit()
            spec = wire.grammar_spec(message)
            submissions = wire.submissions(message, vocab_size=self._engine.limits.vocab_size)
        except HeterodyneError as error:
            for fork in message.forks:
                self._send_refusal(fork.sequence_id, error)
            return
        for sequence_id, submission in submissions:
            if not self._is_open:  # a refusal was one too many: what is submitted now would be computed for nobody
                return
            if sequence_id in self._compiling:
                self._send_refusal(sequence_id, repeated(sequence_id))
            elif spec is None:
                self._engine.submit(self, sequence_id, submission)
            else:
                compiling = self._compile(sequence_id, submission, spec)
                self._compiling[sequence_id] = self._loop.create_task(compiling)

    async def _compile(self, sequence_id: int, submission: Submission, spec: GrammarSpec) -> None:
        try:
            grammar = await self._grammars.compile(spec)
            self._engine.submit(self, sequence_id, replace(submission, grammar=grammar))
        except HeterodyneError as error:
            self._send_refusal(sequence_id, error)
        except Exception as error:  # the border of the task: whatever it was, the gateway must hear of it
            words = "A grammar could not be compiled, for a reason that nobody foresaw."
            logger.exception(words, extra=said("grammar_not_compiled"))
            self._refuse(sequence_id, wire.UNAVAILABLE, cause_of(error))
        del self._compiling[sequence_id]

    def _cancel(self, sequence_id: int) -> None:
        compiling = self._compiling.pop(sequence_id, None)
        if compiling is None:
            self._engine.cancel(self, sequence_id)
        else:
            compiling.cancel()
            output = Output(sequence_id=sequence_id, end=EndReason.CANCELLED)
            self._send_step(StepStats(step=self._engine.load.steps), [output])
