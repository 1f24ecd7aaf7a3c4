"""A wire under a clock of the test's."""

import pytest

from tests.netlab.specs import HostSpec, LinkConditions
from tests.netlab.wire import Wire


def wire(**conditions: float | bool) -> Wire:
    return Wire(LinkConditions(**conditions), seed=1)  # type: ignore[arg-type]


def taken(wire: Wire, now_s: float) -> list[bytes]:
    """All that has arrived."""
    packets = []
    while (packet := wire.take(now_s)) is not None:
        packets.append(packet)
    return packets


def test_a_packet_arrives_after_the_delay_and_not_before() -> None:
    late = wire(delay_s=0.5)
    late.put(b"one", 10.0)
    assert late.next_s() == 10.5
    assert late.take(10.499) is None
    assert late.take(10.5) == b"one"
    assert late.next_s() is None


def test_a_rate_sends_one_packet_after_the_other() -> None:
    slow = wire(delay_s=1.0, rate_bits_per_s=8000.0)
    for _ in range(3):
        slow.put(bytes(1000), 0.0)
    assert [len(taken(slow, at_s)) for at_s in (1.9, 2.0, 3.0, 4.0)] == [0, 1, 1, 1]


def test_what_waits_for_a_rate_is_bounded() -> None:
    slow = wire(rate_bits_per_s=8e6)
    for _ in range(10_000):
        slow.put(bytes(1000), 0.0)
    assert 480 <= len(taken(slow, 100.0)) <= 482
    slow.put(b"later", 101.0)
    assert taken(slow, 102.0) == [b"later"]


def test_what_is_on_its_way_is_bounded() -> None:
    long = wire(delay_s=60.0)
    packet = bytes(60_000)
    for _ in range(2000):
        long.put(packet, 0.0)
    assert len(taken(long, 100.0)) == (64 << 20) // 60_000


def test_nothing_overtakes_when_the_delay_gets_shorter() -> None:
    changing = wire(delay_s=1.0)
    changing.put(b"first", 0.0)
    changing.change(LinkConditions())
    changing.put(b"second", 0.1)
    assert taken(changing, 0.9) == []
    assert taken(changing, 1.0) == [b"first", b"second"]


def test_a_partition_loses_what_is_on_its_way() -> None:
    cut = wire(delay_s=1.0)
    cut.put(b"before", 0.0)
    cut.change(LinkConditions(is_partitioned=True))
    cut.put(b"meanwhile", 0.1)
    cut.change(LinkConditions())
    cut.put(b"after", 0.2)
    assert taken(cut, 9.0) == [b"after"]


def tcp_packet(port: int, flags: int, options: int = 0) -> bytes:
    """An IPv4 packet with ``options`` words of options, whose TCP segment goes to ``port``."""
    header = bytes([0x45 + options, *bytes(8), 6, *bytes(10 + 4 * options)])
    return header + bytes(2) + port.to_bytes(2, "big") + bytes(9) + bytes([flags]) + bytes(6)


@pytest.mark.parametrize("options", [0, 3])
def test_a_firewall_drops_what_opens_a_connection_to_a_blocked_port_and_nothing_else(options: int) -> None:
    syn, syn_ack, ack = 0x02, 0x12, 0x10
    walled = Wire(LinkConditions(blocked_ports=(6379, 6381)), seed=1)
    passes = [tcp_packet(6380, syn, options), tcp_packet(6379, ack, options), tcp_packet(6379, syn_ack, options)]
    datagram = bytes([0x45, *bytes(8), 17, *bytes(10), 0, 0, *(6379).to_bytes(2, "big"), *bytes(40)])
    for packet in (tcp_packet(6379, syn, options), *passes, tcp_packet(6381, syn, options), datagram):
        walled.put(packet, 0.0)
    assert taken(walled, 0.0) == [*passes, datagram]


def test_the_same_seed_loses_the_same_packets() -> None:
    def arrived() -> list[bytes]:
        lossy = wire(loss_fraction=0.3)
        for number in range(1000):
            lossy.put(number.to_bytes(2, "big"), 0.0)
        return taken(lossy, 0.0)

    first = arrived()
    assert arrived() == first
    assert 600 < len(first) < 800


@pytest.mark.parametrize(
    "conditions",
    [{"delay_s": -0.1}, {"rate_bits_per_s": 0.0}, {"rate_bits_per_s": float("nan")}, {"loss_fraction": 1.1}],
)
def test_conditions_that_no_link_has_are_refused(conditions: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(conditions))):
        wire(**conditions)


def test_a_host_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="no name"):
        HostSpec(name="../a")
    with pytest.raises(ValueError, match="cpu_share"):
        HostSpec(name="a", cpu_share=0.0)
