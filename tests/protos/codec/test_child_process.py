"""What a parent and the child process that it starts agree on."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from protos.codec.child_process import Listening

ROOT = Path(__file__).resolve().parents[3]
LISTENING = Listening(address="127.0.0.1:7000", ranks_port=7001, pid=12, target="avx2")


def test_what_a_child_says_is_read_back() -> None:
    assert Listening.read(LISTENING.line()) == LISTENING
    gateway = Listening(address="127.0.0.1:7000", pid=12, http_address="127.0.0.1:8000")
    assert Listening.read(gateway.line()) == gateway


@pytest.mark.parametrize(
    "line",
    [
        "", "NCCL INFO cudaDriverVersion 12080", "{", "[]", "3", "null", '"event"', "[" * 100_000,
        '{"event": "loaded"}', '{"event": "listening"}',
        '{"event": "listening", "address": "a:1", "ranks_port": null, "pid": 1}',
    ],
)  # fmt: skip
def test_whatever_else_it_prints_says_nothing(line: str) -> None:
    assert Listening.read(line) is None


def test_a_child_whose_parent_is_gone_already_ends() -> None:
    code = f"from protos.codec.child_process import die_with_parent; die_with_parent({os.getpid()} + 1)"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr.strip()) == (1, "the parent process is gone")
