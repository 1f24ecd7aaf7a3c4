"""Owns the command ``timeline``: writes the timeline of a service as a trace, and one request as a picture."""

import json
from pathlib import Path

from orchestrator.cli.client import fetch_status, one_line_errors, open_channel
from orchestrator.cli.output_file import write_output
from orchestrator.cli.request_picture import chosen_request, request_svg
from orchestrator.cli.timeline import trace
from placement.errors import InvalidConfig
from protos.heterodyne.v1 import admin_pb2, admin_pb2_grpc


def write_timeline(
    address: str,
    output: Path,
    *,
    last_s: float | None = None,
    picture: Path | None = None,
    request_id: str | None = None,
    timeout_s: float = 10.0,
) -> str:
    """Writes the trace to ``output``. Returns what was written, in a line each for the user.

    Args:
        last_s: how long ago requests and steps may have ended; None: as long as the service remembers.
        picture: where one request is drawn, if it is; ``request_id`` says which, and where it is None the last is.

    Raises:
        ServiceError: refused, unreachable, no answer within ``timeout_s``, or no such request to draw.
        InvalidConfig: a file cannot be written, or a request is given and no picture.
    """
    if request_id is not None and picture is None:
        fix = "Add --svg FILE, or leave out --request."
        raise InvalidConfig(field="--request", value=request_id, problem="is drawn only with --svg", fix=fix)
    timeline = fetch_timeline(address, last_s=last_s, timeout_s=timeout_s)
    write_output(output, json.dumps(trace(timeline)), field="OUTPUT.json")
    num_forgotten = timeline.forgotten_requests + timeline.forgotten_steps
    older = f" ({num_forgotten} older ones are forgotten)" if num_forgotten else ""
    held = f"{len(timeline.requests)} requests and {len(timeline.steps)} steps{older}"
    said = f"{held} in {output}: open it at https://ui.perfetto.dev"
    if picture is None:
        return said
    drawn = chosen_request(timeline, request_id)
    svg = request_svg(timeline, fetch_status(address, timeout_s=timeout_s), drawn.request_id)
    write_output(picture, svg, field="--svg")
    return f"{said}\nwho did what for request {drawn.request_id} in {picture}"


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
