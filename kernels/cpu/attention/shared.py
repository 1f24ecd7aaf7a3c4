"""Which shared runs of tokens are attended to once for all who share them (Juravsky et al. 2024, Hydragen).

A shared run's keys and values are read and laid out once for every block of members instead of once a member; the
arithmetic is the same. The price is a partial result, written and merged, for each member and part of the run.
"""

from collections.abc import Sequence
from dataclasses import replace

from kernels.attention import PartSpan, SequenceSpan, SharedSpan
from kernels.cpu.attention.tasks import MAX_QUERIES, PART, whole_parts

# A member's partial result costs as much as reading and laying out so many tokens. From where sharing breaks even on
# Zen 4, one thread, KV in the third-level cache, 2 to 16 members: 64 with G = 8 and D = 64, 50 with G = 4 and D = 128,
# under 16 with G = 1, in float32 and bfloat16 alike. The plan does not know the model, and the little that sharing
# fewer tokens gains at small G is not worth telling it.
PART_TOKENS = 64


def worthwhile(*, num_members: int, num_tokens: int) -> bool:
    """Whether sharing ``num_tokens``, in whole parts, among as many decodes takes less time than each reading them."""
    num_blocks = -(-num_members // MAX_QUERIES)
    num_parts = num_tokens // PART
    return (num_members - num_blocks) * num_tokens > num_members * num_parts * PART_TOKENS


def choose(
    spans: Sequence[SequenceSpan] | Sequence[PartSpan], shared: Sequence[SharedSpan], *, window: int | None = None
) -> tuple[SharedSpan, ...]:
    """The shared parts that pay, of the members that decode, and that all of these see; the rest is read by each."""
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
    """Position from which the sequence's last token sees what there is."""
    assert common.first_token + common.num_tokens <= span.num_tokens, (span, common)
    if isinstance(span, PartSpan):
        return int(span.seen[-1, 0])
    return 0 if window is None else max(0, span.num_tokens - window)
