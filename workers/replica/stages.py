"""What the ranks of a pipeline's stages do, step after step, and how hidden states go from stage to stage.

The last stage gives what logits are computed of back to the leader, whose stage has the output head.

Shapes: T tokens of a step, N of them needed for logits, E hidden size.
"""

import math
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from workers.collectives.algorithms import broadcast, payload
from workers.collectives.group import COLLECTIVE_S, TensorGroup
from workers.replica.follower import LaidOut
from workers.replica.followers import Begin, Job
from workers.step.runner import ModelRunner
from workers.transport.errors import PeerFailed
from workers.transport.frames import Kind
from workers.transport.link import Link, Transfer, move, receive
from workers.transport.pulse import Pulse


class Hands:
    """A rank's links with the stages before and after its own. One thread may send while another receives."""

    def __init__(
        self, *, before: Link | None, after: Sequence[Link], pulse: Pulse, hidden_size: int, dtype: torch.dtype
    ) -> None:
        """Of the rank that gives to this one, and of those that this one gives to."""
        self._before = before
        self._after = after
        self._pulse = pulse
        self._hidden_size = hidden_size
        self._dtype = dtype

    def room(self, num_rows: int) -> Tensor:
        """Memory for hidden states [rows, E], not on a GPU."""
        return torch.empty(num_rows, self._hidden_size, dtype=self._dtype)

    def give(self, x: Tensor) -> None:
        """Hands ``x`` [rows, E] on. Raises PeerFailed."""
        on_host = x.cpu().contiguous()
        transfers = [Transfer(link=link, send=payload(on_host)) for link in self._after]
        self._move(transfers, COLLECTIVE_S, self._pulse.check)

    def take(self, num_rows: int, alive: Callable[[], None] | None = None) -> Tensor:
        """What is handed to this rank, [rows, E], however long that takes. Raises PeerFailed, and as ``alive``."""
        assert self._before is not None, "the first stage takes from the last only"
        x = self.room(num_rows)
        transfer = Transfer(link=self._before, receive=payload(x))
        self._move([transfer], math.inf, alive or self._pulse.check)
        return x

    def _move(self, transfers: Sequence[Transfer], timeout_s: float, alive: Callable[[], None]) -> None:
        try:
            move(transfers, deadline_s=time.monotonic() + timeout_s, alive=alive)
        except PeerFailed as error:
            raise self._pulse.reason(error) from error


class FirstStage:
    """The duty of a rank beside the leader: the jobs that it begins."""

    def __init__(
        self, *, runner: ModelRunner, leader: Link, group: TensorGroup, hands: Hands, device: torch.device
    ) -> None:
        """``leader`` is the COMPUTE link to it."""
        self._runner = runner
        self._leader = leader
        self._group = group
        self._hands = hands
        self._device = device

    def do(self, steps: LaidOut, alive: Callable[[], None]) -> None:
        """As :class:`workers.replica.follower.Duty` says."""
        begin = Begin.unpack(receive(self._leader, Kind.BEGIN, deadline_s=math.inf, alive=alive))
        step = steps.get(begin.number)
        self._runner.put_awaited(step, begin.token_ids)
        match begin.job:
            case Job.WHOLE:
                self._runner.compute(step)
            case Job.FORWARD:
                self._hands.give(self._runner.forward(step))
                return
            case Job.FINISH:
                hidden = self._hands.room(len(step.needed))
                self._group.run(broadcast, hidden)
                self._runner.finish(step, hidden.to(self._device))
        steps.drop(begin.number)


class LaterStage:
    """The duty of a rank of any other stage: its layers of every step, in their order."""

    def __init__(self, *, runner: ModelRunner, hands: Hands, is_last: bool, device: torch.device) -> None:
        self._runner = runner
        self._hands = hands
        self._is_last = is_last
        self._device = device
        self._number = 0

    def do(self, steps: LaidOut, alive: Callable[[], None]) -> None:
        """As :class:`workers.replica.follower.Duty` says."""
        step = steps.get(self._number)
        x = self._hands.take(len(step.inputs.token_ids), alive).to(self._device)
        y = self._runner.forward(step, x)
        self._hands.give(step.needed.take(y) if self._is_last else y)
        steps.drop(self._number)
        self._number += 1
