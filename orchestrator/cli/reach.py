"""Finds out why no gRPC service answers at an address, by connecting to it once more, and says so in words."""

import errno
import socket

from orchestrator.config.types import parse_address

# What a client of HTTP/2 says first: the preface and empty settings. A server answers with settings of its own.
_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
_FRAME_HEADER_BYTES, _TYPE, _SETTINGS = 9, 3, 4
_FIX_NOTHING = "Start a service with `heterodyne serve FILE`, or say where it is with --address."
_TLS_ALERT = b"\x15\x03"


def unreached(address: str, *, timeout_s: float = 1.0) -> str | None:
    """Says what is wrong at ``host:port``; None where something speaks HTTP/2 there, as every gRPC service does.

    Args:
        timeout_s: limit of connecting, and again of the first answer.
    """
    where = parse_address(address)
    try:
        with socket.create_connection((where.host, where.port), timeout_s) as connection:
            return _foreign(address, connection)
    except ConnectionRefusedError:
        return f"nothing listens at {address} (connection refused). {_FIX_NOTHING}"
    except socket.gaierror:
        return f"no address is known for the name {where.host!r}"
    except TimeoutError:
        return f"{address} cannot be reached (no answer to a connection within {timeout_s:g} s)"
    except OSError as error:
        return f"{address} cannot be reached ({(error.strerror or str(error)).lower()})"


def _foreign(address: str, connection: socket.socket) -> str | None:
    """Says what is wrong with what listens there; None where it answers as HTTP/2 wants it."""
    try:
        connection.sendall(_HELLO)
        answer = _receive(connection)
    except TimeoutError:
        return f"{address} takes connections and says nothing: it is another kind of server, or it hangs"
    except OSError as error:
        reset = error.errno in (errno.ECONNRESET, errno.EPIPE)
        return f"{address} does not speak gRPC ({'it closes the connection' if reset else str(error).lower()})"
    if len(answer) == _FRAME_HEADER_BYTES and answer[_TYPE] == _SETTINGS:
        return None
    if not answer:
        kind = "it closes the connection"
    elif answer.startswith((b"HTTP/", b"<")):
        kind = "it is a web server"
    elif answer.startswith(_TLS_ALERT):
        kind = "it wants TLS"
    else:
        kind = "it speaks another protocol"
    return f"{address} does not speak gRPC ({kind})"


def _receive(connection: socket.socket) -> bytes:
    """Returns as much as the header of a frame, or less where no more comes."""
    answer = b""
    while len(answer) < _FRAME_HEADER_BYTES and (part := connection.recv(_FRAME_HEADER_BYTES - len(answer))):
        answer += part
    return answer
