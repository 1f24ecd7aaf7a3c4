"""A leader's hold on the ranks that follow it, and the loop of one that does."""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from google.protobuf.message import DecodeError

from placement.errors import cause_of
from protos.heterodyne.worker.v1 import worker_pb2 as pb
from workers.collectives.group import COLLECTIVE_S, TensorGroup
from workers.step_types import Batch
from workers.step_wire import step_batch, step_message
from workers.transport.errors import BadFrame, PeerFailed
from workers.transport.frames import Kind
from workers.transport.link import Link, receive, send
from workers.transport.pulse import Pulse

logger = logging.getLogger(__name__)

# Steps that a follower has laid out and not computed: as many as a leader dispatches ahead.
_MOST_AHEAD = 3


class Followers:
    """The ranks that follow this one: told of every step twice, when it is prepared and when it begins."""

    def __init__(self, *, links: Mapping[int, Link], pulse: Pulse, group: TensorGroup) -> None:
        """Of a STEPS link to each of them."""
        self._links = dict(links)
        self._pulse = pulse
        self._group = group
        self._number = 0

    def announce(self, batch: Batch) -> None:
        """Tells them what the next step computes. Raises PeerFailed."""
        message = memoryview(step_message(batch, self._number).SerializeToString())
        self._number += 1
        deadline_s = time.monotonic() + COLLECTIVE_S
        for link in self._links.values():
            try:
                send(link, Kind.STEP, message, deadline_s=deadline_s, alive=self._pulse.check)
            except PeerFailed as error:
                raise self._pulse.reason(error) from error

    def begin(self, token_ids: Sequence[int]) -> None:
        """Tells them the tokens that the step which now begins has awaited. Raises PeerFailed."""
        self._group.give(token_ids)


class FollowingRunner(Protocol):
    """Computes a rank's part of steps."""

    def follow(self, batch: Batch) -> Callable[[Sequence[int]], None]:
        """Lays a batch out; calling the result with the tokens that it awaits computes it."""


class Follower:
    """A rank that does what its leader says: one thread takes and lays out steps, another computes them.

    Attributes:
        failure: why it has ended, where nobody stopped it: whatever it is, the replica has failed.
        ended: done when it has.
    """

    def __init__(
        self,
        *,
        runner: FollowingRunner,
        group: TensorGroup,
        leader: Link,
        pulse: Pulse,
        executor: ThreadPoolExecutor,
        vocab_size: int,
        slot_limit: int,
    ) -> None:
        """``leader`` is the STEPS link to it; ``executor`` has the one thread that computes, and ends with this."""
        self._runner = runner
        self._group = group
        self._leader = leader
        self._pulse = pulse
        self._executor = executor
        self._vocab_size = vocab_size
        self._slot_limit = slot_limit
        self._stopping = threading.Event()
        self._step_failure: BaseException | None = None
        self.failure: BaseException | None = None
        self.ended: Future[None] = Future()
        self.num_steps = 0
        self.thread = threading.Thread(target=self.run, name="follower", daemon=True)

    def stop(self) -> None:
        """Leave the loop; a step that executes is computed to its end, or to that of its leader."""
        self._stopping.set()

    def run(self) -> None:
        """The loop. Ends after ``stop``, or with ``failure`` set."""
        computing: deque[Future[None]] = deque()
        try:
            while True:
                batch = self._take()
                compute = self._runner.follow(batch)
                num_awaited = sum(sequence.awaits_token for sequence in batch.sequences)
                computing.append(self._executor.submit(self._compute, compute, num_awaited))
                if len(computing) > _MOST_AHEAD:
                    computing.popleft().result()
        except _Stopped:
            pass
        except BaseException as error:  # the border of the thread: whatever it was, the replica has failed
            self.failure = error
            logger.error('follower_failed cause="%s"', cause_of(error))
            self._pulse.fail(cause_of(error))
        finally:
            self.ended.set_result(None)
            self._executor.shutdown(wait=False, cancel_futures=True)

    def _take(self) -> Batch:
        """The next step of the leader, however long that takes."""
        try:
            payload = receive(self._leader, Kind.STEP, deadline_s=math.inf, alive=self._alive)
            message = pb.Step.FromString(bytes(payload))
        except PeerFailed as error:
            raise self._pulse.reason(error) from error
        except DecodeError as error:
            raise BadFrame("a STEP frame holds no step") from error
        number, self.num_steps = self.num_steps, self.num_steps + 1
        return step_batch(message, number=number, vocab_size=self._vocab_size, slot_limit=self._slot_limit)

    def _alive(self) -> None:
        """What ends the wait for the next step: a stop, the failure of a step before, the loss of a rank."""
        if self._stopping.is_set():
            raise _Stopped
        if self._step_failure is not None:
            raise self._step_failure
        self._pulse.check()

    def _compute(self, compute: Callable[[Sequence[int]], None], num_awaited: int) -> None:
        """On the executing thread."""
        try:
            compute(self._group.take(num_awaited))
        except BaseException as error:
            self._step_failure = error
            raise


class _Stopped(Exception):
    """This rank was told to stop."""
