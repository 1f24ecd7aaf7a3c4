"""Owns the gateway as a child process of ``serve``: starts it, reads what it prints, drains it."""

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from orchestrator.deployment.preflight import Checked
from orchestrator.deployment.stop_request import StopRequest
from orchestrator.errors import LaunchFailed
from orchestrator.event_log import EventLog
from orchestrator.launcher.process import ended_by, environment
from protos.codec.child_process import Listening
from protos.codec.log_record import LAST_WORDS, LogRecord
from protos.heterodyne.v1 import admin_pb2, admin_pb2_grpc

_POLL_S = 0.2
_GATEWAY_START_S = 30.0
# Beyond the grace period: closing streams and exporters.
_GATEWAY_STOP_S = 10.0
_LONGEST_LINE = 1 << 16
# A child of the gateway's own may hold the pipe for longer.
_LAST_OUTPUT_S = 1.0
_HEALTH_S = 0.5
_STATUS_S = 1.0
_SERVICE = "heterodyne.v1.Inference"
# It is this process's own child, which no proxy stands before.
_CHANNEL_OPTIONS = (("grpc.enable_http_proxy", 0),)


class GatewayProcess:
    """The gateway process, and the addresses it listens on; that for HTTP is empty where it does not."""

    def __init__(self, output: "_Output", listening: Listening) -> None:
        self.process = output.process
        self.address = listening.address
        self.http_address = listening.http_address
        self._output = output

    def ended(self) -> bool:
        """Returns whether the process has ended."""
        return self.process.poll() is not None

    def why_ended(self) -> str:
        """Says in a clause how the process ended, with its last words where it had any. It has ended."""
        assert self.process.returncode is not None
        self._output.wait_end()
        words = f": {self._output.last_words}" if self._output.last_words else ""
        return f"the gateway {ended_by(self.process.returncode)}{words}"

    def serves(self) -> bool:
        """Returns whether it would take a request now, as its own health service says."""
        request = health_pb2.HealthCheckRequest(service=_SERVICE)
        try:
            with grpc.insecure_channel(self.address, options=_CHANNEL_OPTIONS) as channel:
                answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=_HEALTH_S)
        except grpc.RpcError:
            return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    def num_requests(self) -> int | None:
        """Returns how many requests it works on or lets wait; None where it does not say so in time."""
        try:
            with grpc.insecure_channel(self.address, options=_CHANNEL_OPTIONS) as channel:
                stub = admin_pb2_grpc.AdminStub(channel)
                status = stub.GetStatus(admin_pb2.GetStatusRequest(), timeout=_STATUS_S)
        except grpc.RpcError:
            return None
        return status.gateway.in_flight + status.gateway.queued

    def stop(self, *, grace_s: float, stop: StopRequest) -> int:
        """Drains it, at once when the user insists; kills it when even that takes too long. Returns its exit code."""
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
    path: Path, overrides: Sequence[str], checked: Checked, control_address: str, stop: StopRequest, log: EventLog
) -> Iterator[GatewayProcess]:
    """Starts the gateway and waits until it listens; at the end of the block nothing of it is left.

    Raises:
        LaunchFailed: it ended, or did not listen in time.
    """
    process = subprocess.Popen(
        [
            sys.executable, "-m", "orchestrator.gateway", str(path.resolve()), "--control", control_address,
            "--max-context-tokens", str(checked.plan.model.max_context_tokens), "--dtype", checked.plan.dtype.value,
            "--embeddings", "tied" if checked.plan.model.tied_embeddings else "untied",
            "--parent-pid", str(os.getpid()), "--log-level", log.level.value,
            *(f"--set={override}" for override in overrides),
        ],
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        # A terminal's Ctrl-C is for this process, which drains the gateway in order.
        start_new_session=True,
    )  # fmt: skip
    output = _Output(process, log)
    try:
        yield GatewayProcess(output, _listening(output, stop))
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        output.close()


def _listening(output: "_Output", stop: StopRequest) -> Listening:
    """Returns where the gateway says that it listens. Raises LaunchFailed."""
    deadline = time.monotonic() + _GATEWAY_START_S
    while time.monotonic() < deadline and not stop.asked.is_set():
        try:
            listening = output.first.get(timeout=_POLL_S)
        except queue.Empty:
            continue
        if listening is None:
            raise LaunchFailed(_why_silent(output, timeout_s=deadline - time.monotonic()))
        return listening
    raise LaunchFailed("stopped while starting" if stop.asked.is_set() else "the gateway did not start in time")


def _why_silent(output: "_Output", *, timeout_s: float) -> str:
    """Returns why a gateway says no more before it said where it listens."""
    try:
        code = output.process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        return "the gateway's output ended, or could not be read, before it said where it listens"
    if output.last_words:
        return f"the gateway did not start: {output.last_words}"
    return f"the gateway {ended_by(code)} at its start" + ("; its words are above" if code >= 0 else "")


class _Output:
    """Reads what a child process prints until it ends, and hands it to a log, but for its last words.

    Attributes:
        first: gets where the child listens, once it says so; None when its output ends before.
        last_words: why the child says that it ends.
    """

    def __init__(self, process: "subprocess.Popen[bytes]", log: EventLog) -> None:
        self.process = process
        self._log = log
        self.last_words = ""
        self.first: queue.Queue[Listening | None] = queue.Queue()
        self._thread = threading.Thread(target=self._read, name="gateway-output", daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        listens = False
        try:
            for line in iter(partial(self.process.stdout.readline, _LONGEST_LINE), b""):
                text = line.decode(errors="replace").rstrip()
                listening = None if listens else Listening.read(text)
                if listening is not None:
                    listens = True
                    self.first.put(listening)
                elif (record := LogRecord.read(text)) is not None and record.event == LAST_WORDS:
                    self.last_words = record.message
                else:
                    self._log.pass_on(text, "gateway")
        finally:  # whatever ends it, nobody waits for a line that does not come
            self.first.put(None)

    def wait_end(self) -> None:
        """Reads what is left of a child that has ended, for a moment at most."""
        self._thread.join(timeout=_LAST_OUTPUT_S)

    def close(self) -> None:
        """Reads what is left of a child that has ended, and closes the pipe."""
        self.wait_end()
        if not self._thread.is_alive():  # else a child of the gateway's still holds the other end
            assert self.process.stdout is not None
            self.process.stdout.close()
