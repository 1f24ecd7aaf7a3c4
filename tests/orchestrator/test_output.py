"""What a process prints is written in order, and nobody waits for whoever reads it."""

import io
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

import pytest

from orchestrator.output import OutputWriter, queued_output
from tests.support.clocks import PATIENCE_S


@contextmanager
def pipe() -> Iterator[tuple[int, TextIO]]:
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as stream:
        yield reader, stream
    os.close(reader)


def read_all(descriptor: int, until: str) -> str:
    text = ""
    while until not in text:
        text += os.read(descriptor, 1 << 20).decode()
    return text


def test_both_streams_are_written_in_order_and_before_what_comes_next(capsys: pytest.CaptureFixture[str]) -> None:
    both = io.StringIO()
    writer = OutputWriter()
    for number in range(100):
        writer.put(f"{number}\n", both)
    writer.end()
    writer.wait_end()
    assert both.getvalue().split() == [str(number) for number in range(100)]
    with queued_output():
        print("a", "b")
        print("no end", end="")
        print("wrong", file=sys.stderr)
    print("next")
    assert capsys.readouterr() == ("a b\nno endnext\n", "wrong\n")


def test_threads_do_not_mix_their_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with queued_output():
        threads = [
            threading.Thread(target=lambda word=word: [print(word, word, sep="-") for _ in range(200)])
            for word in ("one", "two", "three")
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(set(capsys.readouterr().out.splitlines())) == ["one-one", "three-three", "two-two"]


def test_a_stalled_reader_stops_nobody_and_is_told_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.output.STALLED_S", 0.05)
    page = "x" * (1 << 20) + "\n"  # more than a pipe holds
    with pipe() as (reader, stream):
        writer = OutputWriter(most_texts=2)
        for text in (page, "second\n", "third\n", *["dropped\n"] * 30):
            writer.put(text, stream)
        assert read_all(reader, "third\n").count("dropped") <= 1
        monkeypatch.setattr("orchestrator.output.STALLED_S", PATIENCE_S)
        writer.put("goes on\n", stream)
        said = read_all(reader, "goes on\n")
        assert "lines are missing here, as nothing read this output for a while.\ngoes on\n" in said
        writer.end()
        writer.wait_end()


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_process_whose_output_nobody_reads_goes_on_and_ends_as_it_wants(name: str) -> None:
    code = (
        "import sys\nfrom orchestrator.output import queued_output\n"
        f"with queued_output():\n    for _ in range(20_000):\n        print('x' * 80, file=sys.{name})\n"
        "raise SystemExit(7)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            assert process.wait(PATIENCE_S) == 7
        finally:
            process.kill()


def test_a_service_whose_terminal_is_paused_still_hears_that_it_is_to_stop() -> None:
    code = (
        "import signal\nfrom rich.console import Console\n"
        "from orchestrator.deployment.stop_request import StopRequest\n"
        "from orchestrator.event_log import EventLog\nfrom orchestrator.output import queued_output\n"
        "log = EventLog(Console())\n"
        "with queued_output(log.dropped_line), StopRequest.taken() as stop:\n"
        "    for _ in range(20_000):\n        log.say('load', 'x' * 80, text='x' * 80)\n"
        "        log.pass_on('x' * 80, 'gateway')\n"
        "    signal.raise_signal(signal.SIGINT)\n    assert stop.asked.wait(10)\n"
        "raise SystemExit(7)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            assert process.wait(PATIENCE_S) == 7
        finally:
            process.kill()
