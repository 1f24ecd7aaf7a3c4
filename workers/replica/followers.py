"""The ranks that follow a leader, as the leader sees them.

The leader announces every step to all of them when it prepares the step. It tells those of its own stage to begin when
a part of the step begins. Announcements (STEP frames) and beginnings (BEGIN frames) travel on links of their own, each
in order; a follower that is told to begin a step waits for its announcement.
"""

import struct
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

from workers.collectives.group import COLLECTIVE_S
from workers.replica.announcer import Announcer
from workers.step.types import Batch
from workers.step.wire import step_message
from workers.transport.errors import BadFrame, PeerFailed
from workers.transport.frames import Kind
from workers.transport.link import Link, send
from workers.transport.pulse import Pulse

_HEAD = struct.Struct("<BQ")  # the part, and the number of the step


class StepPart(IntEnum):
    """The part of a step that the ranks of the first stage compute together."""

    WHOLE = 1
    """The whole step, where there is one stage."""
    FORWARD = 2
    """The first stage's layers."""
    FINISH = 3
    """The logits, from the hidden states that the last stage gave back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BeginMessage:
    """The payload of a BEGIN frame: it has the ranks of the first stage begin a part of a step.

    Attributes:
        number: the number of the step.
        token_ids: the tokens that the step awaited, in the order of its awaiting sequences.
    """

    part: StepPart
    number: int
    token_ids: tuple[int, ...] = ()

    def pack(self) -> memoryview:
        """Returns the payload."""
        ids = struct.pack(f"<{len(self.token_ids)}I", *self.token_ids)
        return memoryview(_HEAD.pack(self.part, self.number) + ids)

    @classmethod
    def unpack(cls, payload: memoryview) -> "BeginMessage":
        """Reads the payload that :meth:`pack` made. Raises BadFrame."""
        num_ids, rest = divmod(payload.nbytes - _HEAD.size, 4)
        if num_ids < 0 or rest:
            raise BadFrame(f"a BEGIN frame has {payload.nbytes} bytes")
        part, number = _HEAD.unpack_from(payload)
        if part not in StepPart._value2member_map_:
            raise BadFrame(f"a BEGIN frame names part {part}")
        token_ids = struct.unpack_from(f"<{num_ids}I", payload, _HEAD.size)
        return cls(part=StepPart(part), number=number, token_ids=token_ids)


class Followers:
    """Announces steps to the ranks that follow, and has them begin."""

    def __init__(
        self,
        *,
        steps: Mapping[int, Link],
        begins: Mapping[int, Link],
        pulse: Pulse,
        timeout_s: float = COLLECTIVE_S,
    ) -> None:
        """Takes over the sending ends of some links.

        Args:
            steps: the STEPS links to all ranks that follow, by rank.
            begins: the COMPUTE links to those of the leader's stage, by rank.
            pulse: watches all ranks.
            timeout_s: how long a rank may take to accept a frame.
        """
        self._begins = dict(begins)
        self._pulse = pulse
        self._timeout_s = timeout_s
        self._wait_s = 0.0
        self._num_announced = 0
        self._announcer = Announcer(links=tuple(steps.values()), pulse=pulse, timeout_s=timeout_s)

    def announce(self, batch: Batch) -> int:
        """Announces the next step to all ranks and returns its number. Never waits for a rank.

        Called by the thread that prepares steps. What keeps the announcement from being sent is raised by
        :meth:`begin` and :meth:`check`.
        """
        number, self._num_announced = self._num_announced, self._num_announced + 1
        message = step_message(batch, number, wait_s=self._wait_s)
        self._announcer.send(Kind.STEP, memoryview(message.SerializeToString()))
        return number

    def wait_at_most(self, limit_s: float) -> None:
        """Sets how long a rank may take to accept a frame, and tells all with the next step how long they may wait."""
        self._timeout_s = self._wait_s = self._announcer.timeout_s = limit_s

    def begin(self, number: int, token_ids: Sequence[int]) -> None:
        """Has the ranks begin a whole step, given the tokens that it awaited. Raises as :meth:`begin_part` does."""
        self.begin_part(BeginMessage(part=StepPart.WHOLE, number=number, token_ids=tuple(token_ids)))

    def begin_part(self, message: BeginMessage) -> None:
        """Has the ranks of the leader's stage begin a part of a step. Called by the thread that computes.

        Raises:
            PeerFailed: a rank was lost, or did not accept this message or an announcement in time.
        """
        self._announcer.check()
        deadline_s = time.monotonic() + self._timeout_s
        payload = message.pack()
        for link in self._begins.values():
            try:
                send(link, Kind.BEGIN, payload, deadline_s=deadline_s, alive=self._pulse.check)
            except PeerFailed as error:
                raise self._pulse.reason(error) from error

    def check(self) -> None:
        """Raises PeerFailed where a rank was lost, or did not accept an announcement in time."""
        self._pulse.check()
        self._announcer.check()

    def close(self) -> None:
        """Gives up announcements that are not sent yet. Waits for a second at most."""
        self._announcer.close()
