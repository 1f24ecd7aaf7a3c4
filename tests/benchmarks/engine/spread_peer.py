"""A peer over two hosts of an emulated cluster: two processes that load, measure, freeze and end together."""

import contextlib
import os
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.benchmarks.engine.engine_cases import Case, Sample
from tests.benchmarks.engine.engine_peers import LOGS, Peer, PeerFailed
from tests.netlab.lab import Host

_LISTEN_S = 60.0
_POLL_S = 0.05
_END_S = 10.0
_TCP_LISTEN = "0A"


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What runs on one of the hosts."""

    host: Host
    argv: Sequence[str]
    environment: Mapping[str, str]


class SpreadPeer:
    """Both parts of a peer, frozen except in its turns.

    It is opened in the driver's main thread: peers are killed when the thread that started them ends.

    Args:
        name: of the engine and its layout, for the logs.
        asked: speaks the protocol of ``peers/peer_protocol.py``.
        other: does what the first makes it do, until its standard input ends.
        port: where ``other`` listens before ``asked`` is told anything; None where the two find each other.

    Raises:
        PeerFailed: ``other`` does not listen.
    """

    def __init__(self, name: str, *, asked: Part, other: Part, port: int | None = None) -> None:
        LOGS.mkdir(parents=True, exist_ok=True)
        self._log = LOGS / f"{name}-other.log"
        self._host = other.host
        self._is_closing = threading.Event()
        with self._log.open("wb") as log:
            self._other = other.host.popen(
                other.argv,
                env=os.environ | other.environment,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        try:
            if port is not None:
                self._wait_until_listening(port)
            self._peer = Peer(name, asked.host.command(asked.argv), environment=asked.environment)
        except BaseException:
            self._end_other()
            raise
        threading.Thread(target=self._watch, daemon=True).start()

    @property
    def versions(self) -> Mapping[str, str]:
        """What it says it runs, once loaded."""
        return self._peer.versions

    def load(self, **settings: Any) -> None:
        """Load the model, then freeze. Raises PeerFailed."""
        try:
            self._peer.load(**settings)
        except PeerFailed as error:
            raise self._failed(error) from None
        self._signal(signal.SIGSTOP)

    def measure(self, case: Case, seed: int) -> Sample:
        """Thaw, measure, freeze. Raises PeerFailed."""
        self._signal(signal.SIGCONT)
        try:
            return self._peer.measure(case, seed)
        except PeerFailed as error:
            raise self._failed(error) from None
        finally:
            self._signal(signal.SIGSTOP)

    def close(self) -> None:
        """End both parts."""
        self._is_closing.set()
        self._peer.close()
        self._end_other()

    def _wait_until_listening(self, port: int) -> None:
        deadline_s = time.monotonic() + _LISTEN_S
        while not is_listening(self._other.pid, self._host.address, port):
            if self._other.poll() is not None:
                raise self._failed(PeerFailed("nobody to ask"))
            if time.monotonic() >= deadline_s:
                raise PeerFailed(
                    f"nobody listens at {self._host.address}:{port} after {_LISTEN_S:g} s; see {self._log}"
                )
            time.sleep(_POLL_S)

    def _watch(self) -> None:
        """The first part would wait for the second's answer until its own deadline."""
        self._other.wait()
        if not self._is_closing.is_set():
            self._peer.kill()

    def _failed(self, error: PeerFailed) -> PeerFailed:
        """``error``, or what it comes from where the other part has ended."""
        code = self._other.poll()
        if code is None:
            return error
        lines = self._log.read_text(errors="replace").strip().splitlines()
        words = lines[-1][:200] if lines else "it said nothing"
        return PeerFailed(f"its part on {self._host.spec.name} ended with exit code {code}; see {self._log}: {words}")

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._other.pid, number)

    def _end_other(self) -> None:
        assert self._other.stdin is not None
        self._signal(signal.SIGCONT)
        with contextlib.suppress(BrokenPipeError):
            self._other.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._other.wait(timeout=_END_S)
        self._signal(signal.SIGKILL)
        self._other.wait(timeout=_END_S)


def is_listening(pid: int, address: str, port: int) -> bool:
    """Whether somebody listens there, in the network that a process is in; False once it has ended."""
    (number,) = struct.unpack("=I", socket.inet_aton(address))
    wanted = f"{number:08X}:{port:04X}"
    try:
        lines = Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]
    except OSError:
        return False
    rows = (line.split() for line in lines)
    return any(row[1] == wanted and row[3] == _TCP_LISTEN for row in rows)
