"""Has the ranks of a replica wait for each other for as long as its steps suggest.

Ranks wait for each other within a step, and a rank that hangs while its process lives ends the replica. The leader
knows how long steps take, and tells the others with each of them how long they may wait: see
:mod:`placement.measured.patience`.
"""

import threading
from collections.abc import Callable
from functools import partial

from placement.measured.patience import Patience
from workers.engine.types import Runner
from workers.step.types import Batch, StepResult

STALL_TIMEOUT_S = 30.0
"""What a step may take at least where nobody says what the gateway allows."""

UNMEASURED_S = 120.0
"""How long ranks may wait for each other before any step was measured: what runs until then compiles code."""


class PatientRunner:
    """Runs the steps of a leader, and says before each how long the ranks may wait for each other.

    Attributes:
        patience: how long a step may take; None: no step was measured yet.
    """

    def __init__(self, runner: Runner, wait_at_most: Callable[[float], None]) -> None:
        """``wait_at_most`` sets how long this rank and, from the next step on, the others may wait."""
        self._runner = runner
        self._wait_at_most = wait_at_most
        self._lock = threading.Lock()  # steps of a pipeline end on several threads
        self.patience: Patience | None = None

    def prepare(self, batch: Batch) -> Callable[[], StepResult]:
        """Implements :meth:`workers.engine.types.Runner.prepare`."""
        self._wait_at_most(UNMEASURED_S if self.patience is None else self.patience.rank_limit_s)
        return partial(self._execute, self._runner.prepare(batch))

    def _execute(self, step: Callable[[], StepResult]) -> StepResult:
        result = step()
        with self._lock:
            if self.patience is not None:
                self.patience = self.patience.after(result.duration_s)
        return result
