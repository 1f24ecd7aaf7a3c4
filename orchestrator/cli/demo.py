"""Runs the whole service once for ``demo``, as a user would: serve, ask, look, stop, and see that nothing is left."""

import os
import re
import select
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

from orchestrator.cli.client import fetch_status, stream_generate
from orchestrator.cli.render import ending, print_status
from orchestrator.config.document import load_config
from orchestrator.config.environment import variable_of
from orchestrator.config.types import parse_address
from orchestrator.deployment.preflight import IN_USE, free_address, preflight
from orchestrator.errors import InvalidConfigs
from orchestrator.event_log import LogFormat
from orchestrator.launcher.process import environment
from placement.errors import HeterodyneError, InvalidConfig
from protos.heterodyne.v1 import admin_pb2
from protos.heterodyne.v1 import inference_pb2 as pb

PROMPT = (
    "And it came to pass in those days, that there went out a decree from Caesar Augustus, that all the world should "
    "be taxed. (And this taxing was first made when Cyrenius was governor of Syria.) And all went to be taxed, every "
    "one into his own city."
)
MAX_TOKENS = 160
_FILE = Path("deploy/disaggregated.yaml")
_SHOWN_CHARACTERS = 40
_TREE = Path(__file__).resolve().parents[2]
_START_S = 120.0
_LOOK_S = 0.5
_ANSWER_S = 60.0
_STOP_S = 60.0
_SETTLE_S = 2.0
_TEXT_WIDTH = 100


class DemoFailed(HeterodyneError):
    """The demo did not run as it should; the text says what was seen."""


def demo_file(root: Path = _TREE) -> Path:
    """Returns the cluster file of the demo model: the one in the working directory, or else that beside the packages.

    Args:
        root: the directory that holds the packages.

    Raises:
        DemoFailed: there is none, as where the packages alone were installed.
    """
    for file in (_FILE, root / _FILE):
        if file.is_file():
            return file
    raise DemoFailed(
        f"no {_FILE} is here or in {root}: the demo model is part of the source tree and was not installed. "
        "Run it there, or pass a cluster file of your own: heterodyne demo CLUSTER.YAML"
    )


def demo(path: Path, *, overrides: Sequence[str], console: Console, log_format: LogFormat = LogFormat.AUTO) -> None:
    """Runs the demo.

    Raises:
        HeterodyneError: a mistake in the configuration, a service that did not come up, or a process left over.
    """
    address = _checked_address(path, overrides)
    started_s = time.monotonic()
    ready, tells = os.pipe()
    process = subprocess.Popen(
        [
            sys.executable, "-m", "orchestrator", "serve", str(path), *(f"--set={o}" for o in overrides),
            f"--log-format={log_format.value}", f"--ready-fd={tells}",
        ],
        env=environment(ray_token=True),
        pass_fds=(tells,),
    )  # fmt: skip
    os.close(tells)
    family = Family(process.pid)
    try:
        _wait(process, ready, family)
        shown = textwrap.shorten(PROMPT, _SHOWN_CHARACTERS, placeholder="...")
        console.rule(f"serving after {time.monotonic() - started_s:.1f} s; prompt: {shown!r}")
        _ask(address, console)
        console.rule("what ran where")
        print_status(console, _settled_status(address))
    finally:
        os.close(ready)
        family.look()
        _stop(process)
    left = family.alive()
    if left:
        raise DemoFailed(f"processes were left: {left}")
    console.rule(f"stopped, {len(family.seen)} processes ended, none left")


def _checked_address(path: Path, overrides: Sequence[str]) -> str:
    """Returns where the service will be reached, once nothing speaks against its start. Raises HeterodyneError."""
    config = load_config(path, overrides=overrides)
    address = str(config.gateway.address)
    if config.gateway.address.port == 0:
        problem = "leaves the port open, and the demo has to know where to connect"
        fix = "Give a port, for instance 127.0.0.1:50051."
        raise InvalidConfig(field="gateway.address", value=address, problem=problem, fix=fix)
    try:
        preflight(config)
    except InvalidConfig as error:
        raise on_other_ports(error) from None
    return address


def on_other_ports(error: InvalidConfig) -> HeterodyneError:
    """Adds the command that runs the demo on free ports where those of the file are taken: make takes no ``--set``."""
    errors = error.errors if isinstance(error, InvalidConfigs) else (error,)
    free = {each.field: free_address(parse_address(str(each.value))) for each in errors if each.problem == IN_USE}
    if not free or None in free.values():
        return error
    settings = " ".join(f"{variable_of(*field.split('.'))}={address}" for field, address in free.items())
    return DemoFailed(f"{error}\nRun it on free ports: {settings} make demo")


def _wait(process: "subprocess.Popen[bytes]", ready: int, family: "Family") -> None:
    """Waits until the service says that it serves, by a byte at ``ready``."""
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline:
        family.look()
        if select.select([ready], (), (), _LOOK_S)[0]:
            if os.read(ready, 1):
                return
            raise DemoFailed(f"the service ended at its start with exit code {process.wait(_STOP_S)}")
    raise DemoFailed(f"the service was not ready after {_START_S:g} s")


def _ask(address: str, console: Console) -> None:
    request = pb.GenerateRequest(
        prompt=PROMPT, max_tokens=MAX_TOKENS, sampling=pb.SamplingParams(temperature=0.7, top_p=0.9, seed=7)
    )
    text = WrappedText(console)
    text.write(PROMPT)
    result = stream_generate(address, request, timeout_s=_ANSWER_S, on_text=text.write)
    text.end()
    console.rule("measured")
    console.print(measurements(result.finished))


def measurements(finished: pb.Finished) -> Table:
    """Yields what the answer took, in lines; an answer of one token has no time between tokens."""
    usage, timings = finished.usage, finished.timings
    table = Table.grid(padding=(0, 1))
    table.add_column()
    table.add_column(justify="right", style="bold")
    table.add_column()
    table.add_row("prompt", str(usage.prompt_tokens), "tokens")
    ended = f"tokens, ended by {ending(finished)}"
    table.add_row("generated", str(usage.completion_tokens), ended)
    if finished.HasField("transfer"):
        _add_transfer(table, finished)
    table.add_row("time to first token", f"{timings.time_to_first_token_s * 1e3:.1f}", "ms")
    per_token_s = timings.time_per_output_token_s
    if per_token_s > 0:
        table.add_row("time per output token", f"{per_token_s * 1e3:.2f}", "ms")
        table.add_row("throughput", f"{1 / per_token_s:.1f}", "tokens/s")
    return table


def _add_transfer(table: Table, finished: pb.Finished) -> None:
    """Adds where the prompt was computed, and what it took to send its keys and values to where the answer was."""
    transfer = finished.transfer
    if not finished.HasField("prefill_replica"):
        table.add_row("keys and values sent", "0", f"tokens: {finished.replica} computed the prompt itself after all")
        return
    where = f"ms, on {finished.prefill_replica}; the answer on {finished.replica}"
    table.add_row("prompt computed", f"{transfer.prefill_s * 1e3:.1f}", where)
    size = f"MB, of {transfer.num_tokens} tokens"
    table.add_row("keys and values sent", f"{transfer.num_bytes / 1e6:.3g}", size)
    table.add_row("waited for them", f"{transfer.exposed_s * 1e3:.1f}", "ms")


class WrappedText:
    """Shows text that comes in pieces, broken between words at the width of the console."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._width = min(console.width, _TEXT_WIDTH)
        self._column = 0
        # The last word may go on in the next piece.
        self._word = ""

    def write(self, text: str) -> None:
        """Shows every word that is known to be whole."""
        *whole, self._word = re.split(r"(\s)", self._word + text)
        for piece in whole:
            self._put(piece)

    def end(self) -> None:
        """Shows the last word and ends the line."""
        self._put(self._word)
        self._console.print()

    def _put(self, piece: str) -> None:
        width = cell_len(piece)
        if piece == "\n" or (self._column and self._column + width > self._width):
            self._console.print()
            self._column = 0
        if piece.strip() or (piece == " " and self._column):
            self._console.print(piece, end="", markup=False, highlight=False, soft_wrap=True)
            self._column += width


def _settled_status(address: str) -> admin_pb2.GetStatusResponse:
    """Returns the status once the replicas have reported that the answer is done, or after a moment."""
    deadline = time.monotonic() + _SETTLE_S
    while True:
        status = fetch_status(address)
        if time.monotonic() > deadline or not any(replica.load.num_running for replica in status.replicas):
            return status
        time.sleep(0.1)


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
    """Knows every process that descended from one, also those whose parent has gone since."""

    def __init__(self, pid: int) -> None:
        self._root = psutil.Process(pid)
        self.seen: set[psutil.Process] = {self._root}

    def look(self) -> None:
        """Notes which processes there are now."""
        try:
            self.seen.update(self._root.children(recursive=True))
        except psutil.NoSuchProcess:
            return

    def alive(self) -> list[str]:
        """Returns the processes that still run after a moment to end."""
        _, alive = psutil.wait_procs(self.seen - {psutil.Process(os.getpid())}, timeout=5.0)
        return [f"{process.pid} {process.name()}" for process in alive if process.status() != psutil.STATUS_ZOMBIE]
