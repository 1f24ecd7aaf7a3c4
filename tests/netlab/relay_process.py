"""The relay, from the side of the process that started it."""

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from tests.netlab.relay import Change, Setup

_REPOSITORY = Path(__file__).resolve().parents[2]
_START_S = 20.0
_ANSWER_S = 10.0
_END_S = 5.0


class RelayFailed(Exception):
    """The relay ended, or did not answer; the text is what it said last."""


class RelayProcess:
    """The relay while it runs."""

    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        self._process = process
        self._heard = b""

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def change(self, changes: Sequence[Change]) -> None:
        """Returns once the changes are made. Raises RelayFailed."""
        self.tell([asdict(change) for change in changes], "changed", _ANSWER_S)

    def tell(self, message: object, answer: str, timeout_s: float) -> None:
        """Says something and waits for the answer to it. Raises RelayFailed."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # why it ended is said below
            os.write(self._process.stdin.fileno(), json.dumps(message).encode() + b"\n")
        line = self._line(time.monotonic() + timeout_s)
        if line != answer:
            raise RelayFailed(f"the relay said {line!r} and not {answer!r}")

    def _line(self, deadline_s: float) -> str:
        assert self._process.stdout is not None
        number = self._process.stdout.fileno()
        while b"\n" not in self._heard:
            if not select.select([number], (), (), max(0.0, deadline_s - time.monotonic()))[0]:
                raise RelayFailed("the relay did not answer in time")
            came = os.read(number, 65_536)
            if not came:
                raise RelayFailed(f"the relay ended with {self._process.wait(_END_S)}; its words are above")
            self._heard += came
        line, _, self._heard = self._heard.partition(b"\n")
        return line.decode()


@contextmanager
def relay_process(setup: Setup) -> Iterator[RelayProcess]:
    """Runs for the length of the block. Raises RelayFailed."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.netlab.relay"],
        cwd=_REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,
        start_new_session=True,  # a terminal's Ctrl-C is for the tests
    )
    with process:
        try:
            relay = RelayProcess(process)
            relay.tell(asdict(setup), "ready", _START_S)
            yield relay
        finally:
            assert process.stdin is not None
            process.stdin.close()
            try:
                process.wait(_END_S)
            except subprocess.TimeoutExpired:
                process.kill()
