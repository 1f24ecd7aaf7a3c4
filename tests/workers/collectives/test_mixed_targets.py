"""Ranks on CPUs of different kinds, each a process: all get the same bits from a sum, those of torch."""

import os
import subprocess
import sys

import torch
from torch import Tensor

from kernels.cpu.machine.target import VARIABLE, runnable_targets
from tests.workers.collectives.target_rank import digest, parts, tiled
from workers.collectives.algorithms import add_in_order
from workers.transport.mesh import listen

_ENDED_S = 120.0


def summed(parts: list[Tensor]) -> Tensor:
    total = torch.empty_like(parts[0])
    add_in_order(parts, total)
    return total


def test_sums_have_the_same_bits_on_the_best_and_the_least_kind() -> None:
    """The one computes the checksums of frames by an instruction, the other by tables."""
    names = [runnable_targets()[0].name, runnable_targets()[-1].name]
    listeners = [listen("127.0.0.1") for _ in names]
    ports = [str(listener.getsockname()[1]) for listener in listeners]
    command = [sys.executable, "-m", "tests.workers.collectives.target_rank"]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(listener.fileno()), *ports],
            pass_fds=[listener.fileno()],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, VARIABLE: name, "OMP_NUM_THREADS": "1"},
        )
        for rank, (name, listener) in enumerate(zip(names, listeners, strict=True))
    ]
    for listener in listeners:
        listener.close()
    try:
        said = [process.communicate(timeout=_ENDED_S)[0].split() for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait(_ENDED_S)
    expected = digest([summed(each) for each in (*parts(len(names)), tiled(len(names)))])
    assert said == [[name, expected] for name in names]
