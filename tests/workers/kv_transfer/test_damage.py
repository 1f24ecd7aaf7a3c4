"""Whatever is done to the frames on their way, no wrong number is ever taken for a right one."""

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.model.part import Span
from tests.workers.kv_transfer.relay import Relay
from tests.workers.kv_transfer.replicas import NUM_LAYERS, WAIT_S, Replica, dense_kv, pair, wait_until
from workers.kv_transfer.shared_memory import RemoteWindow

TOKENS = 13
NUM_FRAMES = 1 + 2 * NUM_LAYERS  # the greeting, and two portions of each layer


@dataclass
class Harm:
    """Harms the frame with one number."""

    kind: str
    number: int
    place: float  # where in the frame
    _held: bytes = field(default=b"")

    def __call__(self, number: int, frame: bytes) -> list[bytes]:
        if self.kind == "reorder" and number == self.number + 1:
            return [frame, self._held]
        if number != self.number:
            return [frame]
        at = int(self.place * len(frame))
        if self.kind == "flip":
            return [frame[:at] + bytes([frame[at] ^ 1 << at % 8]) + frame[at + 1 :]]
        self._held = frame
        return {
            "truncate": [frame[:at]],
            "drop": [],
            "repeat": [frame, frame],
            "reorder": [],
            "split": [frame[:at], frame[at:]],
            "none": [frame],
        }[self.kind]


HARMS = ("flip", "truncate", "drop", "repeat", "reorder", "split", "none")


@given(
    st.sampled_from(HARMS), st.integers(0, NUM_FRAMES - 1), st.floats(0, 1, exclude_max=True), st.booleans(),
)  # fmt: skip
@settings(deadline=None, max_examples=80)
def test_harm_to_a_frame_is_noticed(kind: str, number: int, place: float, shared_memory: bool) -> None:
    dense = dense_kv(TOKENS)
    tokens = Span(0, TOKENS)
    with pair(num_tokens=TOKENS, shared_memory=shared_memory) as it:
        it.source.fill(dense)
        wanted = Replica(it.target.ranks, TOKENS)
        wanted.fill(dense)
        relay = Relay(it.addresses[0], Harm(kind, number, place), NUM_FRAMES)
        try:
            transfer = it.expect(tokens)
            it.open(transfer, tokens, addresses=[relay.address])
            it.ship(transfer, Span(0, 5))
            it.ship(transfer, Span(5, TOKENS))
            _, ended, problem, _ = it.ends.get(timeout=WAIT_S)
        finally:
            relay.close()
        assert ended == transfer and it.ends.empty()
        if not problem:
            for got, expected in zip(it.target.copy(), wanted.copy(), strict=True):
                np.testing.assert_array_equal(got.numpy(), expected.numpy())
        if kind in ("split", "none"):
            assert not problem
        is_last = number == NUM_FRAMES - 1
        if (number and kind in ("flip", "truncate", "drop")) or (kind == "repeat" and not is_last):
            assert problem


def test_damage_in_shared_memory_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = dense_kv(TOKENS)
    tokens = Span(0, TOKENS)
    write = RemoteWindow.write

    def damaged(self: RemoteWindow, slot: int, body: memoryview) -> None:
        flipped = bytearray(body)
        flipped[17] ^= 4
        write(self, slot, memoryview(flipped))

    monkeypatch.setattr(RemoteWindow, "write", damaged)
    with pair(num_tokens=TOKENS, shared_memory=True) as it:
        it.source.fill(dense)
        before = it.target.copy()
        transfer = it.expect(tokens)
        it.open(transfer, tokens)
        it.ship(transfer, tokens)
        assert "in shared memory is damaged" in it.ends.get(timeout=WAIT_S)[2]
        for got, expected in zip(it.target.copy(), before, strict=True):
            np.testing.assert_array_equal(got.numpy(), expected.numpy())


def test_damage_ends_also_the_transfers_that_had_yet_to_begin() -> None:
    tokens = Span(0, TOKENS)
    with pair(num_tokens=TOKENS) as it:
        relay = Relay(it.addresses[0], Harm("flip", 2, 0.9), NUM_FRAMES)
        try:
            transfers = [it.expect(tokens) for _ in range(2)]
            it.open(transfers[0], tokens, addresses=[relay.address])
            it.ship(transfers[0], tokens)
            ends = {end[1]: end[2] for end in (it.ends.get(timeout=WAIT_S) for _ in transfers)}
            assert all("damaged" in ends[transfer] for transfer in transfers)
        finally:
            relay.close()


def test_a_transfer_that_begins_after_a_broken_connection_gets_a_new_one() -> None:
    dense = dense_kv(TOKENS)
    tokens = Span(0, TOKENS)
    with pair(num_tokens=TOKENS) as it:
        it.source.fill(dense)
        relay = Relay(it.addresses[0], Harm("flip", 3, 0.5), NUM_FRAMES)
        try:
            for is_harmed in (True, False):
                transfer = it.expect(tokens)
                it.open(transfer, tokens, addresses=[relay.address])
                it.ship(transfer, tokens)
                assert bool(it.ends.get(timeout=WAIT_S)[2]) is is_harmed
                if is_harmed:
                    wait_until(lambda: not it.senders[0]._transfers)  # it has noticed
        finally:
            relay.close()


def test_nothing_of_a_damaged_layer_is_written() -> None:
    dense = dense_kv(TOKENS)
    tokens = Span(0, TOKENS)
    with pair(num_tokens=TOKENS) as it:
        it.source.fill(dense)
        before = it.target.copy()
        relay = Relay(it.addresses[0], Harm("flip", 1, 0.7), NUM_FRAMES)
        try:
            transfer = it.expect(tokens)
            it.open(transfer, tokens, addresses=[relay.address])
            it.ship(transfer, tokens)
            assert it.ends.get(timeout=WAIT_S)[2]
        finally:
            relay.close()
        for got, expected in zip(it.target.copy(), before, strict=True):
            np.testing.assert_array_equal(got.numpy(), expected.numpy())
