"""Who may have a session, and what is held for whom."""

import threading
from contextlib import suppress

import torch

from tests.support.offload.sessions import DEADLINE_S, geometry_of
from workers.attention_worker.directory import Directory
from workers.attention_worker.handshake import Refused
from workers.attention_worker.memory import HeldMemory, kv_bytes_of
from workers.attention_worker.messages import Hello
from workers.attention_worker.serving import ServedSession


def test_a_session_that_is_long_in_opening_keeps_nobody_waiting_who_drops_what_has_lapsed() -> None:
    geometry = geometry_of()
    directory = Directory(kv_cache_bytes=kv_bytes_of(geometry), device=torch.device("cpu"), lease_s=0.0)
    is_opening, goes_on, has_let_go = threading.Event(), threading.Event(), threading.Event()

    def open_session(memory: HeldMemory, resumed: bool) -> ServedSession:
        is_opening.set()
        goes_on.wait(DEADLINE_S)
        raise Refused("it is enough")

    def admit() -> None:
        hello = Hello(replica="r", rank=0, epoch=1, resumes=False, geometry=geometry)
        with suppress(Refused):
            directory.admit(hello, open_session)

    def let_go() -> None:
        directory.let_go()
        has_let_go.set()

    threads = [threading.Thread(target=admit), threading.Thread(target=let_go)]
    threads[0].start()
    assert is_opening.wait(DEADLINE_S)
    threads[1].start()
    try:
        assert has_let_go.wait(DEADLINE_S / 4)
        assert directory.held_bytes == kv_bytes_of(geometry)
    finally:
        goes_on.set()
        for thread in threads:
            thread.join()
    directory.let_go()
    assert directory.held_bytes == 0
