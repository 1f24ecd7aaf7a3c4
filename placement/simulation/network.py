"""Shares links among the transfers that are on them at a time, in virtual time."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from placement.simulation.clock import Action, VirtualClock

_NOTHING_LEFT_BYTES = 1e-3
"""Less than so much of a byte is left of a transfer that ends now: what is left is reckoned in rounded numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Interface:
    """The connection of a node to the network, which all its transfers share.

    Attributes:
        send_bytes_per_s: bytes that it sends in a second, at the most.
        receive_bytes_per_s: bytes that it receives in a second, at the most.
    """

    send_bytes_per_s: float
    receive_bytes_per_s: float


@dataclass(slots=True, eq=False)
class _Flow:
    """A transfer on its way, and the two directions of interfaces that it takes."""

    links: tuple[str, str]
    left_bytes: float
    done: Action
    bytes_per_s: float = 0.0


class Network:
    """Carries bytes between nodes. Transfers that share an interface share its speed (max-min fairness).

    Args:
        interfaces: by node.
        latency_s: seconds from the last byte that is sent until it is there.
        contends: whether transfers slow each other down; False: each has the whole speed of both interfaces, as some
            simulators assume.
    """

    def __init__(
        self, clock: VirtualClock, interfaces: Mapping[str, Interface], *, latency_s: float = 0.0, contends: bool = True
    ) -> None:
        self._clock = clock
        self._capacity: dict[str, float] = {}
        for node, interface in interfaces.items():
            self._capacity[f"{node} sends"] = interface.send_bytes_per_s
            self._capacity[f"{node} receives"] = interface.receive_bytes_per_s
        self._latency_s = latency_s
        self._contends = contends
        self._flows: list[_Flow] = []
        self._at_s = 0.0  # the time up to which flows are reckoned
        self._wake_number = 0  # only the newest wake counts

    def send(self, source: str, target: str, num_bytes: float, done: Action) -> None:
        """Sends bytes from one node to another, and has ``done`` called once they are there."""
        if source == target or num_bytes <= 0:
            self._clock.after(self._latency_s if source != target else 0.0, done)
            return
        links = (f"{source} sends", f"{target} receives")
        if not self._contends:
            speed = min(self._capacity[link] for link in links)
            self._clock.after(self._latency_s + num_bytes / speed, done)
            return
        self._move()
        self._flows.append(_Flow(links, float(num_bytes), done))
        self._share()

    def _move(self) -> None:
        """Reckons what each transfer has carried until now."""
        passed_s, self._at_s = self._clock.now_s - self._at_s, self._clock.now_s
        for flow in self._flows:
            flow.left_bytes -= flow.bytes_per_s * passed_s

    def _share(self) -> None:
        """Shares the links anew, and wakes when the next transfer ends."""
        _share_fairly(self._flows, self._capacity)
        self._wake_number += 1
        if self._flows:
            wait_s = min(flow.left_bytes / flow.bytes_per_s for flow in self._flows)
            self._clock.after(max(0.0, wait_s), partial(self._wake, self._wake_number))

    def _wake(self, number: int) -> None:
        if number != self._wake_number:
            return
        self._move()
        # At least the transfer that was waited for ends, whatever is left of it by rounding.
        soonest_s = min(flow.left_bytes / flow.bytes_per_s for flow in self._flows)
        ended = [
            flow
            for flow in self._flows
            if flow.left_bytes <= _NOTHING_LEFT_BYTES or flow.left_bytes / flow.bytes_per_s <= soonest_s
        ]
        self._flows = [flow for flow in self._flows if flow not in ended]
        self._share()
        for flow in ended:
            self._clock.after(self._latency_s, flow.done)


def _share_fairly(flows: list[_Flow], capacity: Mapping[str, float]) -> None:
    """Gives each flow its speed: the fullest link is shared equally, then the next among what is left, and so on."""
    left = dict.fromkeys((link for flow in flows for link in flow.links), 0.0)
    for link in left:
        left[link] = capacity[link]
    open_flows = list(flows)
    while open_flows:
        counts = dict.fromkeys((link for flow in open_flows for link in flow.links), 0)
        for flow in open_flows:
            for link in flow.links:
                counts[link] += 1
        fullest = min(counts, key=lambda link: (left[link] / counts[link], link))
        speed = left[fullest] / counts[fullest]
        for flow in [flow for flow in open_flows if fullest in flow.links]:
            flow.bytes_per_s = speed
            open_flows.remove(flow)
            for link in flow.links:
                left[link] = max(0.0, left[link] - speed)
