"""The gateway as a child process of ``serve``: started, listened to, drained."""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from orchestrator.deployment.preflight import Checked
from orchestrator.deployment.stop_request import StopRequest
from orchestrator.errors import LaunchFailed
from orchestrator.launcher.process import environment

_POLL_S = 0.2
_GATEWAY_START_S = 30.0
# Beyond the grace period: closing streams and exporters.
_GATEWAY_STOP_S = 10.0


class GatewayProcess:
    """The gateway process."""

    def __init__(self, process: "subprocess.Popen[bytes]", address: str) -> None:
        self.process = process
        self.address = address

    def ended(self) -> bool:
        return self.process.poll() is not None

    def stop(self, *, grace_s: float, stop: StopRequest) -> int:
        """Drain it, at once when the user insists; kill it when even that takes too long. Returns its exit code."""
        self.process.terminate()
        deadline = time.monotonic() + grace_s + _GATEWAY_STOP_S
        cut = False
        while not self.ended():
            if stop.forced.is_set() and not cut:
                # Its second signal, a SIGINT: it ends every stream with its last message, and then itself.
                cut = True
                self.process.send_signal(signal.SIGINT)
                deadline = min(deadline, time.monotonic() + _GATEWAY_STOP_S)
            if time.monotonic() > deadline:
                self.process.kill()
            time.sleep(_POLL_S / 4)
        return self.process.wait()


@contextmanager
def gateway_process(
    path: Path, overrides: Sequence[str], checked: Checked, control_address: str, stop: StopRequest
) -> Iterator[GatewayProcess]:
    """Start the gateway and wait until it listens; at the end of the block nothing of it is left.

    Raises:
        LaunchFailed: it ended, or did not listen in time.
    """
    process = subprocess.Popen(
        [
            sys.executable, "-m", "orchestrator.gateway", str(path.resolve()), "--control", control_address,
            "--max-context-tokens", str(checked.plan.model.max_context_tokens), "--dtype", checked.plan.dtype.value,
            "--parent-pid", str(os.getpid()), *(f"--set={override}" for override in overrides),
        ],
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        # A terminal's Ctrl-C is for this process, which drains the gateway in order.
        start_new_session=True,
    )  # fmt: skip
    try:
        yield GatewayProcess(process, _listening(process, stop))
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        assert process.stdout is not None
        process.stdout.close()


def _listening(process: "subprocess.Popen[bytes]", stop: StopRequest) -> str:
    """The address that the gateway says it listens on. Raises LaunchFailed."""
    assert process.stdout is not None
    lines: queue.Queue[bytes] = queue.Queue()
    threading.Thread(target=lambda out: lines.put(out.readline()), args=(process.stdout,), daemon=True).start()
    deadline = time.monotonic() + _GATEWAY_START_S
    while time.monotonic() < deadline and not stop.asked.is_set():
        try:
            line = lines.get(timeout=_POLL_S)
        except queue.Empty:
            continue
        if not line:
            raise LaunchFailed(f"the gateway ended at its start with exit code {process.wait()}; its words are above")
        return str(json.loads(line)["address"])
    raise LaunchFailed("stopped while starting" if stop.asked.is_set() else "the gateway did not start in time")
