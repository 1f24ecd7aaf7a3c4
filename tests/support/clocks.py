"""Time in tests: how long they wait, a clock that a busy machine cannot hurry, and one that the test moves."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

# For what must come: whoever waits as long as this has failed. No measure of speed.
PATIENCE_S = 60.0
_TICK_S = 0.02


class OwnTime:
    """Seconds that this process was given, as ``Leader`` counts them: in small sleeps, each for no more than it asked.

    Beside others on a busy machine, what is slow by the wall's clock is not slow by this one.
    """

    def __init__(self) -> None:
        self.now_s = 0.0

    async def run(self) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            self.now_s += _TICK_S


@asynccontextmanager
async def own_time() -> AsyncIterator[OwnTime]:
    """One that runs for the length of the block."""
    clock = OwnTime()
    running = asyncio.create_task(clock.run())
    try:
        yield clock
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


class LoopClock:
    """What an event loop takes for the time; it moves when it is told to. Set it in place of the loop's ``time``."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s

    async def advance(self, seconds: float) -> None:
        """Time passes, and what is due then is done."""
        self.now_s += seconds
        await turns()


async def turns(count: int = 10) -> None:
    """Lets every task run that is ready, and those that this makes ready."""
    for _ in range(count):
        await asyncio.sleep(0)


async def until(true: Callable[[], bool]) -> None:
    """Waits until it is, whatever the loop takes for the time."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < deadline_s, "it never came"
        await asyncio.to_thread(time.sleep, 0.005)
