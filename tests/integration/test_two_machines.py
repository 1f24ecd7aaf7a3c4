"""The README's section on two machines, word for word, on emulated ones; and what users are told when it goes wrong."""

import asyncio
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tests.netlab import system
from tests.netlab.lab import Host, Lab, lab
from tests.netlab.requirements import missing
from tests.netlab.specs import HostSpec, LinkConditions
from tests.support.clocks import PATIENCE_S, own_time
from tests.support.deploying.service import REPOSITORY, START_S, Command

pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(600),
    pytest.mark.skipif((reason := missing()) is not None, reason=reason or ""),
]

README = (REPOSITORY / "README.md").read_text()
(SECTION,) = re.findall(r"^## Two machines\n(.*?)^## ", README, re.MULTILINE | re.DOTALL)
STEPS = re.findall(r"on `(big|small)`[^\n]*:\n\n +```sh\n(.*?)```", SECTION, re.IGNORECASE | re.DOTALL)
FIRST_EPHEMERAL_PORT, LAST_PORT = 32768, 65535
LISTEN = "0A"  # in /proc/net/tcp
TOLD_S = 30.0
BIN = Path(sys.executable).parent
# As after `source .venv/bin/activate`; the home directory is each host's own.
ENV = {
    "PATH": f"{BIN}:{os.environ['PATH']}",
    "HOME": "/tmp/home",
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DISABLE_IMPORT_WARNING": "1",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Machines:
    """Two emulated machines with a directory ``/tmp`` of their own each, and the steps of the README."""

    net: Lab
    tmp: Path
    exports: dict[str, str]

    def script(self, host: str, commands: str) -> list[str]:
        """Returns the command line of ``commands`` on a host, after what earlier steps of the README exported there."""
        return self.net[host].command(["bash", "-ec", f"{self.exports[host]}{commands}"])

    def run(self, host: str, commands: str, *, timeout_s: float = 2 * PATIENCE_S, code: int = 0) -> str:
        """Runs commands to their end; returns what they said."""
        with Command(self.script(host, commands), env=ENV) as command:
            assert command.process.wait(timeout_s) == code, command.output()
            return command.output()

    def export(self, host: str, commands: str) -> None:
        self.exports[host] += "".join(f"{line}\n" for line in commands.splitlines() if line.startswith("export "))


def step(number: int) -> tuple[str, str]:
    """The host and the commands of one of the README's steps."""
    host, block = STEPS[number]
    return host, "".join(f"{line.strip()}\n" for line in block.splitlines())


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    """The machines, with Ray as the README starts it."""
    tmp = tmp_path_factory.mktemp("machines")
    specs = [HostSpec(name=name, tmp=tmp / name, kept=REPOSITORY) for name in ("big", "small")]
    for spec in specs:
        assert spec.tmp is not None
        (spec.tmp / "home" / ".ray").mkdir(parents=True)
    with lab(*specs, subnet="192.168.7", conditions=LinkConditions(delay_s=0.0005)) as net:
        made = Machines(net=net, tmp=tmp, exports={"big": "", "small": ""})
        assert [step(at)[0] for at in range(len(STEPS))] == ["big", "small", "big", "big"]
        made.run(*step(0))
        made.export(*step(0))
        token = Path("home/.ray/auth_token")
        shutil.copy(tmp / "big" / token, tmp / "small" / token)  # as the README says between the steps
        made.run(*step(1))
        made.export(*step(1))
        yield made


def places(status: str) -> list[tuple[str, str]]:
    """Which worker is on which node, by rank."""
    return re.findall(r"rank=\d node=(\S+) worker=\S+ .*?address=(\S+):\d+ ", status)


def test_the_file_that_the_readme_shows_is_the_one_that_it_submits() -> None:
    (shown,) = re.findall(r"```yaml\n(.*?)```", SECTION, re.DOTALL)
    assert yaml.safe_load(shown) == yaml.safe_load((REPOSITORY / "deploy/two-machines.yaml").read_text())


def test_the_readme_word_for_word(machines: Machines) -> None:
    host, submit = step(2)
    with Command(machines.script(host, submit), env=ENV) as job:
        name = job.wait_for(r"Job '(raysubmit_\w+)' submitted", START_S)[1]
        try:
            job.wait_for("event=serving .*address=127.0.0.1:50051", START_S)
            assert "event=ray_without_authentication" not in job.output()
            host, look = step(3)
            said = machines.run(host, look)
            assert places(said) == [("big", "192.168.7.1"), ("small", "192.168.7.2")]
            assert "node=big worker=most " in said and "node=small worker=rest " in said, said
            assert "16 generated" in said
        finally:  # the job outlives the command that follows its log
            machines.run("big", f"ray job stop --address http://127.0.0.1:8265 {name}\n")
        job.wait_for("event=drained", PATIENCE_S)


def serve(*sets: str) -> str:
    """The README's deployment, on the terminal of the head, with other values."""
    return f"heterodyne serve deploy/two-machines.yaml {' '.join(f'--set={one}' for one in sets)}\n"


def test_workers_go_where_they_say_whichever_machine_that_is(machines: Machines) -> None:
    swapped = serve("cluster.workers.0.node=192.168.7.2", "cluster.workers.1.node=192.168.7.1")
    with Command(machines.script("big", swapped), env=ENV) as command:
        command.wait_for("event=plan .*worker=most node=small ", START_S)
        command.wait_for("event=serving ", START_S)
        status = machines.run("big", "heterodyne status\n")
        assert places(status) == [("small", "192.168.7.2"), ("big", "192.168.7.1")]
        command.process.terminate()
        assert command.process.wait(PATIENCE_S) == 0, command.output()


async def told(machines: Machines, host: str, commands: str) -> str:
    """The one line in which a launch says why it failed, in time."""
    async with own_time() as clock:
        with Command(machines.script(host, commands), env=ENV) as command:
            code = await asyncio.to_thread(command.process.wait, 3 * PATIENCE_S)
            took_s, output = clock.now_s, command.output()
    lines = [line for line in output.splitlines() if line.startswith("error: ")]
    assert code == 1 and len(lines) == 1 and output.rstrip().endswith(lines[0]) and "Traceback" not in output, output
    assert took_s < TOLD_S, output
    return lines[0]


def ports_of(host: Host) -> set[int]:
    """The TCP ports that something listens on there now."""
    pid = system.ip("netns", "pids", host.namespace).split()[0]
    rows = [
        line.split() for table in ("tcp", "tcp6") for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()
    ]
    return {int(row[1].rpartition(":")[2], 16) for row in rows if row[3] == LISTEN}


@pytest.mark.parametrize("walled", ["big", "small"])
async def test_a_firewall_before_the_workers_ports_is_told_with_the_fix(machines: Machines, walled: str) -> None:
    open_ports = ports_of(machines.net[walled])  # Ray's
    assert open_ports
    blocked = [port for port in range(FIRST_EPHEMERAL_PORT, LAST_PORT + 1) if port not in open_ports]
    before = machines.net.conditions("big", "small")
    machines.net.change(LinkConditions(delay_s=before.delay_s, blocked_ports=blocked), target=walled)
    try:
        error = await told(machines, "big", serve())
    finally:
        machines.net.change(before)
    assert re.search(r"worker (most|rest) on (big|small)\).*(cannot connect|could not be reached)", error), error
    assert re.search(r"192\.168\.7\.[12]:\d+.* all TCP ports .*between the machines.*cluster.bind_host", error), error


async def test_a_node_that_has_no_model_directory_is_named_with_the_fix(machines: Machines) -> None:
    shutil.copytree(REPOSITORY / "deploy/demo", machines.tmp / "big" / "model")
    error = await told(machines, "big", serve("model.path=/tmp/model"))
    assert "rank 1 of replica-0 (worker rest on small): model.path: /tmp/model is no directory of this machine" in error
    assert "Put the model there" in error


async def test_another_model_of_the_same_shapes_on_one_machine_is_refused(machines: Machines) -> None:
    for host in ("big", "small"):
        shutil.copytree(REPOSITORY / "deploy/demo", machines.tmp / host / "tuned")
    weights = machines.tmp / "small" / "tuned" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    half = len(content) // 2
    content[half:] = bytes(len(content) - half)
    weights.write_bytes(content)
    error = await told(machines, "big", serve("model.path=/tmp/tuned"))
    assert (
        "worker rest on small" in error and "/tmp/tuned is not the same as on the machine that serve runs on" in error
    )
    assert "model.safetensors differs. Copy the model there again" in error, error


async def test_unequal_shares_of_workers_that_name_no_machine_are_refused_with_the_fix(machines: Machines) -> None:
    all_cores = f"threads: {os.cpu_count()}"  # so that a machine has room for one of them
    unnamed = f"cluster.workers=[{{name: most, {all_cores}}}, {{name: rest, {all_cores}}}]"
    error = await told(machines, "big", serve(f"'{unnamed}'"))
    assert "most, rest" in error and "node: big (192.168.7.1) or small (192.168.7.2)" in error, error


async def test_a_machine_that_there_is_not_is_refused_with_those_there_are(machines: Machines) -> None:
    error = await told(machines, "big", serve("cluster.workers.1.node=tiny"))
    assert "'tiny'" in error and "big (192.168.7.1), small (192.168.7.2)" in error, error


async def test_an_address_where_no_ray_is_ends_in_time_and_at_ctrl_c(machines: Machines) -> None:
    error = await told(machines, "big", serve("cluster.ray_address=192.168.7.9:6379"))
    assert "cluster.ray_address: no Ray cluster could be joined" in error and "ray start --head" in error
    with Command(machines.script("big", "exec " + serve("cluster.ray_address=192.168.7.9:6379")), env=ENV) as command:
        command.wait_for("event=connect", START_S)
        time.sleep(0.5)
        command.process.send_signal(2)
        assert command.process.wait(PATIENCE_S) == 1
        assert "stopped while the Ray cluster was joined" in command.output()
