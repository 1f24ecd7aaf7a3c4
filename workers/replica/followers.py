"""A leader's hold on the ranks that follow it: each is told of every step when it is prepared, and those of its own
stage when a part of it begins.
"""

import struct
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

from workers.collectives.group import COLLECTIVE_S
from workers.step.types import Batch
from workers.step.wire import step_message
from workers.transport.errors import BadFrame, PeerFailed
from workers.transport.frames import Kind
from workers.transport.link import Link, send
from workers.transport.pulse import Pulse

_HEAD = struct.Struct("<BQ")  # job, number of the step


class Job(IntEnum):
    """What the ranks of the first stage do together, next."""

    WHOLE = 1  # a step, where there is one stage
    FORWARD = 2  # a step's first layers
    FINISH = 3  # the logits of what the last stage gave back


@dataclass(frozen=True, slots=True)
class Begin:
    """A job that begins.

    Attributes:
        number: of the step.
        token_ids: that the step has awaited.
    """

    job: Job
    number: int
    token_ids: tuple[int, ...] = ()

    def pack(self) -> memoryview:
        """As it travels."""
        ids = struct.pack(f"<{len(self.token_ids)}I", *self.token_ids)
        return memoryview(_HEAD.pack(self.job, self.number) + ids)

    @classmethod
    def unpack(cls, payload: memoryview) -> "Begin":
        """What :meth:`pack` made. Raises BadFrame."""
        num_ids, rest = divmod(payload.nbytes - _HEAD.size, 4)
        if num_ids < 0 or rest:
            raise BadFrame(f"a BEGIN frame has {payload.nbytes} bytes")
        job, number = _HEAD.unpack_from(payload)
        if job not in Job._value2member_map_:
            raise BadFrame(f"a BEGIN frame names job {job}")
        return cls(job=Job(job), number=number, token_ids=struct.unpack_from(f"<{num_ids}I", payload, _HEAD.size))


class Followers:
    """The ranks that follow this one."""

    def __init__(self, *, steps: Mapping[int, Link], begins: Mapping[int, Link], pulse: Pulse) -> None:
        """Of the links to all of them, and to those of the leader's stage, by rank."""
        self._steps = dict(steps)
        self._begins = dict(begins)
        self._pulse = pulse
        self._num_announced = 0

    def announce(self, batch: Batch) -> int:
        """Tells all what the next step computes; its number. On the thread that prepares steps. Raises PeerFailed."""
        number, self._num_announced = self._num_announced, self._num_announced + 1
        self._tell(self._steps, Kind.STEP, memoryview(step_message(batch, number).SerializeToString()))
        return number

    def begin(self, number: int, token_ids: Sequence[int]) -> None:
        """Begins the whole of a step, with the tokens that it has awaited. Raises PeerFailed."""
        self.start(Begin(Job.WHOLE, number, tuple(token_ids)))

    def start(self, begin: Begin) -> None:
        """Begins a job in the leader's stage. On the thread that computes. Raises PeerFailed."""
        self._tell(self._begins, Kind.BEGIN, begin.pack())

    def _tell(self, links: Mapping[int, Link], kind: Kind, message: memoryview) -> None:
        deadline_s = time.monotonic() + COLLECTIVE_S
        for link in links.values():
            try:
                send(link, kind, message, deadline_s=deadline_s, alive=self._pulse.check)
            except PeerFailed as error:
                raise self._pulse.reason(error) from error
