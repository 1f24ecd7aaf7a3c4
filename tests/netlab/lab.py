"""An emulated cluster on one machine: hosts with a network and a share of the CPU each, and links of any quality.

A host is a network namespace with one TUN device. One relay process carries the packets between them, late, slowly or
not at all, as it is told. Files are those of the machine.
"""

import contextlib
import dataclasses
import itertools
import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.netlab import system
from tests.netlab.relay import DEVICE, Change, Setup
from tests.netlab.relay_process import RelayProcess, relay_process
from tests.netlab.specs import HostSpec, LinkConditions

MTU_BYTES = 60_000
RUN_S = 60.0

_MOST_HOSTS = 250
_REAP_S = 10.0
_NUM_SUBNETS = 1 << 14
_numbers = itertools.count()
# The namespace is entered first; the name and the group are the process's own before it becomes what was asked for.
_ENTER = (
    'echo "$1" > /proc/sys/kernel/hostname && { [ -z "$2" ] || echo $$ > "$2"; } && '
    '{ [ -z "$4" ] || { mkdir -p "$3/$4" && mount --bind "/tmp/$4" "$3/$4"; }; } && '
    '{ [ -z "$3" ] || mount --rbind "$3" /tmp; } && shift 4 && exec "$@"'
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """A host while its lab is open.

    Attributes:
        address: where the other hosts reach it.
        namespace: name of its network namespace.
        cpu_group: directory of the cgroup that limits its processes, where it has a share.
    """

    spec: HostSpec
    address: str
    namespace: str
    cpu_group: Path | None
    _children: list["subprocess.Popen[str]"] = field(default_factory=list)

    def command(self, argv: Sequence[str]) -> list[str]:
        """The command line that runs ``argv`` there, in the same process that it is started as."""
        core = [] if self.spec.core is None else ["taskset", "--cpu-list", str(self.spec.core)]
        group = "" if self.cpu_group is None else str(self.cpu_group / "cgroup.procs")
        enter = ["nsenter", f"--net={system.NAMESPACES / self.namespace}", "unshare", "--uts", "--mount"]
        tmp = "" if self.spec.tmp is None else str(self.spec.tmp)
        return [*core, *enter, "sh", "-c", _ENTER, "sh", self.spec.name, group, tmp, self.spec.kept_path, *argv]

    def popen(self, argv: Sequence[str], **options: Any) -> "subprocess.Popen[str]":
        """Starts a process there, in a process group of its own. It is killed with all others when the lab closes.

        Args:
            options: of ``subprocess.Popen``.
        """
        child = subprocess.Popen(self.command(argv), text=True, start_new_session=True, **options)
        self._children.append(child)
        return child

    def run(
        self, argv: Sequence[str], *, timeout_s: float = RUN_S, check: bool = True, **options: Any
    ) -> "subprocess.CompletedProcess[str]":
        """Runs a process there to its end, and returns what it wrote.

        Raises:
            CalledProcessError: it failed, and ``check`` is set.
            TimeoutExpired: it did not end in time, and was killed.
        """
        piped: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
        child = self.popen(argv, **piped)
        try:
            output, errors = child.communicate(timeout=timeout_s)
        finally:
            _kill(child)
            self._children.remove(child)
        if check and child.returncode:
            raise subprocess.CalledProcessError(child.returncode, list(argv), output, errors)
        return subprocess.CompletedProcess(list(argv), child.returncode, output, errors)

    def end(self) -> None:
        """Kills everything that runs there."""
        for child in self._children:
            _kill(child)
        self._children.clear()
        system.end_processes(self.namespace)  # those that left the groups of ours


def _kill(child: "subprocess.Popen[str]") -> None:
    """With its process group."""
    if child.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait(_REAP_S)
    for stream in (child.stdin, child.stdout, child.stderr):
        if stream is not None:
            stream.close()


class Lab:
    """The hosts by name, and the links between them."""

    def __init__(self, hosts: Sequence[Host], relay: RelayProcess) -> None:
        self._hosts = {host.spec.name: host for host in hosts}
        self._places = {name: place for place, name in enumerate(self._hosts)}
        self._relay = relay
        self._conditions = {pair: LinkConditions() for pair in itertools.permutations(self._hosts, 2)}

    def __getitem__(self, name: str) -> Host:
        return self._hosts[name]

    @property
    def relay_pid(self) -> int:
        """The process that carries the packets."""
        return self._relay.pid

    def conditions(self, source: str, target: str) -> LinkConditions:
        """From one host to another, now."""
        return self._conditions[source, target]

    def change(self, conditions: LinkConditions, *, source: str | None = None, target: str | None = None) -> None:
        """New conditions from now on, of one direction, of all from a host, of all to a host, or of everything."""
        self._set(
            {pair: conditions for pair in self._conditions if source in (None, pair[0]) and target in (None, pair[1])}
        )

    def partition(self, one: str, other: str) -> None:
        """Cut the two off from each other. All else about their links stays."""
        self._set_partitioned(one, other, True)

    def heal(self, one: str, other: str) -> None:
        """As they were before :meth:`partition`."""
        self._set_partitioned(one, other, False)

    def _set_partitioned(self, one: str, other: str, is_partitioned: bool) -> None:
        pairs = ((one, other), (other, one))
        self._set({pair: dataclasses.replace(self._conditions[pair], is_partitioned=is_partitioned) for pair in pairs})

    def _set(self, conditions: dict[tuple[str, str], LinkConditions]) -> None:
        self._relay.change(
            [
                Change(source=self._places[source], target=self._places[target], conditions=wanted)
                for (source, target), wanted in conditions.items()
            ]
        )
        self._conditions |= conditions


@contextmanager
def lab(
    *specs: HostSpec,
    conditions: LinkConditions | None = None,
    mtu_bytes: int = MTU_BYTES,
    seed: int = 0,
    subnet: str | None = None,
) -> Iterator[Lab]:
    """A cluster for the length of the block, after which nothing of it is left.

    Args:
        conditions: of all links, at first.
        mtu_bytes: of the largest packet; large ones save the relay's time, small ones let slow links share it evenly.
        seed: of the packets that are lost.
        subnet: the first three bytes of the hosts' addresses, of which the first ends in 1. None: one of many.
    """
    assert 1 <= len(specs) <= _MOST_HOSTS and len({spec.name for spec in specs}) == len(specs), specs
    system.sweep()
    number = next(_numbers)
    with ExitStack() as stack:
        prefix = f"{system.PREFIX}-{os.getpid()}-{number}"
        subnet = subnet or _subnet(number)
        hosts = [_add_host(stack, spec, prefix, f"{subnet}.{at + 1}") for at, spec in enumerate(specs)]
        namespaces = [str(system.NAMESPACES / host.namespace) for host in hosts]
        setup = Setup(namespaces=namespaces, addresses=[host.address for host in hosts], seed=seed)
        relay = stack.enter_context(relay_process(setup))
        for host in hosts:
            stack.callback(host.end)  # before the relay, so that nobody sees the network go
            _bring_up(host, mtu_bytes)
        made = Lab(hosts, relay)
        if conditions is not None:
            made.change(conditions)
        yield made


def _subnet(number: int) -> str:
    """The first three bytes of a private network; those of labs at work differ, as long as they are few."""
    at = (os.getpid() + 4099 * number) % _NUM_SUBNETS
    return f"10.{64 + (at >> 8)}.{at & 255}"


def _add_host(stack: ExitStack, spec: HostSpec, prefix: str, address: str) -> Host:
    """A host without a device; ``stack`` removes it."""
    name = f"{prefix}-{spec.name}"
    group = None
    if spec.cpu_share is not None:
        group = system.add_cpu_group(name, spec.cpu_share)
        stack.callback(system.delete_cpu_group, group)
    system.add_namespace(name)
    stack.callback(system.delete_namespace, name)
    return Host(spec=spec, address=address, namespace=name, cpu_group=group)


def _bring_up(host: Host, mtu_bytes: int) -> None:
    lines = [
        f"link set dev {DEVICE} addrgenmode none mtu {mtu_bytes} up",
        f"address add {host.address}/24 dev {DEVICE}",
    ]
    system.ip("-n", host.namespace, "-batch", "-", lines=lines)
