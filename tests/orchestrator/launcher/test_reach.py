"""Whether a worker is reached is found out before anything is sent to it."""

import asyncio
import contextlib
import socket

import pytest

from orchestrator.launcher.process import WorkerFailed
from orchestrator.launcher.reach import check_reached
from tests.support.clocks import PATIENCE_S
from tests.support.deploying.service import free_port


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_a_worker_that_listens_is_reached_however_busy_it_is(host: str) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as server:  # it never accepts
        port = server.getsockname()[1]
        await check_reached(f"[{host}]:{port}" if ":" in host else f"{host}:{port}", node="big")


async def test_who_refuses_is_named_with_the_fix() -> None:
    words = r"cannot connect to it at 127.0.0.1:\d+ \(Connect.*\). Let all TCP ports .* on small.*cluster.bind_host"
    with pytest.raises(WorkerFailed, match=words):
        await check_reached(f"127.0.0.1:{free_port()}", node="small")


async def test_who_says_nothing_is_not_waited_for_without_end() -> None:
    async with asyncio.timeout(PATIENCE_S), contextlib.AsyncExitStack() as stack:
        full = stack.enter_context(socket.socket())
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        host, port = full.getsockname()
        # The kernel drops what more would connect than it lets wait to be accepted, as a firewall does.
        for _ in range(2):
            with contextlib.suppress(TimeoutError):
                _, writer = await asyncio.wait_for(asyncio.open_connection(host, port), 0.3)
                stack.callback(writer.close)
        with pytest.raises(WorkerFailed, match=r"no answer within 0\.3 s"):
            await check_reached(f"{host}:{port}", node="small", timeout_s=0.3)
