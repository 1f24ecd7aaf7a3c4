"""``python -m tests.netlab.relay``: the process that carries packets between the hosts of an emulated cluster.

It holds a TUN device in the network namespace of each host. Its first line of standard input is a :class:`Setup`, each
further one a list of :class:`Change`, all as JSON; it answers each with a line. It ends when its input does.
"""

import ctypes
import fcntl
import ipaddress
import json
import os
import select
import struct
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tests.netlab.specs import LinkConditions
from tests.netlab.wire import Wire

DEVICE = "net0"

_TUNSETIFF = 0x400454CA
_IFF_TUN = 0x0001
_IFF_NO_PI = 0x1000
_CLONE_NEWNET = 0x40000000
_MOST_PACKET_BYTES = 65_535
_TARGET = slice(16, 20)  # of an IPv4 header
# How many packets are taken from one device before the others, and those that are due, have their turn.
_BURST = 32
_LOOK_FOR_PARENT_S = 1.0
_PR_SET_TIMERSLACK = 29


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What the relay is told at its start: by host, in one order, the namespaces' files and the addresses."""

    namespaces: Sequence[str]
    addresses: Sequence[str]
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """New conditions from one host to another, by their place in :class:`Setup`."""

    source: int
    target: int
    conditions: LinkConditions


def open_tun(namespace: str) -> int:
    """The descriptor of a new TUN device in a namespace. Raises OSError."""
    home = os.open("/proc/self/ns/net", os.O_RDONLY)
    there = os.open(namespace, os.O_RDONLY)
    try:
        _enter(there)
        device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH22x", DEVICE.encode(), _IFF_TUN | _IFF_NO_PI))
        _enter(home)  # whoever lives in a namespace is ended with its host
    finally:
        os.close(there)
        os.close(home)
    return device


def _enter(namespace: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(namespace, _CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "setns: no right to enter a network namespace")


class Relay:
    """The devices, and a wire for every ordered pair of them."""

    def __init__(self, setup: Setup) -> None:
        self._devices = [open_tun(namespace) for namespace in setup.namespaces]
        self._hosts = {ipaddress.IPv4Address(text).packed: at for at, text in enumerate(setup.addresses)}
        hosts = range(len(self._devices))
        self._wires = {
            (source, target): Wire(LinkConditions(), seed=setup.seed * 65_537 + source * 257 + target)
            for source in hosts
            for target in hosts
            if source != target
        }
        # By source, as packets come: the wire to each address.
        self._ways = [
            {address: self._wires[source, target] for address, target in self._hosts.items() if target != source}
            for source in hosts
        ]
        self._exits = [(wire, self._devices[target]) for (_, target), wire in self._wires.items()]

    def change(self, changes: Sequence[Change]) -> None:
        """Conditions from now on."""
        for change in changes:
            self._wires[change.source, change.target].change(change.conditions)

    def run(self, control: int) -> None:
        """Carries packets until ``control`` ends, or the parent does."""
        parent = os.getppid()
        sources = {device: (device, self._ways[at]) for at, device in enumerate(self._devices)}
        readable: list[int] = [*self._devices, control]
        lines = _Lines(control)
        while os.getppid() == parent:
            for ready in select.select(readable, (), (), self._wait_s())[0]:
                if ready != control:
                    _read(*sources[ready])
                elif (come := lines.read()) is None:
                    return
                else:
                    for line in come:
                        self.change([_change(said) for said in json.loads(line)])
                        _say("changed")
            self._deliver()

    def _wait_s(self) -> float:
        """Until the next packet arrives."""
        soonest_s = time.monotonic() + _LOOK_FOR_PARENT_S
        for wire, _ in self._exits:
            next_s = wire.next_s()
            if next_s is not None and next_s < soonest_s:
                soonest_s = next_s
        return max(0.0, soonest_s - time.monotonic())

    def _deliver(self) -> None:
        """Everything that has arrived."""
        now_s = time.monotonic()
        for wire, device in self._exits:
            while (packet := wire.take(now_s)) is not None:
                try:
                    os.write(device, packet)
                except OSError:  # the host takes no more, or its device is down: the packet is lost
                    continue


def _read(device: int, ways: Mapping[bytes, Wire]) -> None:
    """What a host sends, onto the wires; what is for none of the hosts goes nowhere."""
    now_s = time.monotonic()
    for _ in range(_BURST):
        try:
            packet = os.read(device, _MOST_PACKET_BYTES)
        except BlockingIOError:
            return
        wire = ways.get(packet[_TARGET])
        if wire is not None and packet[0] >> 4 == 4:
            wire.put(packet, now_s)


def _change(said: dict[str, Any]) -> Change:
    return Change(source=said["source"], target=said["target"], conditions=LinkConditions(**said["conditions"]))


class _Lines:
    """The lines of the control pipe."""

    def __init__(self, control: int) -> None:
        self._control = control
        self._rest = b""

    def read(self) -> list[bytes] | None:
        """Those that are complete now; None at the end."""
        came = os.read(self._control, 65_536)
        if not came:
            return None
        *lines, self._rest = (self._rest + came).split(b"\n")
        return lines

    def first(self) -> bytes | None:
        """Waits for one line, after which nothing comes until it is answered."""
        while (lines := self.read()) is not None:
            if lines:
                return lines[0]
        return None


def _say(text: str) -> None:
    print(text, flush=True)


def main() -> None:
    """Set up, then relay."""
    control = sys.stdin.fileno()
    line = _Lines(control).first()
    if line is None:
        return
    # Of what the kernel takes 50 us to wake up, packets would be late by that.
    ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1)
    relay = Relay(Setup(**json.loads(line)))
    _say("ready")
    relay.run(control)


if __name__ == "__main__":
    main()
