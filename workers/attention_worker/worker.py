"""The attention worker: accepts model ranks, holds keys and values for them, and attends to these."""

import logging
import select
import socket
import threading
import time
from concurrent.futures import Future
from contextlib import suppress

import torch

from kernels.protocol import Kernels
from kernels.select import kernels_for
from placement.errors import HeterodyneError
from protos.codec.log_record import said
from workers.attention_worker.directory import LEASE_S, Directory
from workers.attention_worker.handshake import Refused, challenge, hear, refuse, welcome
from workers.attention_worker.memory import HeldMemory
from workers.attention_worker.messages import Hello
from workers.attention_worker.serving import ServedSession
from workers.transport.errors import PeerFailed
from workers.transport.link import Link

logger = logging.getLogger(__name__)

PULSE_S = 0.5
# A visitor that has not proved by then that it knows the secret is turned away.
_HELLO_S = 5.0
_WELCOME_S = 30.0
_MOST_VISITORS = 32
_END_S = 5.0
# After a failure to accept: the visitor has left, or this process has too many files open.
_PAUSE_S = 0.05


class AttentionWorker:
    """Serves the sessions of model ranks, each on a thread of its own. It is the loop of a rank without a model.

    Attributes:
        thread: accepts model ranks and shows them that this worker lives.
        ended: has a result once the thread has ended.
        failure: what ended it, if it was not stopped.
    """

    def __init__(
        self,
        listener: socket.socket,
        *,
        secret: bytes,
        kv_cache_bytes: int,
        device: torch.device,
        lease_s: float = LEASE_S,
    ) -> None:
        """Keeps what it is given; nothing runs before ``thread`` is started.

        Args:
            listener: listens already and does not block; its owner closes it.
            secret: what a model rank must prove to know.
            kv_cache_bytes: the most bytes of keys and values of all sessions together.
            lease_s: how long they are held for a model rank that has gone.
        """
        self.thread = threading.Thread(target=self._run, name="attention-worker", daemon=True)
        self.ended: Future[None] = Future()
        self.failure: BaseException | None = None
        self._listener = listener
        self._secret = secret
        self._kernels: Kernels = kernels_for(device)
        self._directory = Directory(kv_cache_bytes=kv_cache_bytes, device=device, lease_s=lease_s)
        self._visitors = threading.BoundedSemaphore(_MOST_VISITORS)
        self._stopping = threading.Event()

    @property
    def held_bytes(self) -> int:
        """Counts the bytes that are set aside for sessions."""
        return self._directory.held_bytes

    @property
    def num_sessions(self) -> int:
        """Counts the sessions that are open."""
        return len(self._directory.sessions)

    def stop(self) -> None:
        """Ends all sessions, and the thread."""
        self._stopping.set()
        if not self.thread.is_alive() and not self.ended.done():
            self.ended.set_result(None)

    def _run(self) -> None:
        try:
            self._accept_all()
        except BaseException as error:  # the border of the thread
            if not self._stopping.is_set():
                logger.exception("The attention worker failed.", extra=said("attention_worker_failed"))
                self.failure = error
        finally:
            self._end()
            self.ended.set_result(None)

    def _accept_all(self) -> None:
        poll = select.poll()
        poll.register(self._listener.fileno(), select.POLLIN)
        next_s = time.monotonic()
        while not self._stopping.is_set():
            if time.monotonic() >= next_s:
                next_s = time.monotonic() + PULSE_S
                for session in self._directory.sessions:
                    session.beat()
                self._directory.let_go()
            if poll.poll(1000 * min(PULSE_S, 0.1)):
                self._accept()

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError:
            time.sleep(_PAUSE_S)
            return
        if not self._visitors.acquire(blocking=False):
            sock.close()
            return
        threading.Thread(target=self._serve, args=(sock,), name="attention-session", daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        """Hears a visitor, and serves it if it is a model rank."""
        try:
            session = self._open(sock)
        except (HeterodyneError, OSError) as error:
            logger.warning("A session was not opened: %s.", error, extra=said("attention_refused", cause=str(error)))
            sock.close()
            return
        except BaseException:
            sock.close()
            raise
        finally:
            self._visitors.release()
        session.run()

    def _open(self, sock: socket.socket) -> ServedSession:
        """Opens a session. Raises Refused, BadFrame and PeerFailed."""
        _keep_alive(sock)
        link, own = challenge(sock, deadline_s=time.monotonic() + _HELLO_S, alive=self._go_on)
        try:
            hello, theirs = hear(link, own, self._secret, deadline_s=time.monotonic() + _HELLO_S, alive=self._go_on)
            return self._directory.admit(
                hello, lambda memory, resumed: self._welcome(link, hello, theirs, memory, resumed=resumed)
            )
        except Refused as refused:
            with suppress(PeerFailed):
                refuse(link, refused, deadline_s=time.monotonic() + _HELLO_S)
            raise

    def _welcome(self, link: Link, hello: Hello, theirs: bytes, memory: HeldMemory, *, resumed: bool) -> ServedSession:
        welcome(
            link,
            theirs,
            self._secret,
            resumed=resumed,
            last_complete=memory.last_complete,
            names=memory.names,
            deadline_s=time.monotonic() + _WELCOME_S,
        )
        link.epoch = hello.epoch
        return ServedSession(link, memory, self._kernels)

    def _go_on(self) -> None:
        if self._stopping.is_set():
            raise PeerFailed(0, "this worker stops")

    def _end(self) -> None:
        """Ends all sessions, and waits for their threads."""
        sessions = self._directory.sessions
        for session in sessions:
            session.stop()
        deadline_s = time.monotonic() + _END_S
        for session in sessions:
            session.ended.wait(max(0.0, deadline_s - time.monotonic()))


def _keep_alive(sock: socket.socket) -> None:
    """Has the system find out that a model rank is cut off, which sends nothing while it has nothing to compute."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, option):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
