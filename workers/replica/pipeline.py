"""The leader of a pipeline, which has several steps on their way through the stages at once.

While the last stage computes one step, the first computes others. It computes a step's first layers (FORWARD) when the
step is dispatched, and its logits and tokens (FINISH) when the last stage has given the hidden states back. Each step
has a thread that waits for these. The threads compute one at a time: forwards in the order of steps, finishes in the
order of steps, and a finish before a forward, since it lets sequences go on (the hybrid scheduling of DeepSpeed
Inference, Aminabadi et al. 2022, which does not flush the pipeline between tokens).
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch

from workers.collectives.algorithms import broadcast
from workers.collectives.group import TensorGroup
from workers.replica.followers import BeginMessage, Followers, StepPart
from workers.replica.stages import StageLinks
from workers.step.layout import Prepared
from workers.step.runner import ModelRunner, newest
from workers.step.types import Batch, StepResult

_CHECK_S = 0.1


class ComputeOrder:
    """Decides which of several threads computes next, and which receives next.

    Once a step has failed, no other goes on: every wait ends with the error of the step that failed first.
    """

    def __init__(self, alive: Callable[[], None]) -> None:
        """``alive`` is called again and again during waits; it raises where a rank is known to be lost."""
        self._alive = alive
        self._changed = threading.Condition()
        self._busy = False
        self._failure: BaseException | None = None
        self._next = {StepPart.FORWARD: 0, StepPart.FINISH: 0}
        self._num_to_finish = 0
        self._num_received = 0

    @contextmanager
    def turn(self, part: StepPart, number: int) -> Iterator[None]:
        """Waits until this part of the step may be computed, and keeps all others waiting meanwhile.

        Used within :meth:`step`, which ends the waits of all others where the part fails. Raises what :meth:`check`
        raises.
        """
        with self._changed:
            self._num_to_finish += part is StepPart.FINISH
            self._wait(lambda: self._is_next(part, number))
            self._num_to_finish -= part is StepPart.FINISH
            self._busy = True
        yield
        with self._changed:
            self._busy = False
            self._next[part] += 1
            self._changed.notify_all()

    @contextmanager
    def reception(self, number: int) -> Iterator[None]:
        """Waits until the hidden states of all steps before this one are received. Used as :meth:`turn` is."""
        with self._changed:
            self._wait(lambda: self._num_received == number)
        yield
        with self._changed:
            self._num_received += 1
            self._changed.notify_all()

    @contextmanager
    def step(self) -> Iterator[None]:
        """Ends the waits of all other steps where this one raises, wherever that is: they would wait for ever."""
        try:
            yield
        except BaseException as error:
            with self._changed:
                self._failure = self._failure or error
                self._changed.notify_all()
            raise

    def check(self) -> None:
        """Raises PeerFailed where a rank is lost, and else the error of the step that failed first, where one has."""
        self._alive()
        if self._failure is not None:
            raise self._failure

    def _wait(self, condition: Callable[[], bool]) -> None:
        """Waits for a condition. The caller holds the lock, which is released meanwhile."""
        while not self._changed.wait_for(lambda: self._failure is not None or condition(), _CHECK_S):
            self.check()
        if self._failure is not None:
            self.check()

    def _is_next(self, part: StepPart, number: int) -> bool:
        must_wait = part is StepPart.FORWARD and self._num_to_finish > 0
        return not self._busy and not must_wait and self._next[part] == number


class PipelineRunner:
    """Runs steps through all stages. The callables that it returns are called on threads of their own."""

    def __init__(
        self, *, runner: ModelRunner, followers: Followers, group: TensorGroup, links: StageLinks, device: torch.device
    ) -> None:
        """``links`` send to the second stage and receive from the last."""
        self._runner = runner
        self._followers = followers
        self._group = group
        self._links = links
        self._device = device
        self._order = ComputeOrder(followers.check)

    def prepare(self, batch: Batch) -> Callable[[], StepResult]:
        """Implements :meth:`workers.engine.types.Runner.prepare`."""
        batch = self._runner.choose(batch)
        number = self._followers.announce(batch)
        return partial(self._execute, number, self._runner.lay_out(batch))

    @torch.inference_mode()
    def _execute(self, number: int, step: Prepared) -> StepResult:
        """Runs a step through all stages. Raises PeerFailed, and the error of another step that has failed."""
        started_s = time.monotonic()
        with self._order.step():
            with self._order.turn(StepPart.FORWARD, number):
                self._forward(number, step)
            masks = self._runner.find_masks(step)
            with self._order.reception(number):  # the last stage gives them back in the order of steps
                hidden = self._links.receive(len(step.needed), self._order.check)
            with self._order.turn(StepPart.FINISH, number):
                self._followers.begin_part(BeginMessage(part=StepPart.FINISH, number=number))
                self._group.run(broadcast, hidden)
                logits, scores = self._runner.finish(step, hidden.to(self._device))
                return self._runner.answer(step, logits, scores, masks, started_s)

    def _forward(self, number: int, step: Prepared) -> None:
        """Computes the first stage's layers and sends the hidden states on."""
        awaited = newest(step.awaiting)
        self._followers.begin_part(BeginMessage(part=StepPart.FORWARD, number=number, token_ids=tuple(awaited)))
        self._runner.put_awaited(step, awaited)
        self._links.send(self._runner.forward(step))
