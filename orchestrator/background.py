"""Runs tasks beside their owner: keeps them from being collected, logs their failures, ends them together."""

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

from protos.codec.log_record import said

logger = logging.getLogger(__name__)


class BackgroundTasks:
    """The background tasks of one owner, on one event loop."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Starts a task. If it raises, that is logged with its traceback, as nobody awaits it."""
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            words = "A task in the background failed in a way that nobody foresaw."
            logger.error(words, exc_info=error, extra=said("background_task_failed"))

    async def close(self) -> None:
        """Cancels what still runs and waits for its end."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
