"""What the ranks of a pipeline's stages do for every step, and how hidden states move from stage to stage.

The last stage sends the hidden states that logits are computed from back to the leader, whose stage has the output
head.

Shapes: T tokens of a step, N of them needed for logits, E hidden size.
"""

import math
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from workers.collectives.algorithms import broadcast, payload
from workers.collectives.group import TensorGroup
from workers.replica.follower import PreparedSteps
from workers.replica.followers import BeginMessage, StepPart
from workers.step.runner import ModelRunner
from workers.transport.errors import PeerFailed
from workers.transport.frames import Kind
from workers.transport.link import Link, Transfer, move, receive
from workers.transport.pulse import Pulse


class StageLinks:
    """A rank's links with the stages before and after its own. One thread may send while another receives."""

    def __init__(
        self,
        *,
        source: Link | None,
        targets: Sequence[Link],
        pulse: Pulse,
        group: TensorGroup,
        hidden_size: int,
        dtype: torch.dtype,
    ) -> None:
        """Takes the links, and a group that says how long this rank may wait for others.

        Args:
            source: leads to the rank that this one receives from.
            targets: lead to those that it sends to.
        """
        self._group = group
        self._source = source
        self._targets = targets
        self._pulse = pulse
        self._hidden_size = hidden_size
        self._dtype = dtype

    def empty(self, num_rows: int) -> Tensor:
        """Allocates host memory for hidden states [rows, E]."""
        return torch.empty(num_rows, self._hidden_size, dtype=self._dtype)

    def send(self, x: Tensor) -> None:
        """Sends hidden states [rows, E] to the stage after this one. Raises PeerFailed."""
        on_host = x.cpu().contiguous()
        transfers = [Transfer(link=link, send=payload(on_host)) for link in self._targets]
        self._move(transfers, self._group.limit_s, self._pulse.check)

    def receive(self, num_rows: int, alive: Callable[[], None] | None = None) -> Tensor:
        """Receives hidden states [rows, E] on the host, however long that takes. Raises PeerFailed.

        Args:
            alive: is called again and again during the wait, and raises what ends it; None: the pulse's check.
        """
        assert self._source is not None, "the first stage receives from the last only"
        x = self.empty(num_rows)
        transfer = Transfer(link=self._source, receive=payload(x))
        self._move([transfer], math.inf, alive or self._pulse.check)
        return x

    def _move(self, transfers: Sequence[Transfer], timeout_s: float, alive: Callable[[], None]) -> None:
        try:
            move(transfers, deadline_s=time.monotonic() + timeout_s, alive=alive)
        except PeerFailed as error:
            raise self._pulse.reason(error) from error


class FirstStage:
    """The task of a rank beside the leader: it computes the parts of steps that the leader begins."""

    def __init__(
        self, *, runner: ModelRunner, leader: Link, group: TensorGroup, links: StageLinks, device: torch.device
    ) -> None:
        """``leader`` is the COMPUTE link to the leader."""
        self._runner = runner
        self._leader = leader
        self._group = group
        self._links = links
        self._device = device

    def run_next(self, steps: PreparedSteps, alive: Callable[[], None]) -> None:
        """Implements :meth:`workers.replica.follower.StageTask.run_next`."""
        message = BeginMessage.unpack(receive(self._leader, Kind.BEGIN, deadline_s=math.inf, alive=alive))
        step = steps.get(message.number)
        self._runner.put_awaited(step, message.token_ids)
        match message.part:
            case StepPart.WHOLE:
                self._runner.compute(step)
            case StepPart.FORWARD:
                self._links.send(self._runner.forward(step))
                return
            case StepPart.FINISH:
                hidden = self._links.empty(len(step.needed))
                self._group.run(broadcast, hidden)
                self._runner.finish(step, hidden.to(self._device))
        steps.drop(message.number)


class LaterStage:
    """The task of a rank of any other stage: it computes its layers of every step, in the order of steps."""

    def __init__(self, *, runner: ModelRunner, links: StageLinks, is_last: bool, device: torch.device) -> None:
        self._runner = runner
        self._links = links
        self._is_last = is_last
        self._device = device
        self._number = 0

    def run_next(self, steps: PreparedSteps, alive: Callable[[], None]) -> None:
        """Implements :meth:`workers.replica.follower.StageTask.run_next`."""
        step = steps.get(self._number)
        x = self._links.receive(len(step.inputs.token_ids), alive).to(self._device)
        y = self._runner.forward(step, x)
        self._links.send(step.needed.take(y) if self._is_last else y)
        steps.drop(self._number)
        self._number += 1
