"""Draws who did what, and when, for one request, as an SVG. Pure.

Time runs from left to right. The gateway has a lane, each rank of the replicas that computed the request has one, and
so have the keys and values on their way and each attention worker. All ranks of a replica compute each of its steps
together, so a step stands in the lanes of all, and in those of the attention workers; beside each lane is written what
part of it is the rank's. A step is drawn where its time overlaps the request's, also where it computed tokens of other
requests.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from xml.etree import ElementTree

from orchestrator.errors import ServiceError
from protos.heterodyne.v1 import admin_pb2

_WIDTH, _MARGIN, _LABEL, _TITLE, _AXIS = 1080, 16, 300, 64, 36
_LANE, _BAR = 42, 24
_ROOM = _WIDTH - 2 * _MARGIN - _LABEL
_CHAR = 6.2
_SVG = "http://www.w3.org/2000/svg"
_COLOURS = {
    "queue": "#bab0ac", "prefill": "#4e79a7", "kv_transfer": "#76b7b2", "exposed": "#e15759", "mixed": "#b07aa1",
    "decode": "#f28e2b", "attention": "#59a14f",
}  # fmt: skip
_LEGEND = {
    "queue": "waits", "prefill": "prompt", "kv_transfer": "keys and values, hidden", "exposed": "not hidden",
    "mixed": "prompt and answer", "decode": "answer", "attention": "attention",
}  # fmt: skip
_MOST_TICKS = 9


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """Something that somebody did, in seconds from the arrival of the request.

    Attributes:
        kind: what it was; it gives the bar its colour.
        words: what is written where the pointer rests on it, and in it where there is room.
    """

    kind: str
    start_s: float
    stop_s: float
    words: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lane:
    """Who did something for the request.

    Attributes:
        who: its name.
        part: what part of the work is its own.
    """

    who: str
    part: str
    bars: tuple[Bar, ...]


def chosen_request(timeline: admin_pb2.GetTimelineResponse, request_id: str | None = None) -> admin_pb2.RequestTiming:
    """Returns the request of this id, or the last one that ended.

    Raises:
        ServiceError: the service remembers no such request.
    """
    for request in reversed(timeline.requests):
        if request_id in (None, request.request_id):
            return request
    which = "no request that has ended" if request_id is None else f"no request {request_id!r} that has ended"
    raise ServiceError(code="NOT_FOUND", message=f"the service remembers {which}; send one first")


def lanes(
    request: admin_pb2.RequestTiming, timeline: admin_pb2.GetTimelineResponse, status: admin_pb2.GetStatusResponse
) -> list[Lane]:
    """Returns who did what for the request: the gateway, those with the prompt, the transfer, those with the answer."""
    replicas = {replica.name: replica for replica in status.replicas}
    queued_s = min(request.total_s, request.queue_s) if request.HasField("queue_s") else request.total_s
    found: list[Lane] = []
    if request.HasField("prefill_replica"):
        found += _ranks(replicas.get(request.prefill_replica), request.prefill_replica, request, timeline)
        found.append(_transfer(request, queued_s, found[0].bars))
    found += _ranks(replicas.get(request.replica), request.replica, request, timeline)
    found += _attention(status.attention, found[-1].bars)
    # Steps are timed by whoever hears of them, and a wait by whoever ends it: a step that begins ends the wait.
    begun_s = min((bar.start_s for lane in found for bar in lane.bars), default=queued_s)
    queue = Bar(kind="queue", start_s=0.0, stop_s=min(queued_s, begun_s), words="queue")
    return [Lane(who="gateway", part="binds the request, streams its answer", bars=(queue,)), *found]


def _attention(workers: admin_pb2.ReplicaStatus, steps: Sequence[Bar]) -> Iterator[Lane]:
    """Yields a lane for each attention worker, which has a part in every step of the answer."""
    bars = tuple(replace(bar, kind="attention", words="attends") for bar in steps)
    for rank in workers.ranks:
        at = f"{rank.worker} on {rank.node}" if rank.worker else rank.node
        yield Lane(who=at, part=f"attends: {rank.holds}", bars=bars)


def _transfer(request: admin_pb2.RequestTiming, queued_s: float, prompt: Sequence[Bar]) -> Lane:
    """Returns the lane of the keys and values, which go layer by layer while the prompt is computed."""
    begun_s = prompt[0].start_s if prompt else queued_s
    sent_s = prompt[-1].stop_s if prompt else queued_s + request.prefill_s
    bars = [Bar(kind="kv_transfer", start_s=begun_s, stop_s=sent_s, words="layer by layer, while they are computed")]
    if request.exposed_s:
        words, stop_s = f"{request.exposed_s * 1e3:.1f} ms not hidden", min(request.total_s, sent_s + request.exposed_s)
        bars.append(Bar(kind="exposed", start_s=sent_s, stop_s=stop_s, words=words))
    return Lane(who="keys and values", part=f"{request.prefill_replica} to {request.replica}", bars=tuple(bars))


def _ranks(
    replica: admin_pb2.ReplicaStatus | None,
    name: str,
    request: admin_pb2.RequestTiming,
    timeline: admin_pb2.GetTimelineResponse,
) -> Iterator[Lane]:
    """Yields a lane for each rank; one for all where the replica is known no longer."""
    bars = tuple(_steps(name, request, timeline.steps))
    if replica is None or not replica.ranks:
        yield Lane(who=name, part="", bars=bars)
        return
    for rank in replica.ranks:
        at = f"{rank.worker} on {rank.node}" if rank.worker else rank.node
        yield Lane(who=at, part=", ".join((f"{name} rank {rank.rank}", *_parts(replica, rank))), bars=bars)


def _parts(replica: admin_pb2.ReplicaStatus, rank: admin_pb2.RankStatus) -> Iterator[str]:
    """Yields what part of a step is a rank's own, where others have the rest."""
    if rank.HasField("token_share"):
        yield f"{rank.token_share:.0%} of the tokens"
        return
    stages = {(other.first_layer, other.last_layer) for other in replica.ranks}
    if len(stages) > 1:
        yield f"layers {rank.first_layer} to {rank.last_layer - 1}"
    peers = [other for other in replica.ranks if other.first_layer == rank.first_layer]
    if len(peers) > 1 and rank.HasField("num_kv_heads"):
        yield f"KV heads {rank.num_kv_heads} of {sum(other.num_kv_heads for other in peers)}"
    columns = sum(other.num_ffn_columns for other in peers)
    if len(peers) > 1 and columns:
        yield f"{rank.num_ffn_columns / columns:.0%} of FFN"


def _steps(name: str, request: admin_pb2.RequestTiming, steps: Sequence[admin_pb2.StepTiming]) -> Iterator[Bar]:
    """Yields the steps of a replica during the request, in its seconds; none begins before the last one ended."""
    before_s = 0.0
    for step in steps:
        stop_s = (step.ended_ns - request.arrived_ns) / 1e9
        start_s = max(before_s, stop_s - step.duration_s)
        if step.replica != name or stop_s <= 0 or start_s >= request.total_s:
            continue
        stop_s = min(max(start_s, stop_s), request.total_s)
        yield Bar(kind=_kind(step), start_s=start_s, stop_s=stop_s, words=_step_words(step))
        before_s = stop_s


def _kind(step: admin_pb2.StepTiming) -> str:
    if step.num_decodes == step.num_tokens:
        return "decode"
    return "mixed" if step.num_decodes else "prefill"


def _step_words(step: admin_pb2.StepTiming) -> str:
    tokens = f"{step.num_tokens} token{'s' if step.num_tokens != 1 else ''}"
    return f"{tokens}, {step.duration_s * 1e3:.0f} ms"


def request_svg(
    timeline: admin_pb2.GetTimelineResponse, status: admin_pb2.GetStatusResponse, request_id: str | None = None
) -> str:
    """Returns the picture of one request as the text of an SVG file.

    Args:
        request_id: which one; None: the last one that ended.

    Raises:
        ServiceError: the service remembers no such request.
    """
    request = chosen_request(timeline, request_id)
    drawn = lanes(request, timeline, status)
    height = _TITLE + _LANE * len(drawn) + _AXIS
    root = ElementTree.Element("svg", {"xmlns": _SVG, "viewBox": f"0 0 {_WIDTH} {height}", "font-family": "sans-serif"})
    ElementTree.SubElement(root, "rect", {"width": "100%", "height": "100%", "fill": "white"})
    size = f"{request.prompt_tokens} prompt tokens, {request.completion_tokens} generated"
    _text(root, _MARGIN, 24, f"{timeline.model}: request {request.request_id}, {size}, {_ms(request.total_s)}", size=15)
    _draw_legend(root, drawn)
    scale = _ROOM / max(request.total_s, 1e-9)
    _draw_axis(root, request.total_s, _TITLE, _TITLE + _LANE * len(drawn), scale)
    for at, lane in enumerate(drawn):
        _draw_lane(root, lane, _TITLE + at * _LANE, scale)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode") + "\n"


def _draw_legend(root: ElementTree.Element, drawn: Sequence[Lane]) -> None:
    used = {bar.kind for lane in drawn for bar in lane.bars}
    left = float(_MARGIN + _LABEL)
    for kind in (kind for kind in _COLOURS if kind in used):
        _rect(root, left, 38, 12, 12, _COLOURS[kind])
        _text(root, left + 17, 48, _LEGEND[kind])
        left += 17 + _CHAR * len(_LEGEND[kind]) + 24


def _draw_axis(root: ElementTree.Element, total_s: float, top: int, bottom: int, scale: float) -> None:
    for at_s in ticks(total_s):
        x = _MARGIN + _LABEL + at_s * scale
        line = {"x1": f"{x:.1f}", "x2": f"{x:.1f}", "y1": str(top), "y2": str(bottom), "stroke": "#ddd"}
        ElementTree.SubElement(root, "line", line)
        words = _ms(at_s)
        _text(root, min(x, _WIDTH - _MARGIN - _CHAR * len(words)), bottom + 18, words)


def ticks(total_s: float) -> list[float]:
    """Returns round times from 0 up to ``total_s``: few, and evenly spaced."""
    digits = math.floor(math.log10(max(total_s, 1e-6) / _MOST_TICKS))
    sizes = (factor * 10.0 ** (digits + more) for more in (0, 1) for factor in (1, 2, 5))
    size = next(size for size in sizes if total_s / size <= _MOST_TICKS)
    return [size * number for number in range(int(total_s / size) + 1)]


def _draw_lane(root: ElementTree.Element, lane: Lane, top: int, scale: float) -> None:
    _text(root, _MARGIN, top + 17, lane.who, size=13)
    _text(root, _MARGIN, top + 32, lane.part, size=11)
    for bar in lane.bars:
        left, width = _MARGIN + _LABEL + bar.start_s * scale, max((bar.stop_s - bar.start_s) * scale, 0.4)
        drawn = ElementTree.SubElement(root, "g")
        ElementTree.SubElement(drawn, "title").text = f"{bar.words} ({_ms(bar.start_s)} to {_ms(bar.stop_s)})"
        _rect(drawn, left, top + (_LANE - _BAR) / 2, width, _BAR, _COLOURS[bar.kind])
        if len(bar.words) * _CHAR < width:
            _text(drawn, left + 4, top + _LANE // 2 + 4, bar.words, size=11)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.0f} ms"


def _rect(parent: ElementTree.Element, x: float, y: float, width: float, height: float, colour: str) -> None:
    place = {"x": f"{x:.1f}", "y": f"{y:.1f}", "width": f"{width:.1f}", "height": f"{height:.1f}"}
    look = {"fill": colour, "fill-opacity": "0.55", "stroke": "white", "stroke-width": "0.4"}
    ElementTree.SubElement(parent, "rect", place | look)


def _text(parent: ElementTree.Element, x: float, y: float, text: str, size: int = 12) -> None:
    where = {"x": f"{x:.1f}", "y": f"{y:g}", "font-size": str(size), "fill": "#222"}
    ElementTree.SubElement(parent, "text", where).text = text
