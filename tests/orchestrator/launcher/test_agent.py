"""The agent without Ray: where a worker is reached that it started."""

import ast
import dataclasses
import inspect
import os
import sys

import pytest

from orchestrator.launcher import agent
from orchestrator.launcher.agent import NodeAgent, NotStarted, Started
from orchestrator.launcher.process import HowEnded, WorkerArgs
from protos.codec.child_process import Listening
from tests.support.clocks import PATIENCE_S


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Child(WorkerArgs):
    """A process that is no worker."""

    code: str

    def argv(self) -> list[str]:
        return [sys.executable, "-c", self.code]


@pytest.mark.parametrize(("bind_host", "advertised"), [("0.0.0.0", "10.1.2.3"), ("127.0.0.1", "127.0.0.1")])
async def test_a_worker_on_every_interface_is_reached_at_the_nodes_own_address(bind_host: str, advertised: str) -> None:
    line = Listening(address=f"{bind_host}:7000", ranks_port=7001, pid=os.getpid()).line()
    code = f"print({line!r}, flush=True); import time; time.sleep(600)"
    under_test = NodeAgent(lambda: "10.1.2.3")
    args = Child(bind_host=bind_host, device="cpu", num_threads=1, epoch=1, code=code)
    started = await under_test.start(args, PATIENCE_S)
    assert isinstance(started, Started) and started.address == f"{advertised}:7000"
    await under_test.stop(0.0)
    assert (await under_test.wait()).how is HowEnded.STOPPED


async def test_why_a_worker_did_not_start_is_an_answer_and_no_exception() -> None:
    code = "raise SystemExit('no such device')"
    args = Child(bind_host="127.0.0.1", device="cpu", num_threads=1, epoch=1, code=code)
    answer = await NodeAgent(lambda: "").start(args, PATIENCE_S)
    assert isinstance(answer, NotStarted) and answer.cause.endswith("no such device")


def test_the_agent_imports_nothing_later_than_at_its_top() -> None:
    tree = ast.parse(inspect.getsource(agent))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert imports and all(node in tree.body for node in imports)
