"""Draws a plan as an SVG: who holds what. Pure.

A replica is a block as high as its layers; a stage a band of it; a rank a box as wide as its share of the stage's
weights of a layer, or, where ranks share sequences, of the tokens. What a rank holds is written in its box, or below
the band where the box has no room for all of it. Attention workers are a band below the replicas that share them, each
as wide as its share of the keys and values.
"""

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

from orchestrator.deployment.role_lines import own_dtype, role_word
from placement.model.specs import ModelSpec
from placement.planning.held import held
from placement.planning.memory import format_bytes
from placement.planning.plan import Plan, Replica, Shard, Stage

_WIDTH, _MARGIN, _TITLE, _GAP = 960, 16, 44, 28
_BAND, _LEAST_BAND = 200, 76
_WORKERS_BAND = 92
_LINE, _CHAR, _SWATCH = 16, 6.6, 12
_COLOURS = ("#4e79a7", "#f28e2b", "#59a14f", "#b07aa1", "#e15759", "#76b7b2", "#9c755f", "#edc948")
_SVG = "http://www.w3.org/2000/svg"
_ROOM = _WIDTH - 2 * _MARGIN
_NOTE_CHARACTERS = int((_ROOM - 2 * _SWATCH) / _CHAR)

Where = Callable[[Shard], str]
"""Says on which machine a rank runs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Box:
    """A rank in its stage's band.

    Attributes:
        lines: what it holds.
        label: the lines that are written in the box.
        notes: the lines that are written below the band; none where the box holds all.
    """

    shard: Shard
    width: float
    lines: Sequence[str]
    label: Sequence[str]
    notes: Sequence[str]


def plan_svg(plan: Plan, where: Where = lambda shard: shard.node) -> str:
    """Returns the picture as the text of an SVG file."""
    replicas = [(replica, [_boxes(stage, plan.model, where) for stage in replica.stages]) for replica in plan.replicas]
    workers = _worker_boxes(plan, where)
    heights = [_height(replica, stages, plan.model) for replica, stages in replicas]
    heights += [_LINE + _WORKERS_BAND + _notes_height(workers)] if workers else []
    height = _TITLE + sum(heights) + _GAP * len(heights) + _MARGIN
    root = ElementTree.Element("svg", {"xmlns": _SVG, "viewBox": f"0 0 {_WIDTH} {height}", "font-family": "sans-serif"})
    ElementTree.SubElement(root, "rect", {"width": "100%", "height": "100%", "fill": "white"})
    model = plan.model
    heads = f"{model.num_heads} heads over {model.num_kv_heads} KV heads"
    title = f"{model.architecture}: {model.num_layers} layers, {heads}, {plan.dtype.value}"
    _text(root, _MARGIN, 26, title, size=15)
    top = _TITLE
    for replica, stages in replicas:
        top = _draw_replica(root, plan, replica, stages, top) + _GAP
    if workers:
        _text(root, _MARGIN, top + 10, _workers_title(plan), size=13)
        _draw_stage(root, workers, top + _LINE, _WORKERS_BAND)
        _draw_notes(root, workers, top + _LINE + _WORKERS_BAND)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode") + "\n"


def _boxes(stage: Stage, model: ModelSpec, where: Where) -> list[_Box]:
    pairs = zip(stage.shards, shares(stage), strict=True)
    return [
        _box(shard, describe(shard, model, where(shard)), share * _ROOM, _band(stage, model)) for shard, share in pairs
    ]


def _box(shard: Shard, lines: Sequence[str], width: float, height: int) -> _Box:
    """Writes what a rank holds in its box where there is room, and below where not."""
    fits = all(len(line) * _CHAR < width for line in lines) and (len(lines) + 1) * _LINE <= height
    short = [text for text in (shard.device.worker or f"rank {shard.rank}",) if len(text) * _CHAR < width]
    notes = [] if fits else textwrap.wrap("; ".join(lines), _NOTE_CHARACTERS)
    return _Box(shard=shard, width=width, lines=lines, label=lines if fits else short, notes=notes)


def _worker_boxes(plan: Plan, where: Where) -> list[_Box]:
    total = sum(shard.kv_bytes for shard in plan.attention)
    return [
        _box(shard, _worker_lines(plan, shard, where), shard.kv_bytes / total * _ROOM, _WORKERS_BAND)
        for shard in plan.attention
    ]


def _worker_lines(plan: Plan, shard: Shard, where: Where) -> list[str]:
    """Says in a few lines what an attention worker holds, and where it runs."""
    name = f": worker {shard.device.worker}" if shard.device.worker else ""
    place = f"{shard.device.name} of {where(shard)}"
    return [f"attention {shard.rank}{name}", place, *map(str, held(plan, shard)), f"KV {format_bytes(shard.kv_bytes)}"]


def _workers_title(plan: Plan) -> str:
    count = len(plan.attention)
    return f"attention workers: {count}, which hold keys and values and attend to them"


def _height(replica: Replica, stages: Sequence[Sequence[_Box]], model: ModelSpec) -> int:
    bands = sum(_band(stage, model) for stage in replica.stages)
    return _LINE + bands + sum(_notes_height(boxes) for boxes in stages)


def _notes_height(boxes: Sequence[_Box]) -> int:
    return sum(_LINE * len(box.notes) + (_LINE // 2 if box.notes else 0) for box in boxes)


def _band(stage: Stage, model: ModelSpec) -> int:
    return max(_LEAST_BAND, _BAND * len(stage.layers) // model.num_layers)


def _draw_replica(
    root: ElementTree.Element, plan: Plan, replica: Replica, stages: Sequence[Sequence[_Box]], top: int
) -> int:
    count = len(replica.shards)
    ranks = f"{count} rank{'s' if count > 1 else ''}"
    notes = [role_word(plan, replica), ranks, own_dtype(plan, replica), f"{replica.num_kv_tokens} tokens of KV"]
    _text(root, _MARGIN, top + 10, f"{replica.name}: {', '.join(note for note in notes if note)}", size=13)
    top += _LINE
    for stage, boxes in zip(replica.stages, stages, strict=True):
        height = _band(stage, plan.model)
        _draw_stage(root, boxes, top, height)
        _draw_notes(root, boxes, top + height)
        top += height + _notes_height(boxes)
    return top


def _draw_stage(root: ElementTree.Element, boxes: Sequence[_Box], top: int, height: int) -> None:
    left = float(_MARGIN)
    for box in boxes:
        drawn = ElementTree.SubElement(root, "g")
        ElementTree.SubElement(drawn, "title").text = "\n".join(box.lines)
        place = {"x": f"{left:.1f}", "y": str(top), "width": f"{max(box.width, 1):.1f}", "height": str(height)}
        ElementTree.SubElement(drawn, "rect", _look(box.shard) | place)
        for at, line in enumerate(box.label):
            _text(drawn, left + 6, top + (at + 1) * _LINE, line)
        left += box.width


def _draw_notes(root: ElementTree.Element, boxes: Sequence[_Box], top: int) -> None:
    for box in boxes:
        if not box.notes:
            continue
        top += _LINE // 2
        place = {"x": str(_MARGIN), "y": str(top + 3), "width": str(_SWATCH), "height": str(_SWATCH)}
        ElementTree.SubElement(root, "rect", _look(box.shard) | place)
        for line in box.notes:
            top += _LINE
            _text(root, _MARGIN + 1.5 * _SWATCH, top - 3, line)


def _look(shard: Shard) -> dict[str, str]:
    return {"fill": _COLOURS[shard.rank % len(_COLOURS)], "fill-opacity": "0.35", "stroke": "white"}


def shares(stage: Stage) -> tuple[float, ...]:
    """Returns the part that each rank has of the stage's weights, or, where ranks share sequences, of the tokens."""
    stripes = [shard.part.stripe for shard in stage.shards if shard.part.stripe is not None]
    if stripes:
        return tuple(stripe.share for stripe in stripes)
    weights = [max(shard.weight_bytes, 1) for shard in stage.shards]
    return tuple(weight / sum(weights) for weight in weights)


def describe(shard: Shard, model: ModelSpec, where: str) -> Sequence[str]:
    """Says in a few lines what a rank holds, and where it runs."""
    part = shard.part
    worker = f": worker {shard.device.worker}" if shard.device.worker else ""
    lines = [
        f"rank {shard.rank}{worker}",
        f"{shard.device.name} of {where}",
        f"layers {part.layers.start} to {part.layers.stop - 1}",
        f"KV heads {_some(part.kv_heads.start, part.kv_heads.stop, model.num_kv_heads)}",
        f"FFN columns {_some(part.ffn_columns.start, part.ffn_columns.stop, model.ffn_size)}",
    ]
    if part.stripe is not None:
        lines.append(f"tokens {_some(part.stripe.start, part.stripe.stop, part.stripe.block_size)} of a block")
    if len(part.vocab_rows):
        lines.append(f"vocabulary {_some(part.vocab_rows.start, part.vocab_rows.stop, model.vocab_size)}")
    kv = f"KV {format_bytes(shard.kv_bytes)}" if shard.num_blocks else "KV at attention workers"
    return [*lines, f"weights {format_bytes(shard.weight_bytes)}, {kv}"]


def _some(start: int, stop: int, of: int) -> str:
    if stop == start:
        return "none"
    if stop - start == of:
        return f"all {of}"
    return f"{start} to {stop - 1} of {of}" if stop - start > 1 else f"{start} of {of}"


def _text(parent: ElementTree.Element, x: float, y: int, text: str, size: int = 12) -> None:
    where = {"x": f"{x:.1f}", "y": str(y), "font-size": str(size), "fill": "#222"}
    ElementTree.SubElement(parent, "text", where).text = text
