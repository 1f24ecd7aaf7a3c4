"""One direction of a link, as a queue of packets under a clock that its caller holds. Pure."""

import random
from collections import deque

from tests.netlab.specs import LinkConditions

# What may wait to be sent at a limited rate: this long, and at least some of the largest packets.
_BUFFER_S = 0.1
_LEAST_BUFFER_BITS = 8 * 8 * 60_000
# What may be on its way at any rate.
_MOST_FLIGHT_BYTES = 64 << 20
_TCP = 6
_SYN, _ACK = 0x02, 0x10


class Wire:
    """Packets go in one by one and come out in the same order, as late as they should; what is too much is dropped."""

    def __init__(self, conditions: LinkConditions, *, seed: int) -> None:
        self._chance = random.Random(seed)
        self._packets: deque[tuple[float, bytes]] = deque()
        self._bytes = 0
        self._free_at_s = 0.0
        self.change(conditions)

    def change(self, conditions: LinkConditions) -> None:
        """From now on. What is on its way arrives as it would have, unless the link is partitioned."""
        rate = conditions.rate_bits_per_s
        self._delay_s = conditions.delay_s
        self._loss = conditions.loss_fraction
        self._is_partitioned = conditions.is_partitioned
        self._blocked = frozenset(conditions.blocked_ports)
        self._s_per_byte = 0.0 if rate is None else 8.0 / rate
        self._most_wait_s = 0.0 if rate is None else max(_BUFFER_S, _LEAST_BUFFER_BITS / rate)
        self._free_at_s = 0.0
        if self._is_partitioned:
            self._packets.clear()
            self._bytes = 0

    def put(self, packet: bytes, now_s: float) -> None:
        """Takes a packet, or drops it."""
        size = len(packet)
        if self._is_partitioned or self._bytes + size > _MOST_FLIGHT_BYTES:
            return
        if self._blocked and opened_port(packet) in self._blocked:
            return
        if self._loss and self._chance.random() < self._loss:
            return
        sent_s = now_s
        if self._s_per_byte:
            start_s = max(now_s, self._free_at_s)
            if start_s - now_s > self._most_wait_s:
                return
            sent_s = self._free_at_s = start_s + size * self._s_per_byte
        arrives_s = sent_s + self._delay_s
        if self._packets:  # a shorter delay lets nobody overtake
            arrives_s = max(arrives_s, self._packets[-1][0])
        self._packets.append((arrives_s, packet))
        self._bytes += size

    def next_s(self) -> float | None:
        """When the next packet arrives; None where there is none."""
        return self._packets[0][0] if self._packets else None

    def take(self, now_s: float) -> bytes | None:
        """The next packet, if it has arrived."""
        if not self._packets or self._packets[0][0] > now_s:
            return None
        packet = self._packets.popleft()[1]
        self._bytes -= len(packet)
        return packet


def opened_port(packet: bytes) -> int | None:
    """The TCP port that an IPv4 packet asks to open a connection to; None where it does not ask."""
    start = 4 * (packet[0] & 0x0F)
    if packet[9] != _TCP or packet[start + 13] & (_SYN | _ACK) != _SYN:
        return None
    return int.from_bytes(packet[start + 2 : start + 4], "big")
