"""Ranks that sum by gloo, each a process: one that dies or freezes is named soon, and nobody hangs."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from workers.transport.mesh import listen

_READY_S = 60.0
_NOTICED_S = 3.0
_ENDED_S = 12.0  # not COLLECTIVE_S, which a sum that hangs has


@contextmanager
def ranks(count: int) -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that sum; whatever is left of them ends with the block."""
    listeners = [listen("127.0.0.1") for _ in range(count)]
    ports = [str(listener.getsockname()[1]) for listener in listeners]
    command = [sys.executable, "-m", "tests.workers.collectives.torch_rank"]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(listener.fileno()), *ports],
            pass_fds=[listener.fileno()],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for rank, listener in enumerate(listeners)
    ]
    for listener in listeners:
        listener.close()
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate(timeout=_READY_S)


def wait_until_ready(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"


@pytest.mark.integration  # on a busy machine a survivor may end before another has noticed, and be named in its place
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize(("number", "word"), [(signal.SIGKILL, "connection"), (signal.SIGSTOP, "no pulse")])
def test_a_rank_that_dies_or_freezes_in_a_sum_is_named_within_seconds_and_the_others_end(
    number: int, word: str, count: int
) -> None:
    with ranks(count) as processes:
        for process in processes:
            wait_until_ready(process)
        processes[-1].send_signal(number)
        began_s = time.monotonic()
        for process in processes[:-1]:
            said, _ = process.communicate(timeout=_ENDED_S)
            _, when_s, rank, cause = said.split(" ", 3)
            assert float(when_s) - began_s < _NOTICED_S and int(rank) == count - 1 and word in cause
            assert process.returncode == 0
