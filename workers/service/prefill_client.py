"""The calling side of one prompt that another replica computes: what it is asked, what it says, and how that ends."""

import asyncio
import contextlib
from dataclasses import dataclass

import grpc

from placement.errors import HeterodyneError
from placement.serving.kv.streaming import LEASE_S
from protos.heterodyne.worker.v1 import worker_pb2 as pb
from protos.heterodyne.worker.v1 import worker_pb2_grpc as pb_grpc
from workers.replica.kv_leader import TransferFailed

Call = grpc.aio.StreamStreamCall[pb.PrefillRequest, pb.PrefillResponse]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetched:
    """Tells what came of a prompt that another replica computed.

    Attributes:
        computed: what the other replica says of it.
        num_bytes: bytes of keys and values that came.
        exposed_s: seconds from the end of the computation until the last byte was here.
    """

    computed: pb.PrefillComputed
    num_bytes: int
    exposed_s: float


class RemotePrefill:
    """One call of another replica's leader. Lives on one event loop; every wait has a deadline."""

    def __init__(self, stub: "pb_grpc.WorkerAsyncStub", *, epoch: int) -> None:
        """``epoch`` is that of the replica that is called."""
        self._call: Call = stub.Prefill()
        self._epoch = epoch
        self._loop = asyncio.get_running_loop()
        self._reading: asyncio.Task[pb.PrefillResponse | None] | None = None

    async def start(self, start: pb.PrefillStart) -> None:
        """Asks for a prompt. Raises TimeoutError and AioRpcError."""
        async with asyncio.timeout(LEASE_S):  # a long prompt waits for a peer that reads
            await self._call.write(pb.PrefillRequest(epoch=self._epoch, start=start))

    async def follow(self, arrived: "asyncio.Future[int]", *, arrival_s: float) -> Fetched:
        """Waits until all has arrived, as long as the other replica gives signs of life.

        Args:
            arrived: gives the bytes that came, or what went wrong.
            arrival_s: how long all may take to arrive once it is computed.

        Raises:
            TransferFailed: it will not come.
            TimeoutError: the other replica gave no sign of life, or bytes do not come although it does.
            AioRpcError: the connection broke.
        """
        computed: pb.PrefillComputed | None = None
        computed_s = arrived_s = self._loop.time()
        noted = False
        while computed is None or not arrived.done():
            response = await self._next(arrived)
            now_s = self._loop.time()
            if arrived.done() and not noted:
                arrived.result()
                arrived_s, noted = now_s, True
            if response is not None and response.HasField("computed"):
                computed, computed_s = response.computed, now_s
            if computed is not None and not arrived.done() and now_s > computed_s + arrival_s:
                raise TimeoutError
        return Fetched(computed=computed, num_bytes=arrived.result(), exposed_s=max(0.0, arrived_s - computed_s))

    async def _next(self, arrived: "asyncio.Future[int]") -> pb.PrefillResponse | None:
        """Waits for the next word of the other replica, or for the arrival, and returns the word if there is one."""
        if self._reading is None:
            self._reading = self._loop.create_task(self._read())
        waited: set[asyncio.Future[int] | asyncio.Task[pb.PrefillResponse | None]] = {self._reading}
        if not arrived.done():
            waited.add(arrived)
        done, _ = await asyncio.wait(waited, timeout=LEASE_S, return_when=asyncio.FIRST_COMPLETED)
        if not done:
            raise TimeoutError
        if self._reading not in done:
            return None
        response, self._reading = self._reading.result(), None
        if response is None:
            raise TransferFailed("it ended the call before all keys and values were here")
        return response

    async def _read(self) -> pb.PrefillResponse | None:
        """Reads the next word; None where the other replica ended the call as it should. Raises TransferFailed."""
        message = await self._call.read()
        if isinstance(message, pb.PrefillResponse):
            if message.epoch != self._epoch:
                raise TransferFailed(f"it answered with the epoch {message.epoch}, which is not {self._epoch}")
            return message
        code = await self._call.code()
        if code is grpc.StatusCode.OK:
            return None
        raise TransferFailed(f"it ended the call: {code.name} {await self._call.details()}")

    async def thank(self) -> None:
        """Tells the other replica that all has arrived, and sees the call to its end; it may be gone by now."""
        with contextlib.suppress(grpc.aio.AioRpcError, HeterodyneError, TimeoutError):
            async with asyncio.timeout(LEASE_S):
                await self._call.write(pb.PrefillRequest(epoch=self._epoch, arrived=pb.KvArrived()))
                await self._call.done_writing()
                while await (self._reading or self._read()) is not None:
                    self._reading = None
        self.cancel()

    def cancel(self) -> None:
        """Ends the call, which revokes the transfer where it has not ended."""
        if self._reading is not None and not self._reading.cancel() and not self._reading.cancelled():
            self._reading.exception()  # it is known by now, or of no interest
        self._call.cancel()
