"""Runs one rank on one device by ``python -m workers``. A launcher starts it, or a person; it needs no Ray.

The process says where it listens in one JSON line on standard output; logs go to standard error. It ends on SIGTERM, on
SIGINT, and when its parent dies. It ends with exit code 1 when its engine fails, and with 3 when another rank of its
replica did. Before that it answers all requests in progress; some seconds later it has ended, if need be by force.
"""

import argparse
import asyncio
import faulthandler
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import grpc

from placement.errors import FieldError, InvalidConfig, cause_of
from protos.codec.child_process import PEER_LOST_EXIT_CODE, Listening, die_with_parent
from protos.codec.log_record import LEVELS, last_words, log_to, log_to_parent
from protos.heterodyne.worker.v1 import worker_pb2_grpc as pb_grpc
from workers.host.device import available_cores, open_device
from workers.host.identity import cpu_target
from workers.transport.errors import PeerFailed
from workers.transport.mesh import listen

if TYPE_CHECKING:
    from workers.host.spinning import Spinning
    from workers.service.server import WorkerService

_WATCH_S = 0.25
# The longest wait for the answers of requests in progress, and then for the streams that carry them.
_ANSWER_S = 1.0
_FLUSH_S = 1.0
# The process has then ended, if need be by force: a launcher kills it after 5 s, and then has no cause to report.
_END_S = 4.0
_SWITCH_S = 0.0005
_SERVER_OPTIONS = [
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 200),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.keepalive_permit_without_calls", 1),
]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(prog="python -m workers", description="One Heterodyne rank.")
    parser.add_argument("--bind", default="127.0.0.1:0", help="host:port or [ipv6]:port; port 0 takes a free one")
    parser.add_argument("--device", default="cpu", help="cpu or cuda:N")
    parser.add_argument("--threads", type=int, default=available_cores(), help="threads that compute, on cpu")
    parser.add_argument("--epoch", type=int, default=1, help="incarnation number of the replica")
    parser.add_argument("--parent-pid", type=int, help="die with this process, which must be the parent")
    parser.add_argument("--name", default="", help="what the cluster file calls this worker, for its log")
    parser.add_argument("--log-format", choices=("text", "json"), default="text", help="json: an object a line")
    parser.add_argument("--log-level", choices=LEVELS, default="info", help="the least important lines to log")
    return parser.parse_args(argv)


def end_within(timeout_s: float, say: Callable[[str], None]) -> None:
    """Ends this process after ``timeout_s``, whatever its threads do, with exit code 1 and the names of busy threads.

    Python itself would wait for threads that compute, such as for a step that hangs.
    """

    def end() -> None:
        try:
            faulthandler.dump_traceback()
            names = sorted({thread.name for thread in threading.enumerate()} - {timer.name})
            say(f"error: not ended {timeout_s:g} s after it was to stop: {', '.join(names)} still at work")
        finally:
            os._exit(1)

    timer = threading.Timer(timeout_s, end)
    timer.daemon = True
    timer.start()
    # The kernel's clock runs on where a thread keeps the interpreter's lock, or nobody reads what is printed.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, timeout_s + 0.5)


def source_of(args: argparse.Namespace) -> str:
    """Returns the name under which this worker logs."""
    return f"worker {args.name}" if args.name else "worker"


async def serve(args: argparse.Namespace) -> int:
    """Listens until it is told to stop. Returns the exit code."""
    cpu_target()
    # Here, since kernels look at the target when they are imported, and would end this process with a traceback.
    from workers.host.spinning import Spinning
    from workers.service.server import WorkerService

    device = open_device(args.device, args.threads)
    with _listen(args.bind) as listener:
        service = WorkerService(device=device, epoch=args.epoch, listener=listener)
        return await _serve(args, service, listener, Spinning(args.threads))


def _listen(bind: str) -> socket.socket:
    """Opens the socket that other ranks of the replica connect to, on the same interface."""
    try:
        return listen(bind.rpartition(":")[0].strip("[]"))
    except OSError as error:
        raise _not_listened_on(bind) from error


def _not_listened_on(bind: str) -> InvalidConfig:
    fix = "Choose a free port of this host."
    return InvalidConfig(field="--bind", value=bind, problem="cannot be listened on", fix=fix)


async def _serve(
    args: argparse.Namespace, service: "WorkerService", listener: socket.socket, spinning: "Spinning"
) -> int:
    server = grpc.aio.server(options=_SERVER_OPTIONS)
    pb_grpc.add_WorkerServicer_to_server(service, server)
    host = args.bind.rpartition(":")[0]
    try:
        port = server.add_insecure_port(args.bind)
    except RuntimeError as error:
        raise _not_listened_on(args.bind) from error
    await server.start()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    listening = Listening(
        address=f"{host}:{port}",
        ranks_port=listener.getsockname()[1],
        pid=os.getpid(),
        target=service.target,
    )
    print(listening.line(), flush=True)
    code = await _watch(service, stop, args.parent_pid, spinning)
    say = partial(last_words, source=source_of(args), as_record=args.log_format == "json")
    end_within(_END_S, say)
    failure = service.failure
    await service.stop(_ANSWER_S)
    await server.stop(_FLUSH_S)
    service.close()
    if failure is not None:  # the last line, so that the launcher can name the cause
        if isinstance(failure, PeerFailed):
            say(f"lost {failure}")
            return PEER_LOST_EXIT_CODE
        say(f"engine failed: {cause_of(failure)}")
    return code


async def _watch(service: "WorkerService", stop: asyncio.Event, parent_pid: int | None, spinning: "Spinning") -> int:
    while not stop.is_set():
        spinning.look()
        if service.failure is not None:
            return 1
        if parent_pid is not None and os.getppid() != parent_pid:
            return 1
        try:
            await asyncio.wait_for(stop.wait(), _WATCH_S)
        except TimeoutError:
            continue
    return 0


def main() -> int:
    """Runs the worker."""
    args = parse()
    # The loop that streams tokens waits at most this long for the interpreter, while a busy engine holds it.
    sys.setswitchinterval(_SWITCH_S)
    if args.log_format == "json":
        log_to_parent(source_of(args), level=args.log_level)
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
        log_to(handler, level=args.log_level)
    if args.parent_pid is not None:
        die_with_parent(args.parent_pid)
    try:
        return asyncio.run(serve(args))
    except FieldError as error:
        last_words(f"error: {error}", source=source_of(args), as_record=args.log_format == "json")
        return 2


if __name__ == "__main__":
    sys.exit(main())
