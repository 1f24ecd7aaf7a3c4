"""Has the threads that compute spin for long at barriers only while they have their cores for themselves."""

import logging
import os
import time
from collections.abc import Callable

from kernels.cpu.layers.program import set_spins
from placement.measured.cgroup import ReadText, num_throttled
from placement.measured.core_share import barrier_spins, read_core_share, why_shared
from protos.codec.log_record import said
from workers.host.device import read_text

logger = logging.getLogger(__name__)

_LOOK_S = 2.0
# A process that spins less is throttled less: for some time after, that is no reason to spin for long again.
_LATELY_S = 30.0


class Spinning:
    """Chooses how often threads spin at a barrier, by what else uses the cores. It reads a few files of the system."""

    def __init__(
        self,
        num_threads: int,
        *,
        read: ReadText = read_text,
        clock: Callable[[], float] = time.monotonic,
        use: Callable[[int], None] = set_spins,
    ) -> None:
        """Chooses for a team of ``num_threads`` threads. ``use`` is called with every choice that differs."""
        self._num_threads = num_threads
        self._read = read
        self._clock = clock
        self._use = use
        self._next_s = clock()
        self._num_throttled = num_throttled(read)
        self._throttled_s = -float("inf")  # when it was last seen to be throttled
        self._spins: int | None = None

    def look(self) -> None:
        """Looks at the cores and chooses, unless it did so in the last two seconds."""
        now_s = self._clock()
        if now_s < self._next_s:
            return
        self._next_s = now_s + _LOOK_S
        count = num_throttled(self._read)
        if count > self._num_throttled:
            self._num_throttled, self._throttled_s = count, now_s
        share = read_core_share(
            self._num_threads,
            num_allowed=len(os.sched_getaffinity(0)),
            num_cores=os.cpu_count() or 1,
            read=self._read,
            throttled=now_s - self._throttled_s < _LATELY_S,
        )
        spins = barrier_spins(share)
        if spins != self._spins:
            cause = why_shared(share) or "the threads have their cores for themselves"
            words = "Threads spin %d times at a barrier: %s."
            logger.debug(words, spins, cause, extra=said("spins", spins=spins, cause=cause))
            self._spins = spins
            self._use(spins)
