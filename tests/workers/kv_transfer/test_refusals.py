"""What is late, out of place or of another epoch is refused, and strangers are turned away."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from placement.model.part import Span
from tests.workers.kv_transfer.replicas import (
    DIM,
    NUM_HEADS,
    SOURCE_EPOCH,
    TARGET_EPOCH,
    WAIT_S,
    Kind,
    Pair,
    dense_kv,
    incarnation,
    is_closed,
    pair,
    wait_until,
)
from workers.kv_transfer.outbound import Outbound
from workers.kv_transfer.packing import LayerPlace
from workers.kv_transfer.wire import Hello, Piece
from workers.transport.errors import PeerFailed
from workers.transport.frames import Kind as FrameKind
from workers.transport.frames import header

TOKENS = Span(0, 8)
LAYER_BYTES = 2 * NUM_HEADS * len(TOKENS) * DIM * 4
HELLO = Hello(0, SOURCE_EPOCH, incarnation(SOURCE_EPOCH), 0, TARGET_EPOCH, bytes(16))
BODY = memoryview(torch.ones(LAYER_BYTES // 4).numpy()).cast("B")


@contextmanager
def connection(it: Pair, hello: Hello = HELLO) -> Iterator[Outbound]:
    """A connection of a source rank, by which a test sends what it likes."""
    outbound = Outbound.connect(it.addresses[0], hello, lambda: None)
    try:
        yield outbound
    finally:
        outbound.close()


def piece(transfer: bytes, layer: int = 0, first: int = 0, stop: int = TOKENS.stop) -> Piece:
    return Piece.of(transfer, layer, Span(first, stop), 0, LAYER_BYTES)


def refused(outbound: Outbound) -> list[bytes]:
    """Waits for the target to refuse a transfer."""
    heard: list[bytes] = []
    wait_until(lambda: heard.extend(outbound.hear()) or heard)
    return heard


def is_untouched(it: Pair) -> bool:
    return not any(tensor.any() for tensor in it.target.copy())


def test_a_piece_of_a_closed_transfer_is_not_written_but_refused_and_counted() -> None:
    with pair() as it, connection(it) as outbound:
        transfer = it.expect(TOKENS)
        outbound.send_layer(piece(transfer), BODY)
        wait_until(lambda: not is_untouched(it))
        it.receivers[0].close(transfer)
        for cache in it.target.caches:
            for layer in cache.layers:
                layer.keys.zero_()
                layer.values.zero_()
        outbound.send_layer(piece(transfer, layer=1), BODY)
        assert refused(outbound) == [transfer]
        assert is_untouched(it) and it.receivers[0].num_refused == 1 and it.ends.empty()


def test_a_piece_of_a_transfer_that_nobody_awaits_is_refused() -> None:
    with pair() as it, connection(it) as outbound:
        outbound.send_layer(piece(bytes(16)), BODY)
        assert refused(outbound) == [bytes(16)]
        assert is_untouched(it) and it.receivers[0].num_refused == 1


def test_a_transfer_that_was_refused_is_sent_no_further() -> None:
    with pair() as it:
        it.source.fill(dense_kv(21))
        it.open(bytes(16), TOKENS)
        it.ship(bytes(16), Span(0, 4))
        assert it.drops.get(timeout=WAIT_S) == (bytes(16), "the target does not await it")
        sent = it.senders[0].num_sent_bytes
        it.ship(bytes(16), Span(4, 8))
        transfer = it.expect(TOKENS)
        it.open(transfer, TOKENS)
        it.ship(transfer, TOKENS)
        assert it.ends.get(timeout=WAIT_S)[2] == ""
        wait_until(lambda: it.senders[0].num_sent_bytes == sent + 3 * LAYER_BYTES)


@pytest.mark.parametrize(
    "wrong",
    [
        piece(bytes(16), layer=3),
        piece(bytes(16), layer=0, first=4),
        piece(bytes(16), stop=TOKENS.stop + 1),
        piece(bytes(16), stop=0),
        piece(bytes(16), first=2**60, stop=2**60 + 8),
    ],
    ids=["layer", "gap", "past the end", "nothing", "huge"],
)
def test_a_piece_that_is_not_due_fails_its_transfer(wrong: Piece) -> None:
    with pair() as it, connection(it) as outbound:
        transfer = it.expect(TOKENS)
        outbound.send_layer(replace(wrong, transfer_id=transfer), BODY)
        _, ended, problem, num_bytes = it.ends.get(timeout=WAIT_S)
        assert (ended, num_bytes) == (transfer, 0) and "due" in problem
        assert refused(outbound) == [transfer]
        assert is_untouched(it) and it.receivers[0].num_refused == 1


@pytest.mark.parametrize("size", [0, LAYER_BYTES - 4, LAYER_BYTES + 4])
def test_a_layer_must_have_its_size(size: int) -> None:
    with pair() as it, connection(it) as outbound:
        transfer = it.expect(TOKENS)
        outbound.send_layer(piece(transfer), memoryview(bytearray(size)))
        outbound.send_layer(piece(transfer), BODY)
        assert "due" in it.ends.get(timeout=WAIT_S)[2]
        assert is_untouched(it)


def test_a_layer_that_comes_twice_fails_its_transfer() -> None:
    with pair() as it, connection(it) as outbound:
        transfer = it.expect(TOKENS)
        for _ in range(2):
            outbound.send_layer(piece(transfer), BODY)
        assert "due" in it.ends.get(timeout=WAIT_S)[2]


def test_two_connections_cannot_share_a_source_ranks_part() -> None:
    with pair() as it, connection(it) as one, connection(it) as other:
        transfer = it.expect(TOKENS)
        one.send_layer(piece(transfer), BODY)
        wait_until(lambda: not is_untouched(it))
        other.send_layer(piece(transfer, layer=1), BODY)
        assert "another connection" in it.ends.get(timeout=WAIT_S)[2]


def test_source_ranks_must_cut_a_transfer_alike() -> None:
    with pair(Kind("uneven")) as it, connection(it) as one, connection(it, replace(HELLO, source_rank=1)) as other:
        transfer = it.expect(TOKENS)
        one.send_layer(piece(transfer), BODY[: LAYER_BYTES // 4 * 3])
        wait_until(lambda: not is_untouched(it))
        other.send_layer(piece(transfer, stop=4), BODY[: LAYER_BYTES // 8])
        assert "due" in it.ends.get(timeout=WAIT_S)[2]


@pytest.mark.parametrize("field", ["target_epoch", "target_rank"])
def test_who_means_another_rank_or_epoch_is_turned_away(field: str) -> None:
    with pair() as it:
        for wrong in (getattr(HELLO, field) + 1, TARGET_EPOCH - 1):
            with (
                pytest.raises(PeerFailed, match="closed its connection"),
                connection(it, replace(HELLO, **{field: wrong})),
            ):
                pass
        wait_until(lambda: it.receivers[0].num_refused == 2)


def test_a_frame_and_its_greeting_must_be_of_one_epoch() -> None:
    with pair() as it, socket.create_connection(it.addresses[0]) as sock:
        payload = replace(HELLO, target_epoch=TARGET_EPOCH - 1).pack()
        sock.sendall(header(FrameKind.KV_HELLO, payload, epoch=TARGET_EPOCH, number=0) + bytes(payload))
        assert is_closed(sock)
        assert it.receivers[0].num_refused == 1


@pytest.mark.parametrize(
    "other", [{"source_epoch": SOURCE_EPOCH - 1}, {"source_incarnation": incarnation(1)}], ids=["epoch", "incarnation"]
)
def test_a_rank_of_another_or_an_earlier_replica_writes_nothing(other: dict[str, Any]) -> None:
    with pair() as it, connection(it, replace(HELLO, **other)) as outbound:
        transfer = it.expect(TOKENS)
        outbound.send_layer(piece(transfer), BODY)
        assert refused(outbound) == [transfer]
        outbound.fail(transfer, "an old rank ends nothing")
        outbound.send_layer(piece(transfer), BODY)
        assert refused(outbound) == [transfer]
        assert is_untouched(it) and it.receivers[0].num_refused == 2 and it.ends.empty()


def test_damage_from_another_replica_of_the_same_epoch_ends_nothing() -> None:
    with pair() as it:
        it.source.fill(dense_kv(21))
        transfer = it.expect(TOKENS)
        with connection(it, replace(HELLO, source_incarnation=incarnation(1))) as outbound:
            outbound._link.socket.sendall(bytes(1000))
            assert is_closed(outbound._link.socket)
        it.open(transfer, TOKENS)
        it.ship(transfer, TOKENS)
        assert it.ends.get(timeout=WAIT_S)[1:3] == (transfer, "") and it.ends.empty()


@pytest.mark.parametrize("words", [b"GET / HTTP/1.1\r\nHost: heterodyne.example\r\n\r\n" + bytes(100), b"\x00" * 500])
def test_a_stranger_is_turned_away_and_holds_up_nobody(words: bytes) -> None:
    with pair() as it, socket.create_connection(it.addresses[0]) as loud, socket.create_connection(it.addresses[0]):
        loud.sendall(words)
        transfer = it.expect(TOKENS)
        it.open(transfer, TOKENS)
        it.ship(transfer, TOKENS)
        assert it.ends.get(timeout=WAIT_S)[2] == ""
        assert is_closed(loud)


def test_a_silent_visitor_is_turned_away() -> None:
    with pair() as it, socket.create_connection(it.addresses[0]) as sock:
        assert is_closed(sock)


def test_many_silent_visitors_do_not_keep_a_source_out() -> None:
    with pair() as it:
        visitors = [socket.create_connection(it.addresses[0]) for _ in range(100)]
        with connection(it) as outbound:
            assert outbound.hear() == []
        for visitor in visitors:
            visitor.close()


def test_memory_is_set_aside_for_no_more_than_is_due() -> None:
    with pair() as it, socket.create_connection(it.addresses[0]) as sock:
        payload = HELLO.pack()
        sock.sendall(header(FrameKind.KV_HELLO, payload, epoch=TARGET_EPOCH, number=0) + bytes(payload))
        head = bytearray(header(FrameKind.KV_PIECE, memoryview(b""), epoch=TARGET_EPOCH, number=1))
        head[24:32] = (2**62).to_bytes(8, "little")
        sock.sendall(head)
        assert is_closed(sock)


def test_nothing_is_sent_of_what_is_copied_while_a_transfer_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    pack = LayerPlace.pack
    with pair() as it:
        it.source.fill(dense_kv(21))
        transfer = it.expect(TOKENS)

        def pack_and_close(self: LayerPlace, memory: torch.Tensor) -> None:
            pack(self, memory)
            it.senders[0].close(transfer)

        monkeypatch.setattr(LayerPlace, "pack", pack_and_close)
        it.open(transfer, TOKENS)
        it.ship(transfer, TOKENS)
        assert "it was closed by its source" in it.ends.get(timeout=WAIT_S)[2]
        assert is_untouched(it) and it.senders[0].num_sent_bytes == 0
