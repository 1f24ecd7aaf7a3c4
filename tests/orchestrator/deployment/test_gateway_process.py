"""The gateway as a child process: whatever it prints, it is read."""

import subprocess
import sys
from unittest import mock

import pytest

from orchestrator.deployment.gateway_process import _listening, _Output
from orchestrator.deployment.stop_request import StopRequest
from orchestrator.errors import LaunchFailed
from protos.codec.child_process import Listening
from tests.support.clocks import PATIENCE_S
from tests.support.deploying.lost_stderr import Loss, lost_stderr

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


@pytest.mark.parametrize("loss", [Loss.CLOSED, Loss.BROKEN])
def test_a_standard_error_that_is_lost_stops_no_gateway(loss: Loss) -> None:
    with lost_stderr(loss):
        output = _Output(child(f"{CHATTER} {SAYS} {CHATTER}"))
        assert _listening(output, StopRequest()) == "127.0.0.1:7000"
        assert output.process.wait(PATIENCE_S) == 0
        output._thread.join(PATIENCE_S)
    output.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_reader_that_fails_says_that_there_is_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.deployment.gateway_process.print_line", mock.Mock(side_effect=KeyError))
    output = _Output(child("print('hello')"))
    with pytest.raises(LaunchFailed, match="ended at its start with exit code 0"):
        _listening(output, StopRequest())
    output.close()


def test_a_gateway_that_closes_its_output_and_lives_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.deployment.gateway_process._GATEWAY_START_S", 2.0)
    output = _Output(child("import os, time; os.close(1); time.sleep(600)"))
    with pytest.raises(LaunchFailed, match="before it said where it listens"):
        _listening(output, StopRequest())
    output.process.kill()
    output.process.wait()
    output.close()


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
