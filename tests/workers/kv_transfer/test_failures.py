"""What nobody foresaw ends the transfers concerned, with its cause, and no thread."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from placement.model.part import Span
from tests.workers.kv_transfer.replicas import WAIT_S, Pair, dense_kv, pair, wait_until
from workers.kv_transfer.inbound import Door, Inbound
from workers.kv_transfer.packing import LayerPlace
from workers.kv_transfer.receiver import KvReceiver

TOKENS = Span(0, 21)


@dataclass
class Failing:
    """Fails once, in one of the calls of a function."""

    function: Callable[..., Any]
    nth: int
    error: Exception = field(default_factory=lambda: RuntimeError("out of memory"))

    def __call__(self, *args: Any, **named: Any) -> Any:
        self.nth -= 1
        if self.nth == 0:
            raise self.error
        return self.function(*args, **named)

    def method(self) -> Callable[..., Any]:
        """As a function, which can be a method."""
        return lambda *args, **named: self(*args, **named)


def move(it: Pair) -> bytes:
    transfer = it.expect(TOKENS)
    it.open(transfer, TOKENS)
    it.ship(transfer, TOKENS)
    return transfer


def assert_next_arrives(it: Pair) -> None:
    wait_until(lambda: not it.senders[0]._transfers)  # the source has noticed, too
    transfer = move(it)
    assert it.ends.get(timeout=WAIT_S)[1:3] == (transfer, "")


def traceback_of(caplog: pytest.LogCaptureFixture, error: Exception) -> bool:
    return any(record.exc_info and record.exc_info[1] is error for record in caplog.records)


@pytest.mark.parametrize(
    ("nth", "cause"),
    [(1, "RuntimeError: out of memory"), (3, "closed its connection")],
    ids=["before anything was sent", "last layer"],
)
def test_a_layer_that_cannot_be_read_from_the_cache_ends_its_transfer(
    nth: int, cause: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    failing = Failing(LayerPlace.pack, nth)
    monkeypatch.setattr(LayerPlace, "pack", failing.method())
    with pair() as it:
        it.source.fill(dense_kv(21))
        transfer = move(it)
        _, ended, problem, _ = it.ends.get(timeout=WAIT_S)
        assert ended == transfer and cause in problem
        dropped, problem = it.drops.get(timeout=WAIT_S)
        assert dropped == transfer and "RuntimeError: out of memory" in problem
        assert traceback_of(caplog, failing.error)
        couriers = list(it.senders[0]._couriers.values())
        assert_next_arrives(it)
        assert list(it.senders[0]._couriers.values()) == couriers, "the thread goes on"
        assert it.drops.empty() and it.ends.empty()


def test_a_failing_courier_drops_all_that_it_was_to_send(monkeypatch: pytest.MonkeyPatch) -> None:
    pack, may_fail = LayerPlace.pack, threading.Event()
    failing = Failing(pack, 1)

    def wait_and_fail(self: LayerPlace, memory: torch.Tensor) -> None:
        assert may_fail.wait(WAIT_S)
        failing(self, memory)

    monkeypatch.setattr(LayerPlace, "pack", wait_and_fail)
    with pair() as it:
        it.source.fill(dense_kv(21))
        transfers = {move(it) for _ in range(3)}
        may_fail.set()
        assert {it.drops.get(timeout=WAIT_S)[0] for _ in transfers} == transfers
        assert {it.ends.get(timeout=WAIT_S)[1] for _ in transfers} == transfers
        assert_next_arrives(it)


@pytest.mark.parametrize("nth", [1, 3], ids=["first layer", "last layer"])
@pytest.mark.parametrize("error", [RuntimeError("out of memory"), MemoryError()], ids=["runtime", "memory"])
def test_a_layer_that_cannot_be_written_to_the_cache_ends_its_transfer(
    nth: int, error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(LayerPlace, "unpack", Failing(LayerPlace.unpack, nth, error).method())
    with pair() as it:
        it.source.fill(dense_kv(21))
        transfer = move(it)
        _, ended, problem, _ = it.ends.get(timeout=WAIT_S)
        assert ended == transfer and f"{type(error).__name__}: {error}" in problem
        wait_until(lambda: traceback_of(caplog, error))
        assert it.drops.get(timeout=WAIT_S)[0] == transfer
        assert_next_arrives(it)
        assert it.ends.empty()


def test_a_frame_that_cannot_be_received_ends_the_transfers_of_its_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Inbound, "receive", Failing(Inbound.receive, 1, MemoryError()).method())
    with pair() as it:
        it.source.fill(dense_kv(21))
        waiting = it.expect(TOKENS)
        transfer = move(it)
        assert {it.ends.get(timeout=WAIT_S)[1] for _ in range(2)} == {waiting, transfer}
        assert it.drops.get(timeout=WAIT_S)[0] == transfer
        assert_next_arrives(it)


def test_a_failing_receiver_ends_all_that_is_awaited_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    failing = Failing(Door.advance, 0)
    monkeypatch.setattr(Door, "advance", failing.method())
    with pair() as it:
        it.source.fill(dense_kv(21))
        transfer = it.expect(TOKENS)
        failing.nth = 1  # the turns before do not count
        assert "RuntimeError: out of memory" in it.ends.get(timeout=WAIT_S)[2]
        assert traceback_of(caplog, failing.error)
        assert_next_arrives(it)
        assert it.receivers[0]._transfers.find(transfer) is None


def test_an_end_that_nobody_takes_keeps_no_other_from_being_told(caplog: pytest.LogCaptureFixture) -> None:
    with pair() as it:
        it.source.fill(dense_kv(21))
        failing = Failing(it.receivers[0]._on_end, 1)
        it.receivers[0]._on_end = failing
        move(it)
        wait_until(lambda: traceback_of(caplog, failing.error))
        transfer = move(it)
        assert it.ends.get(timeout=WAIT_S)[1:3] == (transfer, "")


@dataclass
class Held:
    """Has the first layer that comes wait before it is written, and notes the order of what happens."""

    has_come: threading.Event = field(default_factory=threading.Event)
    may_go: threading.Event = field(default_factory=threading.Event)
    order: list[str] = field(default_factory=list)

    def hold(self, monkeypatch: pytest.MonkeyPatch) -> None:
        unpack = LayerPlace.unpack

        def wait(place: LayerPlace, memory: torch.Tensor) -> None:
            self.has_come.set()
            assert self.may_go.wait(WAIT_S)
            unpack(place, memory)
            self.order.append("written")

        monkeypatch.setattr(LayerPlace, "unpack", wait)

    def close(self, receiver: KvReceiver, transfer: bytes) -> None:
        receiver.close(transfer)
        self.order.append("closed")


def test_what_is_written_of_one_transfer_holds_up_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held()
    held.hold(monkeypatch)
    with pair() as it:
        other = it.expect(TOKENS)
        transfer = move(it)
        assert held.has_come.wait(WAIT_S)
        held.close(it.receivers[0], other)
        held.close(it.receivers[0], bytes(16))  # which nobody knows
        it.expect(TOKENS)
        assert held.order == ["closed", "closed"]
        held.may_go.set()
        assert it.ends.get(timeout=WAIT_S)[1:3] == (transfer, "")


def test_nothing_of_a_transfer_is_written_once_any_close_of_it_has_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held()
    held.hold(monkeypatch)
    with pair() as it:
        it.source.fill(dense_kv(21))
        transfer = move(it)
        assert held.has_come.wait(WAIT_S)
        threads = [threading.Thread(target=held.close, args=(it.receivers[0], transfer)) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(0.1)
        assert not held.order, "both wait for the layer that is being written"
        held.may_go.set()
        for thread in threads:
            thread.join(WAIT_S)
        # More layers may have been written before one of the two had its turn, but none after it.
        closed = list(held.order)
        assert closed[-2:] == ["closed", "closed"] and set(closed[:-2]) == {"written"}
        if closed.count("written") < len(it.target.ranks.parts[0].layers):
            assert it.drops.get(timeout=WAIT_S)[0] == transfer  # the next layer is refused
        assert held.order == closed and it.ends.empty()
