"""Takes part in transfers of keys and values as the leader of the replica says."""

import logging
import math
import threading
import time

from placement.errors import HeterodyneError, InvalidRequest, cause_of
from placement.model.specs import ModelSpec
from protos.codec.log_record import said
from protos.heterodyne.worker.v1 import worker_pb2 as pb
from workers.collectives.group import COLLECTIVE_S
from workers.kv_transfer.rank import RankTransfers
from workers.replica.kv_messages import parse, read_expected, read_target
from workers.transport.frames import Kind
from workers.transport.link import Link, receive, send
from workers.transport.pulse import Pulse

logger = logging.getLogger(__name__)


class KvFollower:
    """Carries the leader's commands out, in their order, on a thread of its own.

    Attributes:
        rank: this rank's own side; None until :meth:`use`.
    """

    def __init__(self, *, leader: Link, pulse: Pulse, model: ModelSpec, slot_limit: int) -> None:
        """``leader`` is the KV link to the leader."""
        self._leader = leader
        self._pulse = pulse
        self._model = model
        self._slot_limit = slot_limit
        self._sending = threading.Lock()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kv-follower", daemon=True)
        self.rank: RankTransfers | None = None

    def use(self, rank: RankTransfers) -> None:
        """Sets this rank's own side, and begins to hear the leader."""
        self.rank = rank
        self._thread.start()

    def ended(self, transfer_id: bytes, problem: str, num_bytes: int) -> None:
        """Tells the leader that this rank has all that it expected of a transfer, or what went wrong."""
        self._send(pb.KvCommand(ended=pb.KvEnded(transfer_id=transfer_id, problem=problem, num_bytes=num_bytes)))

    def dropped(self, transfer_id: bytes, problem: str) -> None:
        """Tells the leader that this rank cannot send what it was to send."""
        self._send(pb.KvCommand(dropped=pb.KvEnded(transfer_id=transfer_id, problem=problem)))

    def stop(self) -> None:
        """Ends all transfers, and the thread."""
        self._stopping.set()
        if self.rank is not None:
            self.rank.stop()

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                payload = receive(self._leader, Kind.KV_COMMAND, deadline_s=math.inf, alive=self._alive)
                self._obey(parse(payload))
        except _Stopped:
            return
        except HeterodyneError as error:  # the leader is lost, and the replica with it, as the other threads notice
            extra = said("kv_commands_ended", cause=str(error))
            logger.debug("No more transfers of keys and values are told of: %s.", error, extra=extra)
        except Exception as error:  # the border of the thread: the leader would wait for what this rank no longer does
            words = "This rank can take part in no more transfers."
            logger.exception(words, extra=said("kv_follower_failed"))
            self._pulse.fail(cause_of(error))

    def _alive(self) -> None:
        if self._stopping.is_set():
            raise _Stopped
        self._pulse.check()

    def _obey(self, message: pb.KvCommand) -> None:
        assert self.rank is not None
        problem = ""
        try:
            match message.WhichOneof("command"):
                case "expect":
                    self.rank.expect(read_expected(message.expect, self._model, self._slot_limit))
                case "open":
                    self.rank.open(read_target(message.open, self._model))
                case "close":
                    self.rank.close(message.close.transfer_id)
                case _:
                    problem = "the command is not known"
        except InvalidRequest as error:
            problem = str(error)
        self._send(pb.KvCommand(done=pb.KvDone(problem=problem), number=message.number))

    def _send(self, message: pb.KvCommand) -> None:
        payload = memoryview(message.SerializeToString())
        with self._sending:
            send(
                self._leader,
                Kind.KV_COMMAND,
                payload,
                deadline_s=time.monotonic() + COLLECTIVE_S,
                alive=self._pulse.check,
            )


class _Stopped(HeterodyneError):
    """This rank was told to stop."""
