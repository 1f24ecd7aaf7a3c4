"""Draws a plan as an SVG: who holds what. Pure.

A replica is a block as high as its layers; a stage a band of it; a rank a box as wide as its share of the stage's
weights of a layer, or, where ranks share sequences, of the tokens. What a rank holds is written in its box, or beside
the pointer where there is no room.
"""

from collections.abc import Sequence
from xml.etree import ElementTree

from placement.model.specs import ModelSpec
from placement.planning.memory import format_bytes
from placement.planning.plan import Plan, Replica, Shard, Stage

_WIDTH, _MARGIN, _TITLE, _GAP = 960, 16, 44, 28
_BAND, _LEAST_BAND = 320, 76
_LINE, _CHAR = 16, 7.2
_COLOURS = ("#4e79a7", "#f28e2b", "#59a14f", "#b07aa1", "#e15759", "#76b7b2", "#9c755f", "#edc948")
_SVG = "http://www.w3.org/2000/svg"


def plan_svg(plan: Plan) -> str:
    """Returns the picture as the text of an SVG file."""
    heights = [_height(replica, plan.model) for replica in plan.replicas]
    height = _TITLE + sum(heights) + _GAP * len(heights) + _MARGIN
    root = ElementTree.Element("svg", {"xmlns": _SVG, "viewBox": f"0 0 {_WIDTH} {height}", "font-family": "sans-serif"})
    ElementTree.SubElement(root, "rect", {"width": "100%", "height": "100%", "fill": "white"})
    model = plan.model
    heads = f"{model.num_heads} heads over {model.num_kv_heads} KV heads"
    title = f"{model.architecture}: {model.num_layers} layers, {heads}, {plan.dtype.value}"
    _text(root, _MARGIN, 26, title, size=15)
    top = _TITLE
    for replica in plan.replicas:
        top = _draw_replica(root, plan, replica, top) + _GAP
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode") + "\n"


def _height(replica: Replica, model: ModelSpec) -> int:
    return _LINE + sum(_band(stage, model) for stage in replica.stages)


def _band(stage: Stage, model: ModelSpec) -> int:
    return max(_LEAST_BAND, _BAND * len(stage.layers) // model.num_layers)


def _draw_replica(root: ElementTree.Element, plan: Plan, replica: Replica, top: int) -> int:
    tokens = replica.num_kv_tokens
    _text(root, _MARGIN, top + 10, f"{replica.name}: {len(replica.shards)} ranks, {tokens} tokens of KV", size=13)
    top += _LINE
    for stage in replica.stages:
        height = _band(stage, plan.model)
        _draw_stage(root, plan, stage, top, height)
        top += height
    return top


def _draw_stage(root: ElementTree.Element, plan: Plan, stage: Stage, top: int, height: int) -> None:
    left, room = float(_MARGIN), _WIDTH - 2 * _MARGIN
    for shard, share in zip(stage.shards, shares(stage), strict=True):
        width = share * room
        box = ElementTree.SubElement(root, "g")
        lines = describe(shard, plan.model)
        ElementTree.SubElement(box, "title").text = "\n".join(lines)
        look = {"fill": _COLOURS[shard.rank % len(_COLOURS)], "fill-opacity": "0.35", "stroke": "white"}
        place = {"x": f"{left:.1f}", "y": str(top), "width": f"{max(width, 1):.1f}", "height": str(height)}
        ElementTree.SubElement(box, "rect", look | place)
        for at, line in enumerate(lines):
            if len(line) * _CHAR < width and (at + 1) * _LINE < height:
                _text(box, left + 6, top + (at + 1) * _LINE, line)
        left += width


def shares(stage: Stage) -> tuple[float, ...]:
    """Returns the part that each rank has of the stage's weights, or, where ranks share sequences, of the tokens."""
    stripes = [shard.part.stripe for shard in stage.shards if shard.part.stripe is not None]
    if stripes:
        return tuple(stripe.share for stripe in stripes)
    weights = [max(shard.weight_bytes, 1) for shard in stage.shards]
    return tuple(weight / sum(weights) for weight in weights)


def describe(shard: Shard, model: ModelSpec) -> Sequence[str]:
    """Says in a few lines what a rank holds."""
    part = shard.part
    lines = [
        f"rank {shard.rank}: {shard.device.name} of {shard.node}",
        f"layers {part.layers.start} to {part.layers.stop - 1}",
        f"KV heads {_some(part.kv_heads.start, part.kv_heads.stop, model.num_kv_heads)}",
        f"FFN columns {_some(part.ffn_columns.start, part.ffn_columns.stop, model.ffn_size)}",
    ]
    if part.stripe is not None:
        lines.append(f"tokens {_some(part.stripe.start, part.stripe.stop, part.stripe.block_size)} of a block")
    if len(part.vocab_rows):
        lines.append(f"vocabulary {_some(part.vocab_rows.start, part.vocab_rows.stop, model.vocab_size)}")
    return [*lines, f"weights {format_bytes(shard.weight_bytes)}, KV {format_bytes(shard.kv_bytes)}"]


def _some(start: int, stop: int, of: int) -> str:
    if stop == start:
        return "none"
    return f"all {of}" if stop - start == of else f"{start} to {stop - 1} of {of}"


def _text(parent: ElementTree.Element, x: float, y: int, text: str, size: int = 12) -> None:
    where = {"x": f"{x:.1f}", "y": str(y), "font-size": str(size), "fill": "#222"}
    ElementTree.SubElement(parent, "text", where).text = text
