"""An engine for tests: started, listened to, and seen to keep nothing when it is idle."""

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from placement.errors import HeterodyneError
from placement.serving.admission import Limits
from placement.serving.kv.blocks import BlockPool
from placement.serving.replica import ReplicaCore
from placement.serving.settings import Checks, CoreSettings
from placement.serving.step_plan import SchedulerLimits
from workers.engine.engine import Engine
from workers.engine.types import Output, Runner, StepStats, Submission
from workers.sampling.sampling import SampledToken, SamplingParams
from workers.step.scoring import PromptScores
from workers.step.types import Batch, StepResult

BLOCK_SIZE = 8
WAIT_S = 60.0


@dataclass(eq=False)
class Listener:
    """A sink that collects, and says when all the sequences it waits for have ended."""

    tokens: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    scores: dict[int, list[PromptScores]] = field(default_factory=lambda: defaultdict(list))
    firsts: dict[int, Output] = field(default_factory=dict)
    ends: dict[int, Output] = field(default_factory=dict)
    refusals: dict[int, HeterodyneError] = field(default_factory=dict)
    steps: list[StepStats] = field(default_factory=list)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def step(self, stats: StepStats, outputs: Seq[Output]) -> None:
        with self.changed:
            self.steps.append(stats)
            for output in outputs:
                if output.scores is not None:
                    assert not self.tokens[output.sequence_id], "scores come before the answer"
                    self.scores[output.sequence_id].append(output.scores)
                if output.token is not None:
                    assert output.index == len(self.tokens[output.sequence_id])
                    self.firsts.setdefault(output.sequence_id, output)
                    self.tokens[output.sequence_id].append(output.token.token_id)
                if output.end is not None:
                    assert output.sequence_id not in self.ends
                    self.ends[output.sequence_id] = output
            self.changed.notify_all()

    def refused(self, sequence_id: int, error: HeterodyneError) -> None:
        with self.changed:
            self.refusals[sequence_id] = error
            self.changed.notify_all()

    def wait(self, done: Callable[[], bool]) -> None:
        with self.changed:
            assert self.changed.wait_for(done, WAIT_S), (self.ends, self.refusals)

    def wait_ends(self, count: int) -> None:
        self.wait(lambda: len(self.ends) == count)


class SlowRunner:
    """Gives everybody token 1, in as many steps as its gate lets through; and says when each begins."""

    def __init__(self) -> None:
        self.gate = threading.Semaphore(0)
        self.entered = threading.Semaphore(0)
        self.error: Exception | None = None

    def prepare(self, batch: Batch) -> Callable[[], StepResult]:
        return lambda: self._execute(batch)

    def _execute(self, batch: Batch) -> StepResult:
        self.entered.release()
        assert self.gate.acquire(timeout=WAIT_S)
        if self.error is not None:
            raise self.error
        return StepResult(tokens=tuple(SampledToken(token_id=1) if s.samples else None for s in batch.sequences))


class Gated:
    """A runner whose steps wait until everything that a test submits is submitted, however busy the machine."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self.gate = threading.Event()

    def prepare(self, batch: Batch) -> Callable[[], StepResult]:
        step = self._runner.prepare(batch)

        def execute() -> StepResult:
            assert self.gate.wait(WAIT_S)
            return step()

        return execute


class Inline(ThreadPoolExecutor):
    """Executes on the thread that submits: what happens between two steps is then the same every time."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


@dataclass(eq=False)
class Parts:
    engine: Engine
    core: ReplicaCore

    @property
    def pool(self) -> BlockPool:
        return self.core.pool

    def idle(self) -> None:
        """Stop, then see that nothing was kept."""
        self.engine.stop()
        self.engine.thread.join(WAIT_S)
        assert not self.engine.thread.is_alive()
        assert self.engine.failure is None
        self.core.check()
        assert self.pool.num_free == self.pool.num_total
        assert self.core.scheduler.num_running == self.core.scheduler.num_waiting == 0


@contextmanager
def engines() -> Iterator[Callable[..., Parts]]:
    """``make(runner, **sizes)``: an engine, running unless ``start`` is False, stopped at the end."""
    made: list[Engine] = []

    def make(
        runner: Runner,
        *,
        num_blocks: int = 256,
        token_budget: int = 64,
        max_num_seqs: int = 16,
        vocab_size: int = 509,
        prefix_cache: bool = True,
        clock: Callable[[], float] = time.monotonic,
        executor: ThreadPoolExecutor | None = None,
        num_stages: int = 1,
        start: bool = True,
        checks: bool = True,
    ) -> Parts:
        settings = CoreSettings(
            limits=Limits(max_context_tokens=512, vocab_size=vocab_size, block_size=BLOCK_SIZE),
            steps=SchedulerLimits(token_budget=token_budget, max_num_seqs=max_num_seqs, num_batches=num_stages),
            num_blocks=num_blocks,
            prefix_cache=prefix_cache,
            checks=Checks.ALWAYS if checks else Checks.AT_IDLE,
        )
        core = ReplicaCore(settings)
        engine = Engine(
            runner=runner,
            core=core,
            executor=executor or ThreadPoolExecutor(num_stages + 1 if num_stages > 1 else 1),
            clock=clock,
        )
        if start:
            engine.thread.start()
        made.append(engine)
        return Parts(engine=engine, core=core)

    yield make
    for engine in made:
        engine.stop()
        if engine.thread.ident is None:
            continue
        engine.thread.join(WAIT_S)


def submission(prompt: Seq[int], *, max_tokens: int = 64, stop: Seq[int] = (), **more: Any) -> Submission:
    """Greedy, unless ``more`` says otherwise."""
    fields: dict[str, Any] = {"sampling": SamplingParams()} | more
    return Submission(prompt_ids=tuple(prompt), max_tokens=max_tokens, stop_token_ids=frozenset(stop), **fields)
