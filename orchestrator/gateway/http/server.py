"""Listens for HTTP/1.1 on the gateway's event loop, and stops in order."""

import asyncio
import contextlib
import logging
import socket
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from orchestrator.config.types import Address
from orchestrator.gateway.http.connection import ABORT
from placement.errors import InvalidConfig

FIELD = "gateway.http_address"
_START_S = 10.0
# Longer than clients keep a connection that they do not use, so that none sends on one that is being closed.
_KEEP_ALIVE_S = 65
# How long a client may take from connecting to the end of its first request's head.
_FIRST_REQUEST_S = 30.0
_BACKLOG = 2048
# A client's machine that no longer answers is noticed as soon as by the gRPC server.
_KEEP_ALIVE = ((socket.TCP_KEEPIDLE, 20), (socket.TCP_KEEPINTVL, 2), (socket.TCP_KEEPCNT, 3))


class HttpServer:
    """Serves an application. Lives on one event loop; leaves the process's signals alone."""

    def __init__(self, app: ASGIApp, address: Address) -> None:
        self._address = address
        self._app = app
        self._server: _Server | None = None
        self._serving: asyncio.Task[None] | None = None

    async def start(self) -> Address:
        """Listens; returns the address, with the port that was taken.

        Raises:
            InvalidConfig: the address cannot be listened on.
        """
        listener = _listen(self._address)
        config = uvicorn.Config(
            self._app,
            http=_Protocol,
            ws="none",
            lifespan="off",
            log_config=None,
            log_level=logging.ERROR,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=1,
            backlog=_BACKLOG,
        )
        self._server = _Server(config)
        self._serving = asyncio.create_task(self._server.serve(sockets=[listener]))
        async with asyncio.timeout(_START_S):
            while not self._server.started:
                await asyncio.sleep(0.001)
        return Address(self._address.host, listener.getsockname()[1])

    async def stop(self) -> None:
        """Closes the listening socket and idle connections; what still runs has a second, and is then cancelled."""
        if self._server is not None and self._serving is not None:
            self._server.should_exit = True
            await self._serving


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Takes no signal: the gateway says when to stop."""
        yield


class _Protocol(H11Protocol):
    """Lets an exchange close its connection at once; gives up clients that ask nothing, and machines that are gone."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.app_state = {**self.app_state, ABORT: transport.abort}
        self.loop.call_later(_FIRST_REQUEST_S, self._close_unless_asked)
        connected = transport.get_extra_info("socket")
        if connected is not None:
            connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in _KEEP_ALIVE:
                connected.setsockopt(socket.IPPROTO_TCP, option, value)

    def _close_unless_asked(self) -> None:
        cycle: RequestResponseCycle | None = self.cycle
        if cycle is None:  # the head of no request is complete
            self.transport.abort()


def _listen(address: Address) -> socket.socket:
    try:
        family, _, _, _, where = socket.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(where)
            listener.listen(_BACKLOG)
        except BaseException:
            listener.close()
            raise
    except OSError as error:
        raise InvalidConfig(
            field=FIELD,
            value=str(address),
            problem="cannot be listened on",
            fix="Choose a free port of this host.",
        ) from error
    return listener
