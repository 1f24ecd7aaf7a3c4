"""A measurement of this rank's speed as somebody elsewhere asks for it: in a thread, beside the event loop."""

import asyncio
import threading
from typing import Any

from placement.measured.speed import DeviceSpeed
from workers.host.device import Device
from workers.startup.speed import Products, measure_speed

# The slowest of those that are measured together may take so long to get ready.
_MEET_S = 20.0


class SpeedJob:
    """One measurement. Belongs to the running event loop.

    Attributes:
        speed: what was measured; has the exception of what went wrong.
    """

    def __init__(self, device: Device, products: Products) -> None:
        """Starts to get ready."""
        self._loop = asyncio.get_running_loop()
        self._begin = threading.Event()
        self._left = False
        self._ready: asyncio.Future[None] = self._loop.create_future()
        self.speed: asyncio.Task[DeviceSpeed] = self._loop.create_task(
            asyncio.to_thread(measure_speed, device, products, meet=self._meet)
        )

    def _meet(self) -> None:
        self._loop.call_soon_threadsafe(self._set_ready)
        if not self._begin.wait(_MEET_S) or self._left:
            raise InterruptedError("nobody waits for the speed any more")

    def _set_ready(self) -> None:
        if not self._ready.done():
            self._ready.set_result(None)

    async def waits(self) -> bool:
        """Whether it is ready, and waits to begin, as soon as that is known; False: it has ended already."""
        either: tuple[asyncio.Future[Any], ...] = (self._ready, self.speed)
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        return not self.speed.done()

    def begin(self) -> None:
        """The others are ready too."""
        self._begin.set()

    def leave(self) -> None:
        """Nobody waits any more: the thread ends soon, with what it made. Nothing, where it has ended."""
        self._left = True
        self._begin.set()
        self.speed.cancel()
