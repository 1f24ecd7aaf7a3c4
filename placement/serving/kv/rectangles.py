"""Decides which rank sends which keys and values, where a sequence moves between replicas that are cut differently.

What a rank holds of a sequence is a set of rectangles: layers times KV heads times tokens. The two replicas may differ
in each of the three: in stages of layers, in shares of KV heads, and in stripes of tokens. A rank sends another the
intersection of what it holds with what the other lacks. Both replicas compute the same plan from the parts of all
ranks, so they need not tell each other of it.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from placement.errors import InvalidRequest
from placement.model.part import Part, Span
from placement.model.striping import Stripe

Spans = Sequence[Span]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rectangle:
    """The keys and values of some layers, KV heads and tokens of a sequence. It is empty where one of its spans is.

    Attributes:
        layers: layers of the model.
        kv_heads: KV heads of the model.
        tokens: positions in the sequence.
    """

    layers: Span
    kv_heads: Span
    tokens: Span

    @property
    def size(self) -> int:
        """Counts the pairs of a key and a value."""
        return len(self.layers) * len(self.kv_heads) * len(self.tokens)

    def intersection(self, other: "Rectangle") -> "Rectangle":
        """Returns what both have in common, which may be empty."""
        return Rectangle(
            layers=_overlap(self.layers, other.layers),
            kv_heads=_overlap(self.kv_heads, other.kv_heads),
            tokens=_overlap(self.tokens, other.tokens),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RankTransfer:
    """A rectangle that one rank of the source replica sends one rank of the target replica. It is never empty."""

    source: int
    target: int
    rectangle: Rectangle


def token_spans(stripe: Stripe | None, tokens: Span) -> tuple[Span, ...]:
    """Lists the runs of positions in ``tokens`` that a rank with that stripe holds, in order; None: it holds all.

    Runs that touch are one run.
    """
    if stripe is None or stripe.width == stripe.block_size:
        return (tokens,) if tokens else ()
    if not stripe.width:
        return ()
    size = stripe.block_size
    starts = range(tokens.start // size * size, tokens.stop, size)
    cut = (_overlap(Span(start + stripe.start, start + stripe.stop), tokens) for start in starts)
    return tuple(span for span in cut if span)


def held_rectangles(part: Part, tokens: Span) -> tuple[Rectangle, ...]:
    """Lists what a rank holds of those tokens of a sequence, in the order of tokens; it may be nothing."""
    if not part.layers or not part.kv_heads:
        return ()
    spans = token_spans(part.stripe, tokens)
    return tuple(Rectangle(layers=part.layers, kv_heads=part.kv_heads, tokens=span) for span in spans)


def common_layers(source: Part, target: Part, tokens: Span) -> Span:
    """Returns the layers of which a source rank has some of ``tokens`` that a target rank holds too; it may be empty.

    Both ranks exchange a message of each of these layers for every portion of the tokens, even where it is empty, so
    that the target knows what has come.
    """
    layers = _overlap(source.layers, target.layers)
    first = first_period([source, target], tokens)
    tokens_alike = _common(token_spans(source.stripe, first), token_spans(target.stripe, first))
    if not _overlap(source.kv_heads, target.kv_heads) or not tokens_alike:
        return Span(layers.start, layers.start)
    return layers


def first_period(parts: Iterable[Part], tokens: Span) -> Span:
    """Returns the leading ones of ``tokens``, after which it recurs which of the parts hold which tokens."""
    period = math.lcm(*(part.stripe.block_size for part in parts if part.stripe is not None))
    return Span(tokens.start, min(tokens.stop, tokens.start + period))


def transfer_plan(
    source_parts: Sequence[Part], target_parts: Sequence[Part], num_tokens: int, first_token: int = 0
) -> list[RankTransfer]:
    """Lists who sends what, so that each target rank gets all that it holds of a sequence, every number exactly once.

    What several source ranks hold is sent by each of them in equal portions of consecutive tokens. The list takes
    O(num_tokens / block size) transfers for each pair of ranks where either has a stripe, and is short otherwise.

    Args:
        source_parts: the part of each rank of the replica that has the keys and values.
        target_parts: the part of each rank of the replica that gets them.
        num_tokens: the leading tokens of the sequence whose keys and values the target needs.
        first_token: the target has those of the tokens before this one already.

    Returns:
        the transfers by target rank, then by layers, KV heads and tokens.

    Raises:
        InvalidRequest: no source rank holds something that a target rank needs.
    """
    if first_token >= num_tokens:
        return []
    wanted = Span(first_token, num_tokens)
    held = {part.stripe: token_spans(part.stripe, wanted) for part in source_parts}
    holders = {
        rank: _Holder(layers=part.layers, kv_heads=part.kv_heads, tokens=held[part.stripe])
        for rank, part in enumerate(source_parts)
        if part.kv_heads and held[part.stripe]
    }
    transfers: list[RankTransfer] = []
    for target, part in enumerate(target_parts):
        needed = token_spans(part.stripe, wanted)
        if needed:
            transfers += _transfers_to(target, part, needed, holders)
    return transfers


@dataclass(frozen=True, slots=True, kw_only=True)
class _Holder:
    """What a source rank holds of the tokens that the target lacks."""

    layers: Span
    kv_heads: Span
    tokens: tuple[Span, ...]


def _transfers_to(target: int, part: Part, needed: Spans, holders: Mapping[int, _Holder]) -> Iterator[RankTransfer]:
    """Yields the transfers that a target rank gets. Raises InvalidRequest."""
    for layers in _cut(part.layers, (holder.layers for holder in holders.values())):
        with_layers = {rank: holder for rank, holder in holders.items() if _contains(holder.layers, layers)}
        for heads in _cut(part.kv_heads, (holder.kv_heads for holder in with_layers.values())):
            tokens = {rank: it.tokens for rank, it in with_layers.items() if _contains(it.kv_heads, heads)}
            dealt = _deal(needed, tokens, turn=target)
            if sum(len(span) for _, span in dealt) < sum(map(len, needed)):
                raise InvalidRequest(
                    field="source_parts",
                    value=f"layers {layers}, KV heads {heads}",
                    problem=f"do not hold all tokens that rank {target} of the target needs",
                    fix="Give the parts of all ranks of the replica that has the sequence.",
                )
            for source, span in dealt:
                rectangle = Rectangle(layers=layers, kv_heads=heads, tokens=span)
                yield RankTransfer(source=source, target=target, rectangle=rectangle)


def _deal(needed: Spans, holders: Mapping[int, Spans], *, turn: int) -> list[tuple[int, Span]]:
    """Gives each of the needed tokens to one of the ranks that hold it, by tokens.

    Args:
        needed: runs of tokens, in order; ``holders`` has those that each rank holds.
        turn: which of the ranks that hold the same tokens begins.
    """
    owned = {rank: _common(needed, spans) for rank, spans in holders.items()}
    if len(owned) == 1:
        return [(rank, span) for rank, spans in owned.items() for span in spans]
    same_holders: dict[tuple[int, ...], list[Span]] = {}
    for span, ranks in _by_holders(owned):
        same_holders.setdefault(ranks, []).append(span)
    dealt = [
        (ranks[(turn + index) % len(ranks)], span)
        for ranks, spans in same_holders.items()
        for index, portion in enumerate(_portions(spans, len(ranks)))
        for span in portion
    ]
    return sorted(dealt, key=lambda transfer: transfer[1].start)


def _by_holders(owned: Mapping[int, Spans]) -> Iterator[tuple[Span, tuple[int, ...]]]:
    """Yields the runs of tokens that the same ranks hold, in order, each with those ranks."""
    starts = [(span.start, True, rank) for rank, spans in owned.items() for span in spans]
    stops = [(span.stop, False, rank) for rank, spans in owned.items() for span in spans]
    active: set[int] = set()
    before = 0
    for edge, is_start, rank in sorted(starts + stops):  # at the same token, stops come first
        if active and edge > before:
            yield Span(before, edge), tuple(sorted(active))
        before = edge
        (active.add if is_start else active.remove)(rank)


def _portions(spans: Sequence[Span], count: int) -> Iterator[list[Span]]:
    """Cuts runs of tokens into ``count`` portions, which differ by one token at most."""
    total = sum(map(len, spans))
    rest = list(reversed(spans))
    for index in range(count):
        left = total * (index + 1) // count - total * index // count
        portion: list[Span] = []
        while left:
            span = rest.pop()
            taken = Span(span.start, min(span.start + left, span.stop))
            if taken.stop < span.stop:
                rest.append(Span(taken.stop, span.stop))
            portion.append(taken)
            left -= len(taken)
        yield portion


def _common(spans: Spans, others: Spans) -> Spans:
    """Returns the runs of tokens that are in both, where each has its own in order and apart."""
    result: list[Span] = []
    i = j = 0
    while i < len(spans) and j < len(others):
        both = _overlap(spans[i], others[j])
        if both:
            result.append(both)
        if spans[i].stop <= others[j].stop:
            i += 1
        else:
            j += 1
    return result


def _cut(span: Span, others: Iterable[Span]) -> Iterator[Span]:
    """Cuts a span wherever one of the others starts or stops."""
    edges = {edge for other in others for edge in (other.start, other.stop) if span.start < edge < span.stop}
    if span:
        yield from (Span(start, stop) for start, stop in pairwise(sorted({span.start, *edges, span.stop})))


def _contains(span: Span, inner: Span) -> bool:
    return span.start <= inner.start and inner.stop <= span.stop


def _overlap(span: Span, other: Span) -> Span:
    """Returns what both have in common; it is empty where that is nothing."""
    start = max(span.start, other.start)
    return Span(start, max(start, min(span.stop, other.stop)))
