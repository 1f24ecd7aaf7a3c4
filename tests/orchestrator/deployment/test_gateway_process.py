"""The gateway as a child process: whatever it prints, it is read."""

import subprocess
import sys
from unittest import mock

import pytest
from rich.console import Console

from orchestrator.deployment.gateway_process import GatewayProcess, _listening, _Output
from orchestrator.deployment.stop_request import StopRequest
from orchestrator.errors import LaunchFailed
from orchestrator.event_log import EventLog
from protos.codec.child_process import Listening
from protos.codec.log_record import LAST_WORDS, LogRecord
from tests.support.clocks import PATIENCE_S
from tests.support.deploying.lost_stderr import Loss, lost_stderr

CHATTER = "print(*['x' * 80] * 50_000, sep=chr(10)); print('y' * 1_000_000);"
SAYS = f"print({Listening(address='127.0.0.1:7000', pid=1).line()!r}, flush=True);"


def child(code: str) -> "subprocess.Popen[bytes]":
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def output_of(code: str) -> _Output:
    return _Output(child(code), EventLog(Console()))


def test_what_the_gateway_prints_never_stops_it(capfd: pytest.CaptureFixture[str]) -> None:
    output = output_of(f"{CHATTER} {SAYS} {CHATTER} print('the last')")
    assert _listening(output, StopRequest()).address == "127.0.0.1:7000"
    assert output.process.wait(PATIENCE_S) == 0
    output._thread.join(PATIENCE_S)
    output.close()
    logged = capfd.readouterr().out
    assert (
        logged.count("x" * 80) == 100_000
        and logged.endswith('message="the last" source=gateway\n')
        and "listening" not in logged
    )


@pytest.mark.parametrize("loss", [Loss.CLOSED, Loss.BROKEN])
def test_an_output_that_is_lost_stops_no_gateway(loss: Loss) -> None:
    with lost_stderr(loss):
        output = _Output(child(f"{CHATTER} {SAYS} {CHATTER}"), EventLog(Console(file=sys.stderr)))
        assert _listening(output, StopRequest()).address == "127.0.0.1:7000"
        assert output.process.wait(PATIENCE_S) == 0
        output._thread.join(PATIENCE_S)
    output.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_reader_that_fails_says_that_there_is_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EventLog, "pass_on", mock.Mock(side_effect=KeyError))
    output = output_of("print('hello')")
    with pytest.raises(LaunchFailed, match="exited with code 0 at its start"):
        _listening(output, StopRequest())
    output.close()


def test_a_gateway_that_closes_its_output_and_lives_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.deployment.gateway_process._GATEWAY_START_S", 2.0)
    output = output_of("import os, time; os.close(1); os.close(2); time.sleep(600)")
    with pytest.raises(LaunchFailed, match="before it said where it listens"):
        _listening(output, StopRequest())
    output.process.kill()
    output.process.wait()
    output.close()


def test_a_gateway_that_ends_at_its_start_says_its_exit_code() -> None:
    output = output_of("print('hello'); raise SystemExit(7)")
    with pytest.raises(LaunchFailed, match="exited with code 7 at its start; its words are above"):
        _listening(output, StopRequest())
    output.close()


def test_a_gateway_that_says_why_it_ends_is_quoted_once(capfd: pytest.CaptureFixture[str]) -> None:
    line = LogRecord(time_s=0.0, source="gateway", message="x: is taken", event=LAST_WORDS, level="error").line()
    output = output_of(f"import sys; print({line!r}, file=sys.stderr); raise SystemExit(2)")
    with pytest.raises(LaunchFailed, match=r"^the gateway did not start: x: is taken$"):
        _listening(output, StopRequest())
    output.close()
    assert "is taken" not in capfd.readouterr().out


def test_a_gateway_that_ends_later_is_quoted_too() -> None:
    line = LogRecord(time_s=0.0, source="gateway", message="no file is left", event=LAST_WORDS, level="error").line()
    for code, why in (
        (f"print({line!r}); raise SystemExit(2)", "the gateway exited with code 2: no file is left"),
        ("raise SystemExit(3)", "the gateway exited with code 3"),
        (
            "import os; os.kill(os.getpid(), 9)",
            "the gateway was killed by SIGKILL (often the out-of-memory killer: see dmesg)",
        ),
    ):
        output = output_of(f"{SAYS} {code}")
        gateway = GatewayProcess(output, _listening(output, StopRequest()))
        output.process.wait(PATIENCE_S)
        assert gateway.ended() and gateway.why_ended() == why
        output.close()


def test_who_is_asked_to_stop_does_not_wait_for_the_gateway() -> None:
    stop = StopRequest()
    stop.asked.set()
    output = output_of("import time; time.sleep(600)")
    with pytest.raises(LaunchFailed, match="stopped while starting"):
        _listening(output, stop)
    output.process.kill()
    output.process.wait()
    output.close()
