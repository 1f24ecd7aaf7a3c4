"""The gateway as a child process: whatever it prints, it is read."""

import subprocess
import sys

import pytest

from orchestrator.deployment.gateway_process import _listening, _Output
from orchestrator.deployment.stop_request import StopRequest
from orchestrator.errors import LaunchFailed
from protos.codec.child_process import Listening
from tests.support.clocks import PATIENCE_S

CHATTER = "print(*['x' * 80] * 50_000, sep=chr(10)); print('y' * 1_000_000);"
SAYS = f"print({Listening(address='127.0.0.1:7000', pid=1).line()!r}, flush=True);"


def child(code: str) -> "subprocess.Popen[bytes]":
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)


def test_what_the_gateway_prints_never_stops_it(capfd: pytest.CaptureFixture[str]) -> None:
    output = _Output(child(f"{CHATTER} {SAYS} {CHATTER} print('the last')"))
    assert _listening(output, StopRequest()) == "127.0.0.1:7000"
    assert output.process.wait(PATIENCE_S) == 0
    output._thread.join(PATIENCE_S)
    output.close()
    logged = capfd.readouterr().err
    assert logged.count("x" * 80) == 100_000 and logged.endswith("the last\n") and "listening" not in logged


def test_a_gateway_that_ends_at_its_start_says_its_exit_code() -> None:
    output = _Output(child("print('hello'); raise SystemExit(7)"))
    with pytest.raises(LaunchFailed, match="ended at its start with exit code 7"):
        _listening(output, StopRequest())
    output.close()


def test_who_is_asked_to_stop_does_not_wait_for_the_gateway() -> None:
    stop = StopRequest()
    stop.asked.set()
    output = _Output(child("import time; time.sleep(600)"))
    with pytest.raises(LaunchFailed, match="stopped while starting"):
        _listening(output, stop)
    output.process.kill()
    output.process.wait()
    output.close()
