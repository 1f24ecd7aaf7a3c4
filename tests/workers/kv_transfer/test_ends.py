"""A transfer ends when either side does, or a step fails, and each end is told once."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from placement.errors import InvalidRequest
from placement.model.part import Span
from tests.workers.kv_transfer.replicas import WAIT_S, Kind, dense_kv, pair, wait_until
from workers.kv_transfer import shared_memory
from workers.model.progress import LayerProgress

TOKENS = Span(0, 21)
ROOT = Path(__file__).resolve().parents[3]


def test_a_transfer_ends_when_its_source_does() -> None:
    with pair(Kind("stages"), Kind("uneven")) as it:
        transfer = it.expect(TOKENS)
        it.open(transfer, TOKENS)
        it.ship(transfer, Span(0, 10))
        layer_bytes = dense_kv(10)[0].numel() * 4
        wait_until(lambda: [sender.num_sent_bytes for sender in it.senders] == [2 * layer_bytes, layer_bytes])
        it.senders[1].stop()
        assert all("ended" in end[2] and end[1] == transfer for end in it.outcomes())
        assert it.ends.empty()


def test_a_sender_gives_up_what_its_target_left() -> None:
    with pair() as it:
        transfer = it.expect(TOKENS)
        it.open(transfer, TOKENS)
        it.ship(transfer, Span(0, 10))
        wait_until(lambda: it.senders[0].num_sent_bytes)
        it.receivers[0].stop()
        dropped, problem = it.drops.get(timeout=WAIT_S)
        assert dropped == transfer and "the connection broke" in problem
        it.ship(transfer, Span(10, 21))


def test_a_target_that_cannot_be_reached_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.kv_transfer.courier._REACH_S", 0.2)
    with pair() as it:
        it.open(bytes(16), TOKENS, addresses=[("127.0.0.1", 1)])
        it.ship(bytes(16), TOKENS)
        dropped, problem = it.drops.get(timeout=WAIT_S)
        assert dropped == bytes(16) and "could not be reached" in problem


def test_the_target_is_told_when_a_step_fails() -> None:
    with pair(target=Kind("uneven")) as it:
        it.source.fill(dense_kv(21))
        transfer = it.expect(TOKENS)
        it.open(transfer, TOKENS)
        progress = LayerProgress()
        it.ship(transfer, TOKENS, progress)
        progress.advance(1)
        wait_until(lambda: it.senders[0].num_sent_bytes)
        progress.fail()
        assert all("the step that computes it failed" in end[2] for end in it.outcomes())
        assert it.drops.get(timeout=WAIT_S) == (transfer, "the step that computes it failed")
        wait_until(lambda: not it.senders[0]._transfers)
        assert it.drops.empty(), "it is told once, whatever the ranks that it was for"


def test_the_target_is_told_when_a_transfer_is_closed_before_all_is_sent() -> None:
    with pair() as it:
        transfer = it.expect(TOKENS)
        it.open(transfer, TOKENS)
        it.ship(transfer, Span(0, 10))
        wait_until(lambda: it.senders[0].num_sent_bytes)
        it.senders[0].close(transfer)
        it.senders[0].close(transfer)  # which is unknown by now
        assert "it was closed by its source" in it.ends.get(timeout=WAIT_S)[2]
        assert it.drops.empty(), "whoever closes it knows"


def test_a_transfer_is_opened_once() -> None:
    with pair() as it:
        it.source.fill(dense_kv(21))
        transfer = it.expect(TOKENS)
        it.open(transfer, TOKENS)
        with pytest.raises(InvalidRequest, match="open already"):
            it.open(transfer, Span(0, 5))
        it.ship(transfer, TOKENS)
        assert it.ends.get(timeout=WAIT_S)[1:3] == (transfer, "")


def test_a_transfer_that_is_closed_once_all_is_sent_arrives() -> None:
    with pair() as it:
        it.source.fill(dense_kv(21))
        size = dense_kv(21).numel() * 4
        for count in range(1, 11):
            transfer = it.expect(TOKENS)
            it.open(transfer, TOKENS)
            it.ship(transfer, TOKENS)
            wait_until(lambda sent=count * size: it.senders[0].num_sent_bytes == sent)
            assert it.ends.get(timeout=WAIT_S) == (0, transfer, "", size)
            it.senders[0].close(transfer)


def test_a_closed_transfer_has_no_end() -> None:
    with pair() as it:
        closed = it.expect(TOKENS)
        it.receivers[0].close(closed)
        it.receivers[0].close(closed)
        it.open(closed, TOKENS)
        it.ship(closed, TOKENS)
        other = it.expect(TOKENS)
        it.open(other, TOKENS)
        it.ship(other, TOKENS)
        assert it.ends.get(timeout=WAIT_S)[1:3] == (other, "")
        assert it.ends.empty()


def test_a_transfer_is_awaited_once() -> None:
    with pair() as it:
        it.expect(TOKENS)
        with pytest.raises(InvalidRequest, match="awaited already"):
            it.receivers[0].expect(it.receivers[0]._transfers.every()[0].expected)


@pytest.mark.skipif(not any(shared_memory.host_digest()), reason="this system does not tell of its boot")
def test_shared_memory_is_used_on_one_machine_and_gone_with_the_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []
    write = shared_memory.RemoteWindow.write

    def watched(self: shared_memory.RemoteWindow, slot: int, body: memoryview) -> None:
        written.append(body.nbytes)
        write(self, slot, body)

    monkeypatch.setattr(shared_memory.RemoteWindow, "write", watched)
    with pair(shared_memory=True) as it:
        it.source.fill(dense_kv(21))
        transfer = it.expect(TOKENS)
        it.open(transfer, TOKENS)
        it.ship(transfer, TOKENS)
        assert it.ends.get(timeout=WAIT_S)[2] == ""
        assert sum(written) == dense_kv(21).numel() * 4
    links = (os.readlink(entry.path) for entry in os.scandir("/proc/self/fd") if os.path.islink(entry.path))
    assert not [link for link in links if "heterodyne-kv" in link]


@pytest.mark.parametrize("change", ["pid", "fd", "nonce", "size"])
def test_memory_that_is_not_the_one_named_is_not_opened(change: str) -> None:
    window = shared_memory.open_window()
    if window is None:
        pytest.skip("this system has no such memory")
    try:
        name = window.name
        names = {
            "pid": shared_memory.WindowName(2**22 + 1, name.fd, name.nonce, name.slot_bytes, name.num_slots),
            "fd": shared_memory.WindowName(name.pid, 0, name.nonce, name.slot_bytes, name.num_slots),
            "nonce": shared_memory.WindowName(name.pid, name.fd, bytes(16), name.slot_bytes, name.num_slots),
            "size": shared_memory.WindowName(name.pid, name.fd, name.nonce, name.slot_bytes, 99),
        }
        assert shared_memory.open_remote(names[change]) is None
        remote = shared_memory.open_remote(name)
        assert remote is not None
        remote.write(3, memoryview(b"some keys"))
        read = bytearray(9)
        window.read(3, memoryview(read))
        assert read == b"some keys"
        remote.close()
    finally:
        window.close()


_SOURCE = """
import sys
from placement.model.part import Span
from tests.workers.kv_transfer.replicas import SOURCE_EPOCH, TARGET_EPOCH, Kind, Replica, computed, ranks
from placement.serving.kv.peers import KvFormat, Shipment
from workers.kv_transfer.sender import KvSender, Target

source = Replica(ranks(Kind(), SOURCE_EPOCH, [("127.0.0.1", 1)]), 21)
sender = KvSender(epoch=SOURCE_EPOCH, rank=0, own=source.ranks, cache=source.caches[0], head_dim=8, on_drop=print)
there = ranks(Kind(), TARGET_EPOCH, [("127.0.0.1", int(sys.argv[1]))])
transfer = bytes.fromhex(sys.argv[2])
sender.open(Target(transfer_id=transfer, ranks=there, tokens=Span(0, 21), format=KvFormat.NATIVE))
sender.ship(Shipment(transfer_id=transfer, tokens=Span(0, 10)), source.runs(10), computed())
while not sender.num_sent_bytes:
    pass
print("sent", flush=True)
sys.stdin.read()
"""


def test_a_transfer_ends_when_its_source_is_killed() -> None:
    with pair(shared_memory=True) as it:
        transfer = it.expect(TOKENS)
        command = [sys.executable, "-c", _SOURCE, str(it.addresses[0][1]), transfer.hex()]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
            assert process.stdout is not None and process.stdout.readline() == "sent\n"
            process.send_signal(signal.SIGKILL)
            _, ended, problem, num_bytes = it.ends.get(timeout=WAIT_S)
        assert ended == transfer and "ended" in problem and num_bytes > 0
