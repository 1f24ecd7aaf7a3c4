"""deploy/fleet.yaml as a Ray job, on emulated hosts of unequal speed where there can be any, else on this machine."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import yaml

from tests.netlab import system
from tests.netlab.lab import Host, lab
from tests.netlab.ray_nodes import ENV, ray_nodes
from tests.netlab.requirements import missing
from tests.netlab.specs import HostSpec, LinkConditions
from tests.support.deploying.service import REPOSITORY, START_S, STOP_S, Command, free_port

FILE = REPOSITORY / "deploy/fleet.yaml"
ORCHESTRATOR = (sys.executable, "-m", "orchestrator")
SPEEDS = {"workstation": 1.0, "laptop": 0.5, "server": 1.0, "desktop": 0.5, "storage": 0.75, "old-box": 0.5}
"""The part of a core that each host has that the file may name."""
LINKS = LinkConditions(delay_s=0.0002, rate_bits_per_s=1e9)

# While Ray starts, which would take a slow host long, and is not what is shown.
_START_SHARE = 4.0
_RAY = str(Path(sys.executable).parent / "ray")
_JOBS_PORT = 8265
_ASK_S = 120.0
# Six workers start, and measure, on hosts that share two cores.
_SERVE_S = 2 * START_S
_OBJECT_STORE_BYTES = 100_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """A Ray cluster that jobs are submitted to.

    Attributes:
        hosts: the emulated hosts by name, the head first; none where all is on this machine.
        jobs: where Ray takes jobs.
        address: where the service is reached, by commands of :meth:`run`.
    """

    hosts: Mapping[str, Host]
    jobs: str
    address: str

    def command(self, argv: Sequence[str]) -> list[str]:
        """Returns the command line that runs ``argv`` on the head."""
        head = next(iter(self.hosts.values()), None)
        return list(argv) if head is None else head.command(argv)

    def run(self, *argv: str, timeout_s: float = _ASK_S) -> "subprocess.CompletedProcess[str]":
        """Runs a command on the head to its end. Raises RuntimeError, with what it said, and TimeoutExpired."""
        done = subprocess.run(
            self.command(argv),
            cwd=REPOSITORY,
            env=os.environ | ENV,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{argv} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        return done

    def ask(self, command: str, *args: str) -> "subprocess.CompletedProcess[str]":
        """Runs a command of ours that talks to the service."""
        return self.run(*ORCHESTRATOR, command, "--address", self.address, *args)


@contextmanager
def cluster(*, is_emulated: bool) -> Iterator[Cluster]:
    """Ray on emulated hosts, or else on this machine alone; nothing of it is left."""
    with ExitStack() as stack:
        if not is_emulated:
            yield stack.enter_context(_on_this_machine())
            return
        specs = [HostSpec(name=name, cpu_share=_START_SHARE) for name in nodes()]
        net = stack.enter_context(lab(*specs, conditions=LINKS))
        hosts = {name: net[name] for name in nodes()}
        stack.enter_context(ray_nodes(*hosts.values()))
        for name, host in hosts.items():
            assert host.cpu_group is not None, name
            system.set_cpu_share(host.cpu_group, SPEEDS[name])
        yield Cluster(hosts=hosts, jobs=f"http://127.0.0.1:{_JOBS_PORT}", address="127.0.0.1:50051")


def why_not_emulated() -> str | None:
    """Says why there are no emulated hosts here; None where there can be."""
    return missing(cpu_shares=True)


@contextmanager
def _on_this_machine() -> Iterator[Cluster]:
    """One Ray node, which has room for all workers."""
    dashboard = free_port()
    # A short name: Ray's sockets lie there, whose paths may have 107 bytes.
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as directory:
        argv = [
            _RAY, "start", "--head", "--block", "--disable-usage-stats", f"--port={free_port()}",
            "--node-ip-address=127.0.0.1", f"--dashboard-port={dashboard}", f"--num-cpus={len(workers())}",
            f"--temp-dir={directory}", f"--object-store-memory={_OBJECT_STORE_BYTES}",
        ]  # fmt: skip
        with Command(argv, env=ENV) as head:
            head.wait_for("Ray runtime started", START_S)
            yield Cluster(hosts={}, jobs=f"http://127.0.0.1:{dashboard}", address=f"127.0.0.1:{free_port()}")


def workers() -> list[dict[str, object]]:
    """Returns the workers of the file."""
    found: list[dict[str, object]] = yaml.safe_load(FILE.read_text())["cluster"]["workers"]
    return found


def nodes() -> list[str]:
    """Returns the hosts that the file names, the first its head."""
    return list(dict.fromkeys(str(worker["node"]) for worker in workers()))


@contextmanager
def job(there: Cluster, *sets: str) -> Iterator[Command]:
    """The deployment while it serves, as a job whose log the command follows; it is stopped in an orderly way.

    Args:
        sets: values to change of the file.
    """
    changed = [f"gateway.address={there.address}", *sets]
    if not there.hosts:
        changed += [f"cluster.workers.{number}.node=null" for number in range(len(workers()))]
    serve = ["python", "-m", "orchestrator", "serve", str(FILE.relative_to(REPOSITORY))]
    argv = [_RAY, "job", "submit", "--address", there.jobs, "--working-dir", ".", "--", *serve]
    argv += [f"--set={one}" for one in changed]
    with Command(there.command(argv), env=ENV) as command:
        name = command.wait_for(r"Job '(raysubmit_\w+)' submitted", START_S)[1]
        try:
            command.wait_for(r"event=serving ", _SERVE_S)
            yield command
        finally:
            if command.process.poll() is None:  # it ends when the job does, and the job does not when it ends
                there.run(_RAY, "job", "stop", "--address", there.jobs, name)
                command.process.wait(STOP_S)
