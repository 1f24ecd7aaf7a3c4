"""The leader of a pipeline: several steps are on their way through the stages at once.

While the last stage computes a step, the first computes others: a step's first layers (forward) when it is dispatched,
its logits and tokens (finish) when the last stage gave back what they are computed of. Each step has a thread that
waits for that; they take turns at computing, forwards and finishes each in the order of steps, a finish before a
forward, since it lets sequences go on (hybrid scheduling of DeepSpeed Inference, Aminabadi et al. 2022: no flush
between tokens).
"""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager
from functools import partial

import torch

from workers.collectives.algorithms import broadcast
from workers.collectives.group import TensorGroup
from workers.replica.followers import Begin, Followers, Job
from workers.replica.stages import Hands
from workers.step.layout import Prepared
from workers.step.runner import ModelRunner, newest
from workers.step.types import Batch, StepResult


class Turns:
    """Who computes next."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._busy = False
        self._broken = False
        self._next = {Job.FORWARD: 0, Job.FINISH: 0}
        self._num_to_finish = 0

    @contextmanager
    def take(self, job: Job, number: int) -> Iterator[None]:
        """A turn at ``job`` of a step, once it comes. Raises CancelledError where a turn before it raised."""
        with self._changed:
            self._num_to_finish += job is Job.FINISH
            self._changed.wait_for(lambda: self._broken or self._is_next(job, number))
            if self._broken:
                raise CancelledError
            self._num_to_finish -= job is Job.FINISH
            self._busy = True
        try:
            yield
        except BaseException:
            self.give_up()
            raise
        finally:
            with self._changed:
                self._busy = False
                self._next[job] += 1
                self._changed.notify_all()

    def give_up(self) -> None:
        """There are no more turns."""
        with self._changed:
            self._broken = True
            self._changed.notify_all()

    def _is_next(self, job: Job, number: int) -> bool:
        waits = job is Job.FORWARD and self._num_to_finish
        return not self._busy and not waits and self._next[job] == number


class PipelineRunner:
    """Runs steps through all stages. Their callables are called on threads of their own."""

    def __init__(
        self, *, runner: ModelRunner, followers: Followers, group: TensorGroup, hands: Hands, device: torch.device
    ) -> None:
        """``hands`` give to the second stage, and take from the last."""
        self._runner = runner
        self._followers = followers
        self._group = group
        self._hands = hands
        self._device = device
        self._turns = Turns()
        self._taking = threading.Condition()
        self._num_taken = 0

    def prepare(self, batch: Batch) -> Callable[[], StepResult]:
        """As :class:`workers.engine.types.Runner` says."""
        batch = self._runner.choose(batch)
        number = self._followers.announce(batch)
        return partial(self._execute, number, self._runner.lay_out(batch))

    @torch.inference_mode()
    def _execute(self, number: int, step: Prepared) -> StepResult:
        started_s = time.monotonic()
        with self._turns.take(Job.FORWARD, number):
            awaited = newest(step.awaiting)
            self._followers.start(Begin(Job.FORWARD, number, tuple(awaited)))
            self._runner.put_awaited(step, awaited)
            self._hands.give(self._runner.forward(step))
        masks = self._runner.find_masks(step)
        hidden = self._take(number, len(step.needed))
        with self._turns.take(Job.FINISH, number):
            self._followers.start(Begin(Job.FINISH, number))
            self._group.run(broadcast, hidden)
            logits, scores = self._runner.finish(step, hidden.to(self._device))
            return self._runner.answer(step, logits, scores, masks, started_s)

    def _take(self, number: int, num_rows: int) -> torch.Tensor:
        """What the last stage gives back of a step, [N, E]: steps come in their order."""
        with self._taking:
            self._taking.wait_for(lambda: self._num_taken == number)
            try:
                return self._hands.take(num_rows)
            except BaseException:
                self._turns.give_up()
                raise
            finally:
                self._num_taken += 1
                self._taking.notify_all()
