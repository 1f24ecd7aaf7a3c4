"""Fetches the keys and values of prompts from other replicas: reserves, asks, waits, and tells the engine.

Lives on the event loop of the service; only the methods of :class:`workers.engine.types.KvExchange` are called by the
engine's thread.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import grpc

from placement.errors import HeterodyneError, cause_of
from placement.model.part import Span
from placement.model.specs import ModelSpec
from placement.serving.events import Receive
from placement.serving.kv.peers import KvFormat, ReplicaRanks, differing, new_transfer_id
from placement.serving.kv.runs import block_runs
from placement.serving.kv.streaming import LEASE_S, arrival_s
from protos.codec.log_record import said
from protos.codec.replica_ranks import kv_format_message, ranks_message, read_ranks
from protos.heterodyne.worker.v1 import worker_pb2 as pb
from protos.heterodyne.worker.v1 import worker_pb2_grpc as pb_grpc
from workers.engine.engine import Engine
from workers.engine.inbox import KvCame
from workers.engine.types import KvTransfer, PrefillSource, Submission
from workers.kv_transfer.receiver import Expected
from workers.replica.kv_leader import Expectation, KvLeader, TransferFailed

logger = logging.getLogger(__name__)

_CHANNEL_OPTIONS = [
    ("grpc.enable_http_proxy", 0),
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.max_send_message_length", 64 << 20),
]
_REVOKED = "nobody wants the answer any more"

PrefillCall = grpc.aio.StreamStreamCall[pb.PrefillRequest, pb.PrefillResponse]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """The keys and values that are to be fetched.

    Attributes:
        hold_id: names the reservation of their blocks.
        tokens: positions in the sequence.
        runs: the slots of all tokens up to the last of them.
    """

    hold_id: int
    transfer_id: bytes
    tokens: Span
    runs: tuple[tuple[int, int], ...]
    submission: Submission


class KvFetcher:
    """Fetches keys and values for an engine, and keeps what it knows of the replicas that compute them.

    Attributes:
        num_transfers: transfers that came.
        num_failures: transfers that did not come, without those that were revoked.
        num_bytes: bytes that came.
    """

    def __init__(
        self, *, engine: Engine, leader: KvLeader, own: ReplicaRanks, model: ModelSpec, kv_format: KvFormat
    ) -> None:
        """Takes the leader's hold of all ranks of this replica, which ``own`` describes."""
        self._engine = engine
        self._leader = leader
        self._own = own
        self._model = model
        self._format = kv_format
        self._loop = asyncio.get_running_loop()
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._thanks: set[asyncio.Task[None]] = set()
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._sources: dict[tuple[str, int], ReplicaRanks] = {}
        self._is_closed = False
        self.num_transfers = 0
        self.num_failures = 0
        self.num_bytes = 0

    # -- called on the engine's thread ------------------------------------------------------------------------

    def receive(self, command: Receive, submission: Submission) -> None:
        """Implements :meth:`workers.engine.types.KvExchange.receive`."""
        wanted = Wanted(
            hold_id=command.hold_id,
            transfer_id=new_transfer_id(),
            tokens=command.tokens,
            runs=block_runs(command.table, self._own.block_size, command.tokens.stop),
            submission=submission,
        )
        self._post(self._begin, wanted)

    def revoke(self, hold_id: int) -> None:
        """Implements :meth:`workers.engine.types.KvExchange.revoke`."""
        self._post(self._cancel, hold_id)

    def close(self, transfer_id: bytes) -> None:
        """Implements :meth:`workers.engine.types.KvExchange.close`."""
        self._leader.close(transfer_id)

    def _post(self, call: object, *args: object) -> None:
        with contextlib.suppress(RuntimeError):  # a closed loop means that the process ends
            self._loop.call_soon_threadsafe(call, *args)  # type: ignore[arg-type]

    # -- called on the loop -----------------------------------------------------------------------------------

    def _begin(self, wanted: Wanted) -> None:
        task = self._loop.create_task(self._run(wanted))
        self._tasks[wanted.hold_id] = task
        task.add_done_callback(lambda _: self._tasks.pop(wanted.hold_id, None))

    def _cancel(self, hold_id: int) -> None:
        task = self._tasks.get(hold_id)
        if task is not None:
            task.cancel()

    async def close_all(self) -> None:
        """Gives up what is fetched, and closes all connections."""
        self._is_closed = True
        tasks = [*self._tasks.values(), *self._thanks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for channel in self._channels.values():
            await channel.close()

    async def _run(self, wanted: Wanted) -> None:
        """Fetches, and tells the engine how that ended, however it ended."""
        transfer = KvTransfer(problem=_REVOKED)
        try:
            transfer = await self._fetch(wanted)
            self.num_transfers += 1
            self.num_bytes += transfer.num_bytes
        except grpc.aio.AioRpcError as error:
            transfer = self._failed(wanted, f"{error.code().name} {error.details()}")
        except TimeoutError:
            transfer = self._failed(wanted, "nothing was heard of it in time")
        except HeterodyneError as error:
            transfer = self._failed(wanted, str(error))
        except Exception as error:  # the border of the task: the sequence must go on, whatever it was
            words = "Keys and values could not be fetched, for a reason that nobody foresaw."
            logger.exception(words, extra=said("kv_fetch_failed"))
            transfer = self._failed(wanted, cause_of(error))
        finally:
            self._engine.kv_came(
                KvCame(
                    hold_id=wanted.hold_id,
                    transfer_id=wanted.transfer_id,
                    num_tokens=0 if transfer.problem else wanted.tokens.stop,
                    transfer=transfer,
                )
            )

    def _failed(self, wanted: Wanted, problem: str) -> KvTransfer:
        self.num_failures += 1
        source = wanted.submission.prefill
        assert source is not None
        words = "Keys and values of a prompt did not come from %s, and it is computed here: %s."
        extra = said("kv_transfer_failed", replica=source.replica, cause=problem)
        logger.warning(words, source.replica, problem, extra=extra)
        return KvTransfer(problem=problem)

    async def _fetch(self, wanted: Wanted) -> KvTransfer:
        """Has another replica compute a prompt and send its keys and values.

        Raises:
            TransferFailed: they did not come.
            TimeoutError: the other replica gave no sign of life.
            AioRpcError: it could not be called, or refused.
        """
        source = wanted.submission.prefill
        assert source is not None
        if self._is_closed:
            raise TransferFailed("this worker stops")
        stub: pb_grpc.WorkerAsyncStub = pb_grpc.WorkerStub(self._channel(source.address))
        ranks = await self._describe(stub, source)
        expectation = self._leader.expect(
            Expected(
                transfer_id=wanted.transfer_id,
                source=ranks,
                tokens=wanted.tokens,
                runs=wanted.runs,
                format=self._format,
            )
        )
        async with asyncio.timeout(LEASE_S):
            await asyncio.wrap_future(expectation.ready)
        call = stub.Prefill()
        try:
            await call.write(pb.PrefillRequest(epoch=source.epoch, start=self._start(wanted)))
            transfer = await self._follow(call, expectation, wanted)
        except BaseException:
            call.cancel()
            raise
        thanks = self._loop.create_task(_thank(call, source.epoch))
        self._thanks.add(thanks)
        thanks.add_done_callback(self._thanks.discard)
        return transfer

    def _start(self, wanted: Wanted) -> pb.PrefillStart:
        submission = wanted.submission
        return pb.PrefillStart(
            target=ranks_message(self._own),
            transfer_id=wanted.transfer_id,
            token_ids=submission.prompt_ids[: wanted.tokens.stop],
            first_token=wanted.tokens.start,
            priority=submission.priority,
            cache_salt=submission.cache_salt,
            format=kv_format_message(self._format),
        )

    async def _follow(self, call: PrefillCall, expectation: Expectation, wanted: Wanted) -> KvTransfer:
        """Waits until all has arrived, for as long as the other replica gives signs of life."""
        arrived = asyncio.wrap_future(expectation.arrived)
        arrived_s: list[float] = []
        arrived.add_done_callback(lambda _: arrived_s.append(self._loop.time()))
        try:
            computed = await self._computed(call, arrived)
            computed_s = self._loop.time()
            limit_s = arrival_s(self._most_bytes(wanted.tokens))
            async with asyncio.timeout(limit_s):
                num_bytes = await arrived
        finally:
            arrived.cancel()
        return KvTransfer(
            num_tokens=len(wanted.tokens),
            num_bytes=num_bytes,
            queue_s=computed.queue_s,
            prefill_s=computed.prefill_s,
            exposed_s=max(0.0, arrived_s[0] - computed_s),
            cached_tokens=computed.cached_tokens,
            by_layer=computed.by_layer,
        )

    async def _computed(self, call: PrefillCall, arrived: "asyncio.Future[int]") -> pb.PrefillComputed:
        """Waits until the other replica has computed the prompt. Raises what makes the transfer fail before."""
        responses = _responses(call)
        while True:
            reading = asyncio.ensure_future(anext(responses, None))
            try:
                async with asyncio.timeout(LEASE_S):
                    waited: set[asyncio.Future[Any]] = {reading, arrived}
                    await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
                    if arrived.done():
                        arrived.result()
                    response = await reading
            finally:
                reading.cancel()
            if response is None:
                raise TransferFailed("it ended the call before the prompt was computed")
            if response.HasField("computed"):
                return response.computed

    def _most_bytes(self, tokens: Span) -> int:
        """Returns the most bytes that the keys and values of some tokens can have on the way."""
        numbers = 2 * self._model.num_layers * self._model.num_kv_heads * self._model.head_dim
        return 4 * numbers * len(tokens)

    async def _describe(self, stub: "pb_grpc.WorkerAsyncStub", source: PrefillSource) -> ReplicaRanks:
        """Returns the ranks of another replica, which are asked for once.

        Raises:
            TransferFailed: it is not of the same model, or of another version.
        """
        key = source.address, source.epoch
        if key not in self._sources:
            message = await stub.DescribeRanks(pb.DescribeRanksRequest(epoch=source.epoch), timeout=LEASE_S)
            ranks = read_ranks(message, self._model)
            topics = differing(self._own.facts, ranks.facts)
            if topics:
                raise TransferFailed(f"it differs in {', '.join(topics)}")
            for old in [known for known in self._sources if known[0] == source.address]:
                del self._sources[old]
            self._sources[key] = ranks
        return self._sources[key]

    def _channel(self, address: str) -> grpc.aio.Channel:
        if address not in self._channels:
            self._channels[address] = grpc.aio.insecure_channel(address, options=_CHANNEL_OPTIONS)
        return self._channels[address]


async def _thank(call: PrefillCall, epoch: int) -> None:
    """Tells the other replica that all has arrived, and sees the call to its end; it may be gone by now."""
    with contextlib.suppress(grpc.aio.AioRpcError, HeterodyneError, TimeoutError):
        async with asyncio.timeout(LEASE_S):
            await call.write(pb.PrefillRequest(epoch=epoch, arrived=pb.KvArrived()))
            await call.done_writing()
            async for _ in _responses(call):
                pass
    call.cancel()


async def _responses(call: PrefillCall) -> AsyncIterator[pb.PrefillResponse]:
    """Yields what the other replica says, until it ends the call. Raises AioRpcError where that is no good end."""
    while isinstance(message := await call.read(), pb.PrefillResponse):
        yield message
    code = await call.code()
    if code is not grpc.StatusCode.OK:
        raise TransferFailed(f"it ended the call: {code.name} {await call.details()}")
