import os
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from workers.transport.errors import BadFrame, PeerFailed
from workers.transport.frames import Kind, header
from workers.transport.link import Link, Transfer, move, receive, send

EPOCH = 5


@pytest.fixture
def ends() -> Iterator[tuple[Link, Link]]:
    server = socket.create_server(("127.0.0.1", 0))
    near = Link(socket.create_connection(server.getsockname()), peer=1, epoch=EPOCH)
    far = Link(server.accept()[0], peer=0, epoch=EPOCH)
    server.close()
    yield near, far
    near.close()
    far.close()


def _soon() -> float:
    return time.monotonic() + 20.0


def test_two_ranks_send_more_than_buffers_hold_to_each_other_at_once(ends: tuple[Link, Link]) -> None:
    size = 32 << 20
    sent = [os.urandom(size), os.urandom(size)]
    received = [bytearray(size), bytearray(size)]

    def run(i: int) -> None:
        transfer = Transfer(link=ends[i], send=memoryview(sent[i]), receive=memoryview(received[i]))
        move([transfer], deadline_s=_soon())

    thread = threading.Thread(target=run, args=(1,))
    thread.start()
    run(0)
    thread.join(20)
    assert bytes(received[0]) == sent[1] and bytes(received[1]) == sent[0]


def test_frames_come_in_order_and_each_kind_where_it_is_due(ends: tuple[Link, Link]) -> None:
    near, far = ends
    for text in (b"one", b"", b"three"):
        send(near, Kind.STEP, memoryview(text), deadline_s=_soon())
    assert [bytes(receive(far, Kind.STEP, deadline_s=_soon())) for _ in range(3)] == [b"one", b"", b"three"]
    send(near, Kind.STEP, memoryview(b"four"), deadline_s=_soon())
    with pytest.raises(BadFrame, match="STEP frame came where a TENSOR was due"):
        move([Transfer(link=far, receive=memoryview(bytearray(4)))], deadline_s=_soon())


def test_a_payload_of_another_length_is_refused_before_it_is_read(ends: tuple[Link, Link]) -> None:
    near, far = ends
    send(near, Kind.TENSOR, memoryview(bytes(100)), deadline_s=_soon())
    with pytest.raises(BadFrame, match="has 100 bytes, not 64"):
        move([Transfer(link=far, receive=memoryview(bytearray(64)))], deadline_s=_soon())


def test_no_memory_is_set_aside_for_what_is_said_to_be_huge(ends: tuple[Link, Link]) -> None:
    near, far = ends
    head = bytearray(header(Kind.STEP, memoryview(b""), epoch=EPOCH, number=0))
    head[24:32] = (2**62).to_bytes(8, "little")
    near.socket.sendall(bytes(head))
    with pytest.raises(BadFrame, match="of 67108864 at most"):
        receive(far, Kind.STEP, deadline_s=_soon())


def test_damage_on_the_way_is_noticed(ends: tuple[Link, Link]) -> None:
    near, far = ends
    near.socket.sendall(header(Kind.STEP, memoryview(b"right"), epoch=EPOCH, number=0) + b"wrong")
    with pytest.raises(BadFrame, match="damaged"):
        receive(far, Kind.STEP, deadline_s=_soon())


def test_a_repeated_frame_is_noticed(ends: tuple[Link, Link]) -> None:
    near, far = ends
    frame = header(Kind.STEP, memoryview(b""), epoch=EPOCH, number=0)
    near.socket.sendall(frame + frame)
    receive(far, Kind.STEP, deadline_s=_soon())
    with pytest.raises(BadFrame, match="frame 0 came where 1 was due"):
        receive(far, Kind.STEP, deadline_s=_soon())


def test_an_end_that_closes_is_known_at_once(ends: tuple[Link, Link]) -> None:
    near, far = ends
    near.close()
    before_s = time.monotonic()
    with pytest.raises(PeerFailed, match="rank 0: closed its connection"):
        receive(far, Kind.STEP, deadline_s=_soon())
    assert time.monotonic() - before_s < 5.0


def test_an_end_that_says_nothing_is_waited_for_until_the_deadline(ends: tuple[Link, Link]) -> None:
    with pytest.raises(PeerFailed, match="rank 0: did not answer in time"):
        receive(ends[1], Kind.STEP, deadline_s=time.monotonic() + 0.2)


def test_who_waits_hears_of_a_loss_that_others_noticed(ends: tuple[Link, Link]) -> None:
    def alive() -> None:
        raise PeerFailed(3, "is frozen")

    with pytest.raises(PeerFailed, match="rank 3: is frozen"):
        receive(ends[1], Kind.STEP, deadline_s=_soon(), alive=alive)


def test_last_words_are_the_cause(ends: tuple[Link, Link]) -> None:
    near, far = ends
    send(near, Kind.FAILED, memoryview(b"ran out of memory"), deadline_s=_soon())
    with pytest.raises(PeerFailed, match="rank 0: ran out of memory"):
        receive(far, Kind.STEP, deadline_s=_soon())
