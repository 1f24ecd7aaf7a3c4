"""Fetches the keys and values of prompts from other replicas: reserves, asks, waits, and tells the engine.

Lives on the event loop of the service; only the methods of :class:`workers.engine.types.KvExchange` are called by the
engine's thread.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
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
from workers.kv_transfer.awaited import Expected
from workers.replica.kv_leader import KvLeader, TransferFailed
from workers.service.prefill_client import Fetched, RemotePrefill

logger = logging.getLogger(__name__)

_CHANNEL_OPTIONS = [
    ("grpc.enable_http_proxy", 0),
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.max_send_message_length", 64 << 20),
]
_REVOKED = "nobody wants the answer any more"


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
        self._tasks: dict[int, asyncio.Task[KvTransfer]] = {}
        self._thanks: set[asyncio.Task[None]] = set()
        self._peers: dict[str, Peer] = {}  # by the names of replicas
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

    def _post(self, call: Callable[..., None], *args: object) -> None:
        with contextlib.suppress(RuntimeError):  # a closed loop means that the process ends
            self._loop.call_soon_threadsafe(call, *args)

    # -- called on the loop -----------------------------------------------------------------------------------

    def _begin(self, wanted: Wanted) -> None:
        task = self._loop.create_task(self._run(wanted))
        self._tasks[wanted.hold_id] = task
        # By a callback, since a task that is cancelled before its first step runs nothing of its own.
        task.add_done_callback(partial(self._end, wanted))

    def _end(self, wanted: Wanted, task: "asyncio.Task[KvTransfer]") -> None:
        """Tells the engine how it ended, however it ended."""
        del self._tasks[wanted.hold_id]
        transfer = KvTransfer(problem=_REVOKED) if task.cancelled() else task.result()
        self._engine.kv_came(
            KvCame(
                hold_id=wanted.hold_id,
                transfer_id=wanted.transfer_id,
                num_tokens=0 if transfer.problem else wanted.tokens.stop,
                transfer=transfer,
            )
        )

    def _cancel(self, hold_id: int) -> None:
        task = self._tasks.get(hold_id)
        if task is not None:
            task.cancel()

    async def close_all(self) -> None:
        """Gives up what is fetched, and closes all connections."""
        self._is_closed = True
        tasks: list[asyncio.Task[Any]] = [*self._tasks.values(), *self._thanks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for peer in self._peers.values():
            await peer.channel.close()

    async def _run(self, wanted: Wanted) -> KvTransfer:
        """Fetches; returns what came of it, whatever that is."""
        try:
            transfer = await self._fetch(wanted)
        except grpc.aio.AioRpcError as error:
            return self._failed(wanted, f"{error.code().name} {error.details()}")
        except TimeoutError:
            return self._failed(wanted, "nothing was heard of it in time")
        except HeterodyneError as error:
            return self._failed(wanted, str(error))
        except Exception as error:  # the border of the task: the sequence must go on, whatever it was
            words = "Keys and values could not be fetched, for a reason that nobody foresaw."
            logger.exception(words, extra=said("kv_fetch_failed"))
            return self._failed(wanted, cause_of(error))
        self.num_transfers += 1
        self.num_bytes += transfer.num_bytes
        return transfer

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
        peer = await self._peer(source)
        expectation = self._leader.expect(
            Expected(
                transfer_id=wanted.transfer_id,
                source=await self._describe(peer),
                tokens=wanted.tokens,
                runs=wanted.runs,
                format=self._format,
            )
        )
        async with asyncio.timeout(LEASE_S):
            await asyncio.wrap_future(expectation.ready)
        call = RemotePrefill(peer.stub, epoch=source.epoch)
        try:
            await call.start(self._start(wanted))
            arrived = asyncio.wrap_future(expectation.arrived)
            fetched = await call.follow(arrived, arrival_s=arrival_s(self._model, len(wanted.tokens)))
        except BaseException:
            call.cancel()
            raise
        thanks = self._loop.create_task(call.thank())
        self._thanks.add(thanks)
        thanks.add_done_callback(self._thanks.discard)
        return _transfer(wanted, fetched)

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

    async def _peer(self, source: PrefillSource) -> "Peer":
        """Returns the connection to another replica, of which one incarnation is known at a time."""
        peer = self._peers.get(source.replica)
        if peer is None or (peer.address, peer.epoch) != (source.address, source.epoch):
            channel = grpc.aio.insecure_channel(source.address, options=_CHANNEL_OPTIONS)
            self._peers[source.replica] = Peer(address=source.address, epoch=source.epoch, channel=channel)
            if peer is not None:
                await peer.channel.close()
        return self._peers[source.replica]

    async def _describe(self, peer: "Peer") -> ReplicaRanks:
        """Returns the ranks of another replica, which are asked for once.

        Raises:
            TransferFailed: it is not of the same model, or of another version.
        """
        if peer.ranks is None:
            message = await peer.stub.DescribeRanks(pb.DescribeRanksRequest(epoch=peer.epoch), timeout=LEASE_S)
            ranks = read_ranks(message, self._model)
            topics = differing(self._own.facts, ranks.facts)
            if topics:
                raise TransferFailed(f"it differs in {', '.join(topics)}")
            peer.ranks = ranks
        return peer.ranks


@dataclass(slots=True, kw_only=True)
class Peer:
    """Another replica that computes prompts.

    Attributes:
        channel: leads to its leader.
        ranks: its ranks; None until it was asked.
    """

    address: str
    epoch: int
    channel: grpc.aio.Channel
    ranks: ReplicaRanks | None = None

    @property
    def stub(self) -> "pb_grpc.WorkerAsyncStub":
        """Returns what its leader is called by."""
        return pb_grpc.WorkerStub(self.channel)


def _transfer(wanted: Wanted, fetched: Fetched) -> KvTransfer:
    computed = fetched.computed
    return KvTransfer(
        num_tokens=len(wanted.tokens),
        num_bytes=fetched.num_bytes,
        queue_s=computed.queue_s,
        prefill_s=computed.prefill_s,
        exposed_s=fetched.exposed_s,
        cached_tokens=computed.cached_tokens,
        by_layer=computed.by_layer,
    )
