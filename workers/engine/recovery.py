"""Has a runner recover from the loss of keys and values, while the engine goes on to take messages."""

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from placement.errors import cause_of
from protos.codec.log_record import said
from workers.engine.types import Recovering, Runner
from workers.step.types import RECOVER_S
from workers.transport.errors import KvGone

logger = logging.getLogger(__name__)

# Beyond what the runner may take: the steps before it have to leave the executing thread.
_MARGIN_S = 30.0
# So many recoveries in a row, none of which a step follows, are the loss of the replica: something is broken for good.
_MOST_IN_VAIN = 5


class Recovery:
    """Keeps the recovery that is under way. Everything but the runner's own part is called on the engine's thread."""

    def __init__(self, runner: Runner, executor: ThreadPoolExecutor, clock: Callable[[], float]) -> None:
        self._runner = runner
        self._executor = executor
        self._clock = clock
        self._under_way: Future[None] | None = None
        self._cause: KvGone | None = None
        self._began_s = 0.0
        self._num_in_vain = 0

    @property
    def is_under_way(self) -> bool:
        """Tells whether no step can be computed yet."""
        return self._under_way is not None

    @property
    def is_due(self) -> bool:
        """Tells whether :meth:`finish` has something to do."""
        return self._under_way is not None and (self._under_way.done() or self._is_late)

    @property
    def _is_late(self) -> bool:
        return self._clock() - self._began_s > RECOVER_S + _MARGIN_S

    def begin(self, cause: KvGone, then: Callable[[], None], wake: Callable[[], None]) -> None:
        """Begins to recover, on the thread that executes steps.

        Args:
            then: is called there once the runner has recovered.
            wake: is called at the end.

        Raises:
            KvGone: this runner cannot recover, or has done so several times and no step was computed since.
        """
        if not isinstance(self._runner, Recovering) or self._num_in_vain == _MOST_IN_VAIN:
            raise cause
        self._num_in_vain += 1
        runner = self._runner
        logger.warning(
            "The keys and values are lost, and are computed again: %s",
            cause,
            extra=said("kv_lost", cause=cause_of(cause)),
        )

        def recover() -> None:
            runner.recover()
            then()

        self._cause, self._began_s = cause, self._clock()
        self._under_way = self._executor.submit(recover)
        self._under_way.add_done_callback(lambda _: wake())

    def step_ended(self) -> None:
        """Notes that a step was computed: the last recovery was not in vain."""
        self._num_in_vain = 0

    def finish(self) -> None:
        """Ends a recovery that has come to its end. Raises what the runner raised, or KvGone if it is late."""
        if self._under_way is None or not self.is_due:
            return
        if not self._under_way.done():
            assert self._cause is not None
            raise self._cause
        self._under_way.result()
        self._under_way = None
        logger.info("Steps are computed again.", extra=said("kv_recovered", took_s=self._clock() - self._began_s))
