"""What ends a session: damage on the wire, silence, a wrong secret, an old epoch, too little memory."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from placement.errors import NotEnoughMemory
from placement.serving.offload.deltas import Appended, Begun, Cut, Freed, Moved
from placement.serving.offload.orders import QuerySpan, StepOrder
from tests.support.offload.sessions import (
    BLOCK_SIZE,
    DEADLINE_S,
    SECRET,
    Holding,
    RandomRank,
    attention_worker,
    geometry_of,
    open_session,
)
from workers.attention_worker.client import Life, RemoteSession, connect
from workers.attention_worker.errors import AttentionLost, AttentionRefused
from workers.attention_worker.handshake import challenge, hear, welcome
from workers.attention_worker.memory import kv_bytes_of
from workers.attention_worker.messages import pack_order, unpack_order
from workers.transport.errors import BadFrame
from workers.transport.mesh import listen

ROWS = (torch.ones(1, 4, 16), torch.ones(1, 2, 16), torch.ones(1, 2, 16))


def order_of(sequence: int, **fields: object) -> StepOrder:
    base: dict[str, object] = {
        "tables": (Begun(sequence=sequence, blocks=(sequence,)),),
        "spans": (QuerySpan(sequence=sequence, num_queries=1, num_new=1, seen=(((0, 1),),)),),
        "num_whole": 1,
        "slots": (sequence * BLOCK_SIZE,),
    }
    return StepOrder(**base | fields)  # type: ignore[arg-type]


def compute(session: RemoteSession, sequence: int) -> None:
    number = session.order(order_of(sequence))
    for layer in range(2):
        session.send(number, layer, *ROWS)
        session.result(number, layer)


class Relay:
    """Carries bytes between a session and its worker, and changes what the session sends after its beginning."""

    def __init__(self, target: tuple[str, int]) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = self._listener.getsockname()[:2]
        self._target = target
        self._sockets: list[socket.socket] = []
        self.change: Callable[[bytes], bytes] = bytes
        self.is_frozen = False
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        near, _ = self._listener.accept()
        far = socket.create_connection(self._target)
        self._sockets += [near, far]
        for pair, changes in (((near, far), True), ((far, near), False)):
            self._threads.append(threading.Thread(target=self._carry, args=(*pair, changes)))
            self._threads[-1].start()

    def _carry(self, source: socket.socket, target: socket.socket, changes: bool) -> None:
        try:
            while data := source.recv(1 << 20):
                if not self.is_frozen:
                    target.sendall(self.change(data) if changes else data)
            target.shutdown(socket.SHUT_WR)
        except OSError:  # one of both ends has gone
            pass

    def close(self) -> None:
        self._threads[0].join()
        for it in self._sockets:
            with suppress(OSError):  # it is no longer connected
                it.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for it in (*self._sockets, self._listener):
            it.close()


@contextmanager
def relayed(target: tuple[str, int]) -> Iterator[Relay]:
    relay = Relay(target)
    try:
        yield relay
    finally:
        relay.close()


@given(
    place=st.integers(0, 10_000),
    kind=st.sampled_from(["flip", "cut", "double", "swap"]),
)
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_damaged_on_the_wire_ends_the_session_with_an_error(place: int, kind: str) -> None:
    with attention_worker() as (_, address), relayed(address) as relay:
        session = open_session(relay.address)
        compute(session, 0)

        def damage(data: bytes) -> bytes:
            at = place % len(data)
            match kind:
                case "flip":
                    return data[:at] + bytes([data[at] ^ 1 << place % 8]) + data[at + 1 :]
                case "cut":
                    return data[:at] + data[at + 1 :]
                case "double":
                    return data + data
            half = len(data) // 2 + place % 7 * 4 + 1
            return data[half:] + data[:half] if data[half:] + data[:half] != data else data + data

        relay.change = damage
        with pytest.raises(AttentionLost):
            for sequence in range(1, 5):
                compute(session, sequence)
        with pytest.raises(AttentionLost):
            session.order(order_of(9))
        session.close()


def test_a_worker_that_is_frozen_is_lost_within_the_deadline() -> None:
    with attention_worker() as (_, address), relayed(address) as relay:
        session = open_session(relay.address, life=Life(silence_s=1.0))
        compute(session, 0)
        relay.is_frozen = True
        with pytest.raises(AttentionLost, match="frozen or cut off"):
            compute(session, 1)
        session.close()


def test_a_worker_that_owes_something_shows_that_it_lives() -> None:
    with attention_worker() as (_, address):
        session = open_session(address, life=Life(silence_s=1.0))
        number = session.order(order_of(0))
        session.send(number, 0, ROWS[0], None, None)
        late = threading.Timer(2.5, lambda: session.send(number, 0, None, *ROWS[1:]))
        late.start()
        assert session.result(number, 0).whole.shape == (1, 4, 16)
        late.join()


def test_a_worker_that_ends_is_lost() -> None:
    with attention_worker() as (worker, address):
        session = open_session(address)
        compute(session, 0)
        worker.stop()
        worker.ended.result(DEADLINE_S)
        with pytest.raises(AttentionLost, match=r"closed its connection|connection broke"):
            compute(session, 1)


@pytest.mark.parametrize(
    "order",
    [
        order_of(1, tables=()),
        order_of(1, slots=(1000,)),
        order_of(1, spans=(QuerySpan(sequence=1, num_queries=1, num_new=1, seen=(((0, 9),),)),)),
        order_of(1, spans=(QuerySpan(sequence=1, num_queries=2, num_new=1, seen=(((1, 1), (0, 1)),)),)),
        order_of(1, tables=(Begun(sequence=1, blocks=(64,)),)),
    ],
)
def test_an_impossible_order_ends_the_session_with_its_cause(order: StepOrder) -> None:
    with attention_worker() as (worker, address):
        session = open_session(address)
        with pytest.raises(AttentionLost, match=r"order|sequence|table"):
            session.result(session.order(order), 0)
        assert worker.failure is None
        compute(open_session(address, epoch=2), 0)


def test_a_wrong_secret_is_refused_on_both_sides() -> None:
    with attention_worker() as (worker, address):
        with pytest.raises(AttentionRefused, match="secret"):
            open_session(address, secret=b"t" * 32)
        assert not worker.num_sessions and not worker.held_bytes
    with listen("127.0.0.1") as listener:
        listener.setblocking(True)

        def pretend() -> None:
            sock, _ = listener.accept()
            link, own = challenge(sock, deadline_s=time.monotonic() + DEADLINE_S)
            _, theirs = hear(link, own, SECRET, deadline_s=time.monotonic() + DEADLINE_S)
            end_s = time.monotonic() + DEADLINE_S
            welcome(link, theirs, b"t" * 32, resumed=False, last_complete=-1, names={}, deadline_s=end_s)
            link.close()

        thread = threading.Thread(target=pretend)
        thread.start()
        with pytest.raises(AttentionLost, match="secret"):
            open_session(listener.getsockname()[:2])
        thread.join()


def test_a_greater_epoch_takes_over_and_others_are_fenced() -> None:
    with attention_worker() as (worker, address):
        first = open_session(address, epoch=3)
        compute(first, 0)
        for epoch in (2, 3):
            with pytest.raises(AttentionRefused, match="fenced"):
                open_session(address, epoch=epoch)
        compute(first, 1)
        second = open_session(address, epoch=4)
        compute(second, 0)
        with pytest.raises(AttentionLost):
            compute(first, 2)
        assert worker.num_sessions == 1
        assert worker.held_bytes == kv_bytes_of(geometry_of())


def test_who_resumes_finds_keys_values_names_and_the_last_order() -> None:
    with attention_worker() as (_, address):
        first = open_session(address)
        rank = RandomRank([Holding(session=first, heads=range(2))], num_kv_heads=2, group=2)
        rank.tables = {0: (5, 6)}
        rank.step({0: 5})
        session = rank.holdings[0].session
        session.order(StepOrder(names=((5, b"five"), (6, b"six"))))
        number = session.order(StepOrder(forgotten=(6,)))
        session.order(order_of(9))  # which is never carried out
        session.flush()
        first.close()
        second = open_session(address, epoch=2, resumes=True)
        assert second.welcome.resumed and second.welcome.last_complete == number
        assert second.welcome.names == {5: (b"five", 1)}
        rank.holdings = [Holding(session=second, heads=range(2))]
        for found, expected in rank.step({0: 1}):
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
        third = open_session(address, epoch=3, resumes=False)
        assert not third.welcome.resumed and third.welcome.last_complete == -1 and not third.welcome.names


def test_names_that_the_orders_before_never_made_true_are_dropped_for_good() -> None:
    with attention_worker() as (_, address):
        first = open_session(address)
        compute(first, 0)
        first.order(order_of(1))  # which is never carried out
        first.order(StepOrder(names=((1, b"not all there"),)))
        first.flush()
        first.close()
        second = open_session(address, epoch=2, resumes=True)
        assert second.welcome.last_complete == 0 and not second.welcome.names
        for sequence in range(2, 6):
            compute(second, sequence)
        second.close()
        third = open_session(address, epoch=3, resumes=True)
        assert third.welcome.last_complete == 4 and not third.welcome.names


def test_what_is_held_is_dropped_when_its_lease_ends_and_the_epoch_stays_fenced() -> None:
    with attention_worker(lease_s=0.0) as (worker, address):
        session = open_session(address, epoch=5)
        compute(session, 0)
        session.close()
        end_s = time.monotonic() + DEADLINE_S
        while worker.held_bytes and time.monotonic() < end_s:
            time.sleep(0.01)
        assert not worker.held_bytes
        with pytest.raises(AttentionRefused, match="fenced"):
            open_session(address, epoch=5)
        assert not open_session(address, epoch=6, resumes=True).welcome.resumed


def test_two_model_ranks_have_a_session_each_and_what_does_not_fit_is_refused() -> None:
    one = kv_bytes_of(geometry_of())
    with attention_worker(kv_cache_bytes=2 * one) as (worker, address):
        ranks = []
        for number in range(2):
            session = open_session(address, rank=number)
            ranks.append(RandomRank([Holding(session=session, heads=range(2))], num_kv_heads=2, group=2, seed=number))
            ranks[-1].tables = {0: (5, 6)}
        for chunks in ({0: 5}, {0: 1}):
            for rank in ranks:
                for found, expected in rank.step(chunks):
                    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
        assert worker.num_sessions == 2
        with pytest.raises(NotEnoughMemory, match="0 are left"):
            open_session(address, rank=2)


def test_who_cannot_be_reached_is_lost() -> None:
    with listen("127.0.0.1") as listener:
        address = listener.getsockname()[:2]
    with pytest.raises(AttentionLost, match="could not be reached"):
        connect(
            address,
            name="box",
            worker=0,
            epoch=1,
            secret=SECRET,
            replica="r",
            rank=0,
            geometry=geometry_of(),
            resumes=False,
            deadline_s=time.monotonic() + 0.2,
        )


_small = st.integers(0, 5)
_blocks = st.lists(_small, max_size=4).map(tuple)
_deltas = st.one_of(
    st.builds(Begun, sequence=_small, parent=st.none() | _small, num_shared=_small, blocks=_blocks),
    st.builds(Moved, sequence=_small, blocks=st.lists(st.tuples(_small, _small), max_size=3).map(tuple)),
    st.builds(Cut, sequence=_small, num_blocks=_small),
    st.builds(Appended, sequence=_small, blocks=_blocks),
    st.builds(Freed, sequence=_small),
)
_seen = st.lists(st.tuples(_small, _small), max_size=3).map(tuple)
_spans = st.builds(
    QuerySpan, sequence=_small, num_queries=_small, num_new=_small, seen=st.lists(_seen, max_size=2).map(tuple)
)
_orders = st.builds(
    StepOrder,
    tables=st.lists(_deltas, max_size=4).map(tuple),
    spans=st.lists(_spans, max_size=3).map(tuple),
    num_whole=_small,
    slots=_blocks,
    names=st.lists(st.tuples(_small, st.binary(max_size=5)), max_size=3).map(tuple),
    forgotten=_blocks,
)


@given(_orders)
def test_an_order_is_the_same_once_it_is_unpacked(order: StepOrder) -> None:
    assert unpack_order(pack_order(order)) == order


@given(_orders, st.data())
def test_other_bytes_are_another_order_or_none(order: StepOrder, data: st.DataObject) -> None:
    packed = bytearray(pack_order(order))
    place = data.draw(st.integers(0, len(packed) - 1))
    packed[place] ^= data.draw(st.integers(1, 255))
    with suppress(BadFrame):
        assert unpack_order(bytes(packed)) != order
