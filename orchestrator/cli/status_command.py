"""Owns the command ``status``: once or again and again, as a table, as lines or as JSON."""

import json
import time
from collections.abc import Callable

from rich.console import Console
from rich.live import Live

from orchestrator.cli.client import fetch_status
from orchestrator.cli.render import print_status, status_table
from orchestrator.cli.status_document import status_document
from protos.heterodyne.v1 import admin_pb2

Fetch = Callable[[str], admin_pb2.GetStatusResponse]


def show_status(
    console: Console, address: str, *, as_json: bool, measured: bool = False, fetch: Fetch = fetch_status
) -> None:
    """Prints the status once. JSON always has what was ``measured`` at the start.

    Raises:
        ServiceError: the service does not answer.
    """
    status = fetch(address)
    if as_json:
        _print_json(console, status, indent=2)
    else:
        print_status(console, status, measured=measured)


def watch_status(
    console: Console,
    address: str,
    *,
    every_s: float,
    as_json: bool,
    fetch: Fetch = fetch_status,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Shows the status again every ``every_s`` seconds until Ctrl-C: in place on a terminal, else one below another.

    JSON comes as one document a line.

    Raises:
        ServiceError: the service no longer answers.
    """
    try:
        if as_json or not console.is_terminal:
            while True:
                status = fetch(address)
                if as_json:
                    _print_json(console, status, indent=None)
                else:
                    print_status(console, status)
                sleep(every_s)
        with Live(console=console, auto_refresh=False) as live:
            while True:
                live.update(status_table(console, fetch(address)), refresh=True)
                sleep(every_s)
    except KeyboardInterrupt:
        return


def _print_json(console: Console, status: admin_pb2.GetStatusResponse, *, indent: int | None) -> None:
    text = json.dumps(status_document(status), indent=indent)
    console.print(text, markup=False, highlight=False, soft_wrap=True, emoji=False)
    console.file.flush()
