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
from concurrent.futures import CancelledError
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


class ComputeOrder:
    """Decides which of several threads computes next."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._busy = False
        self._broken = False
        self._next = {StepPart.FORWARD: 0, StepPart.FINISH: 0}
        self._num_to_finish = 0

    @contextmanager
    def turn(self, part: StepPart, number: int) -> Iterator[None]:
        """Waits until this part of the step may be computed, and keeps all others waiting meanwhile.

        Raises CancelledError where a turn before this one raised.
        """
        with self._changed:
            self._num_to_finish += part is StepPart.FINISH
            self._changed.wait_for(lambda: self._broken or self._is_next(part, number))
            if self._broken:
                raise CancelledError
            self._num_to_finish -= part is StepPart.FINISH
            self._busy = True
        try:
            yield
        except BaseException:
            self.cancel()
            raise
        finally:
            with self._changed:
                self._busy = False
                self._next[part] += 1
                self._changed.notify_all()

    def cancel(self) -> None:
        """Grants no more turns: whoever waits for one raises CancelledError."""
        with self._changed:
            self._broken = True
            self._changed.notify_all()

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
        self._order = ComputeOrder()
        self._receiving = threading.Condition()
        self._num_received = 0

    def prepare(self, batch: Batch) -> Callable[[], StepResult]:
        """Implements :meth:`workers.engine.types.Runner.prepare`."""
        batch = self._runner.choose(batch)
        number = self._followers.announce(batch)
        return partial(self._execute, number, self._runner.lay_out(batch))

    @torch.inference_mode()
    def _execute(self, number: int, step: Prepared) -> StepResult:
        started_s = time.monotonic()
        with self._order.turn(StepPart.FORWARD, number):
            awaited = newest(step.awaiting)
            message = BeginMessage(part=StepPart.FORWARD, number=number, token_ids=tuple(awaited))
            self._followers.begin_part(message)
            self._runner.put_awaited(step, awaited)
            self._links.send(self._runner.forward(step))
        masks = self._runner.find_masks(step)
        hidden = self._receive(number, len(step.needed))
        with self._order.turn(StepPart.FINISH, number):
            self._followers.begin_part(BeginMessage(part=StepPart.FINISH, number=number))
            self._group.run(broadcast, hidden)
            logits, scores = self._runner.finish(step, hidden.to(self._device))
            return self._runner.answer(step, logits, scores, masks, started_s)

    def _receive(self, number: int, num_rows: int) -> torch.Tensor:
        """Receives the hidden states [N, E] that the last stage gives back of a step, in the order of steps."""
        with self._receiving:
            self._receiving.wait_for(lambda: self._num_received == number)
            try:
                return self._links.receive(num_rows, self._followers.check)
            except BaseException:
                self._order.cancel()
                raise
            finally:
                self._num_received += 1
                self._receiving.notify_all()
