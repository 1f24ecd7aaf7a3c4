"""Owns the command ``timeline``: asks a service for its timeline and writes it as a trace."""

import json
from pathlib import Path

from orchestrator.cli.client import one_line_errors, open_channel
from orchestrator.cli.output_file import write_output
from orchestrator.cli.timeline import trace
from protos.heterodyne.v1 import admin_pb2, admin_pb2_grpc


def write_timeline(address: str, output: Path, *, last_s: float | None = None, timeout_s: float = 10.0) -> str:
    """Writes the trace to ``output``. Returns what it holds, in one line for the user.

    Args:
        last_s: how long ago requests and steps may have ended; None: as long as the service remembers.

    Raises:
        ServiceError: refused, unreachable, or no answer within ``timeout_s``.
        InvalidConfig: ``output`` cannot be written.
    """
    timeline = fetch_timeline(address, last_s=last_s, timeout_s=timeout_s)
    write_output(output, json.dumps(trace(timeline)), field="OUTPUT.json")
    num_forgotten = timeline.forgotten_requests + timeline.forgotten_steps
    older = f" ({num_forgotten} older ones are forgotten)" if num_forgotten else ""
    held = f"{len(timeline.requests)} requests and {len(timeline.steps)} steps{older}"
    return f"{held} in {output}: open it at https://ui.perfetto.dev"


def fetch_timeline(
    address: str, *, last_s: float | None = None, timeout_s: float = 10.0
) -> admin_pb2.GetTimelineResponse:
    """Asks a service for its latest requests and steps.

    Raises:
        ServiceError: refused, unreachable, or no answer within ``timeout_s``.
    """
    with open_channel(address) as channel, one_line_errors(address, timeout_s):
        request = admin_pb2.GetTimelineRequest(last_s=last_s)
        return admin_pb2_grpc.AdminStub(channel).GetTimeline(request, timeout=timeout_s)
