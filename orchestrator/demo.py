"""``demo``: the whole service once, as a user would run it: serve, ask, look, stop, and see that nothing is left."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
from rich.console import Console

from orchestrator.client import fetch_status, stream_generate, wait_serving
from orchestrator.config import load_config
from orchestrator.errors import ServiceError
from orchestrator.launcher.process import environment
from orchestrator.preflight import preflight
from orchestrator.render import print_status
from placement.errors import HeterodyneError
from protos.heterodyne.v1 import inference_pb2 as pb

PROMPT = "And it came to pass in those days, that"
MAX_TOKENS = 160
_START_S = 120.0
_ANSWER_S = 60.0
_STOP_S = 60.0


class DemoFailed(HeterodyneError):
    """The demo did not run as it should; the text says what was seen."""


def demo(path: Path, *, overrides: Sequence[str], console: Console) -> None:
    """Run the demo.

    Raises:
        HeterodyneError: a mistake in the configuration, a service that did not come up, or a process left over.
    """
    config = load_config(path, overrides=overrides)
    preflight(config)
    address = str(config.gateway.address)
    started_s = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "orchestrator", "serve", str(path), *(f"--set={o}" for o in overrides)],
        env=environment(),
    )
    family = Family(process.pid)
    try:
        _wait(process, address, family)
        console.rule(f"serving after {time.monotonic() - started_s:.1f} s; prompt: {PROMPT!r}")
        _ask(address, console)
        console.rule("what ran where")
        print_status(console, fetch_status(address))
    finally:
        family.look()
        _stop(process)
    left = family.alive()
    if left:
        raise DemoFailed(f"processes were left: {left}")
    console.rule(f"stopped, {len(family.seen)} processes ended, none left")


def _wait(process: "subprocess.Popen[bytes]", address: str, family: "Family") -> None:
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline:
        family.look()
        if process.poll() is not None:
            raise DemoFailed(f"the service ended at its start with exit code {process.returncode}")
        try:
            wait_serving(address, timeout_s=1.0)
        except ServiceError:
            continue
        return
    raise DemoFailed(f"the service was not ready after {_START_S:g} s")


def _ask(address: str, console: Console) -> None:
    request = pb.GenerateRequest(
        prompt=PROMPT, max_tokens=MAX_TOKENS, sampling=pb.SamplingParams(temperature=0.7, top_p=0.9, seed=7)
    )
    console.print(PROMPT, end="", style="dim", markup=False, highlight=False)
    result = stream_generate(
        address,
        request,
        timeout_s=_ANSWER_S,
        on_text=lambda text: console.print(text, end="", markup=False, highlight=False, soft_wrap=True),
    )
    console.print()
    usage, timings = result.finished.usage, result.finished.timings
    console.rule("measured")
    console.print(f"time to first token    {timings.time_to_first_token_s * 1e3:8.1f} ms")
    console.print(f"time per output token  {timings.time_per_output_token_s * 1e3:8.2f} ms")
    console.print(f"tokens/s               {1 / timings.time_per_output_token_s:8.1f}")
    console.print(f"tokens                 {usage.prompt_tokens} prompt, {usage.completion_tokens} generated")


def _stop(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(timeout=_STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        raise DemoFailed(f"the service did not stop within {_STOP_S:g} s") from None


class Family:
    """Every process that descended from one, also those whose parent has gone since."""

    def __init__(self, pid: int) -> None:
        self._root = psutil.Process(pid)
        self.seen: set[psutil.Process] = {self._root}

    def look(self) -> None:
        """Note who is there now."""
        try:
            self.seen.update(self._root.children(recursive=True))
        except psutil.NoSuchProcess:
            return

    def alive(self) -> list[str]:
        """Those that still run, given a moment to end."""
        _, alive = psutil.wait_procs(self.seen - {psutil.Process(os.getpid())}, timeout=5.0)
        return [f"{process.pid} {process.name()}" for process in alive if process.status() != psutil.STATUS_ZOMBIE]
