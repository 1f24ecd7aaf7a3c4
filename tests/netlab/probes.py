"""What runs on the hosts of an emulated cluster to see what its links are like: ``probes.py COMMAND ARGS``.

A script of its own with the standard library alone, so that it starts in no time. Servers say their port in one line,
clients what they saw, as JSON.
"""

import json
import socket
import sys
import time
from collections.abc import Callable

_SERVE_S = 60.0
_SILENCE_S = 0.5
# Between the datagrams of a volley, so that none is lost for want of room in a socket's buffer.
_PACE_S = 0.0005
_CHUNK_BYTES = 1 << 16


def echo(host: str) -> None:
    """Sends every datagram back."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind((host, 0))
        server.settimeout(_SERVE_S)
        print(server.getsockname()[1], flush=True)
        while True:
            server.sendto(*server.recvfrom(_CHUNK_BYTES))


def ping(host: str, port: str, count: str, timeout_s: str) -> None:
    """One datagram after the other: how long each took there and back, of those that came back in time."""
    trips_s = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.connect((host, int(port)))
        for number in range(int(count)):
            sent_s = time.monotonic()
            client.send(number.to_bytes(4, "big"))
            if _came(client, number, sent_s + float(timeout_s)):
                trips_s.append(time.monotonic() - sent_s)
    print(json.dumps(trips_s))


def _came(client: socket.socket, number: int, deadline_s: float) -> bool:
    """Whether this very datagram came back; earlier ones that are late do not count."""
    while (left_s := deadline_s - time.monotonic()) > 0:
        client.settimeout(left_s)
        try:
            if client.recv(_CHUNK_BYTES) == number.to_bytes(4, "big"):
                return True
        except TimeoutError:
            return False
    return False


def volley(host: str, port: str, count: str) -> None:
    """Many datagrams without waiting: how many came back."""
    came = 0
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.connect((host, int(port)))
        for number in range(int(count)):
            client.send(number.to_bytes(4, "big"))
            time.sleep(_PACE_S)
        client.settimeout(_SILENCE_S)
        try:
            while True:
                client.recv(_CHUNK_BYTES)
                came += 1
        except TimeoutError:
            print(json.dumps(came))


def sink(host: str) -> None:
    """Takes what one connection brings, then says that it has it all."""
    with socket.create_server((host, 0)) as server:
        server.settimeout(_SERVE_S)
        print(server.getsockname()[1], flush=True)
        connection, _ = server.accept()
        with connection:
            connection.settimeout(_SERVE_S)
            while connection.recv(_CHUNK_BYTES):
                pass
            connection.send(b"!")


def send(host: str, port: str, num_bytes: str) -> None:
    """How long so many bytes take through a connection."""
    with socket.create_connection((host, int(port)), timeout=_SERVE_S) as client:
        started_s = time.monotonic()
        client.sendall(bytes(int(num_bytes)))
        client.shutdown(socket.SHUT_WR)
        client.recv(1)
        print(json.dumps(time.monotonic() - started_s))


def burn(wall_s: str) -> None:
    """How much time of a CPU this process gets for each second, when it takes what it can."""
    started_s, cpu_s = time.monotonic(), time.process_time()
    while time.monotonic() - started_s < float(wall_s):
        pass
    print(json.dumps((time.process_time() - cpu_s) / (time.monotonic() - started_s)))


_COMMANDS: dict[str, Callable[..., None]] = {
    "echo": echo, "ping": ping, "volley": volley, "sink": sink, "send": send, "burn": burn,
}  # fmt: skip

if __name__ == "__main__":
    _COMMANDS[sys.argv[1]](*sys.argv[2:])
