"""Measures this rank's speed in a thread beside the event loop, on behalf of a caller that measures several ranks."""

import asyncio
import threading
from typing import Any

from placement.measured.speed import DeviceSpeed
from workers.host.device import Device
from workers.startup.speed import Products, measure_speed

# The longest time that the slowest of the ranks that are measured together may take to get ready.
_MEET_S = 20.0


class SpeedJob:
    """One measurement. It belongs to the running event loop.

    Attributes:
        speed: the task of the measurement, which has its result, or the exception of what went wrong.
    """

    def __init__(self, device: Device, products: Products) -> None:
        """Starts the thread, which gets ready to measure."""
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
        """Waits until the thread is ready and waits to begin, or has ended. Returns whether it waits to begin."""
        either: tuple[asyncio.Future[Any], ...] = (self._ready, self.speed)
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        return not self.speed.done()

    def begin(self) -> None:
        """Lets the measurement begin, since the other ranks are ready too."""
        self._begin.set()

    def leave(self) -> None:
        """Ends the measurement early, since nobody waits for it: the thread ends soon and frees its weights."""
        self._left = True
        self._begin.set()
        self.speed.cancel()
