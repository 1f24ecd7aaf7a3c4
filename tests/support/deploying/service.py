"""``python -m orchestrator serve`` as a user runs it: a process of its own, its words, and all its descendants."""

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from orchestrator.cli.demo import Family

REPOSITORY = Path(__file__).resolve().parents[3]
START_S = 120.0
STOP_S = 60.0


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Command:
    """A command of ours with its output in a file, so that it never blocks on a full pipe."""

    def __init__(self, argv: Sequence[str], *, env: dict[str, str] | None = None, cwd: Path = REPOSITORY) -> None:
        self._output = tempfile.NamedTemporaryFile("w+b", suffix=".log", delete=False)  # noqa: SIM115 - kept open
        self.process = subprocess.Popen(
            argv,
            cwd=cwd,
            env=os.environ | (env or {}),
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            # Its own group, so that a signal to the tests is not one to it.
            start_new_session=True,
        )
        self.family = Family(self.process.pid)

    def output(self) -> str:
        """Everything it has said."""
        return Path(self._output.name).read_text(errors="replace")

    def wait_for(self, pattern: str, timeout_s: float = START_S) -> re.Match[str]:
        """Wait until its output matches; fails when it ends or takes too long."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            self.family.look()
            ended = self.process.poll() is not None
            if match := re.search(pattern, self.output()):
                return match
            assert not ended, f"ended with {self.process.returncode}:\n{self.output()}"
            time.sleep(0.1)
        raise AssertionError(f"no {pattern!r} within {timeout_s} s:\n{self.output()}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End whatever is left of it, by pid."""
        if self._output.closed:
            return
        self.family.look()
        for process in self.family.seen:
            if process.is_running():
                process.kill()
        self.process.wait()
        self._output.close()
        Path(self._output.name).unlink(missing_ok=True)

    def stop_cleanly(self, number: int = signal.SIGTERM) -> str:
        """Signal it, see that it exits with 0 and leaves no process, and return what it said."""
        with self:
            self.family.look()
            self.process.send_signal(number)
            code = self.process.wait(timeout=STOP_S)
            left = self.family.alive()
            output = self.output()
        assert code == 0, output
        assert not left, f"{left}\n{output}"
        return output


def orchestrator(*args: str, env: dict[str, str] | None = None, checkout: Path = REPOSITORY) -> Command:
    """``python -m orchestrator ARGS``, of a checkout of ours."""
    return Command([sys.executable, "-m", "orchestrator", *args], env=env, cwd=checkout)


def serve(
    *overrides: str,
    config: str = "deploy/local.yaml",
    checkout: Path = REPOSITORY,
    env: dict[str, str] | None = None,
) -> tuple[Command, str]:
    """Start ``serve`` on any free port and wait until it serves. Returns it and its address."""
    sets = (
        "gateway.address=127.0.0.1:0",
        "gateway.http_address=127.0.0.1:0",
        "telemetry.prometheus_address=null",
        *overrides,
    )
    command = orchestrator("serve", config, *(f"--set={override}" for override in sets), env=env, checkout=checkout)
    try:
        return command, command.wait_for(r"event=serving .* address=(\S+)")[1]
    except BaseException:
        command.close()
        raise
