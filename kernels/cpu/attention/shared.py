"""Decides which shared runs of tokens are attended to once for all their members (Juravsky et al. 2024, Hydragen).

A shared run's keys and values are read and packed once for every block of members instead of once for each member; the
arithmetic is the same. The price is a partial result, which is written and merged, for each member and part of the run.
"""

from collections.abc import Sequence
from dataclasses import replace

from kernels.attention import PartSpan, SequenceSpan, SharedSpan
from kernels.cpu.attention.tasks import MAX_QUERIES, PART, whole_parts

# A member's partial result costs as much as reading and packing so many tokens. Measured as the point where sharing
# breaks even on Zen 4 with one thread, KV in the third-level cache, and 2 to 16 members: 64 with G = 8 and D = 64, 50
# with G = 4 and D = 128, under 16 with G = 1, in float32 and bfloat16 alike. The plan does not know the model, and the
# little that sharing fewer tokens would gain at small G does not justify telling it.
PART_TOKENS = 64


def worthwhile(*, num_members: int, num_tokens: int) -> bool:
    """Tells whether sharing ``num_tokens``, in whole parts, takes less time than each member's reading them."""
    num_blocks = -(-num_members // MAX_QUERIES)
    num_parts = num_tokens // PART
    return (num_members - num_blocks) * num_tokens > num_members * num_parts * PART_TOKENS


def choose(
    spans: Sequence[SequenceSpan] | Sequence[PartSpan], shared: Sequence[SharedSpan], *, window: int | None = None
) -> tuple[SharedSpan, ...]:
    """Chooses the shared parts that save time. Their members are decodes that see all of them.

    Each member reads the rest of its tokens by itself.
    """
    chosen = []
    for offered in shared:
        first_seen = {index: _first_seen(spans[index], offered, window) for index in offered.members}
        members = tuple(
            index
            for index, first in first_seen.items()
            if spans[index].num_queries == 1 and whole_parts(offered, first) is not None
        )
        common = whole_parts(offered, max((first_seen[index] for index in members), default=0))
        if common is not None and worthwhile(num_members=len(members), num_tokens=common.num_tokens):
            chosen.append(replace(common, members=members))
    return tuple(chosen)


def _first_seen(span: SequenceSpan | PartSpan, common: SharedSpan, window: int | None) -> int:
    """Returns the position of the first token that the sequence's last token sees."""
    assert common.first_token + common.num_tokens <= span.num_tokens, (span, common)
    if isinstance(span, PartSpan):
        return int(span.seen[-1, 0])
    return 0 if window is None else max(0, span.num_tokens - window)
