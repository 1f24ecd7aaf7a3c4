"""Which shared runs of tokens are attended to once for all who share them (Juravsky et al. 2024, Hydragen).

A shared run's keys and values are read and laid out once for every block of members instead of once a member; the
arithmetic is the same. The price is a partial result, written and merged, for each member and part of the run.
"""

from collections.abc import Sequence
from dataclasses import replace

from kernels.attention import SequenceSpan, SharedSpan
from kernels.tasks import MAX_QUERIES, SHARED_PART

# A member's partial result costs as much as reading and laying out so many tokens. From where sharing breaks even on
# Zen 4, one thread, KV in the third-level cache, 2 to 16 members: 64 with G = 8 and D = 64, 50 with G = 4 and D = 128,
# under 16 with G = 1, in float32 and bfloat16 alike. The plan does not know the model, and the little that sharing
# fewer tokens gains at small G is not worth telling it.
PART_TOKENS = 64


def worthwhile(*, num_members: int, num_tokens: int) -> bool:
    """Whether sharing ``num_tokens`` among as many decodes takes less time than each reading them."""
    num_blocks = -(-num_members // MAX_QUERIES)
    num_parts = -(-num_tokens // SHARED_PART)
    return (num_members - num_blocks) * num_tokens > num_members * num_parts * PART_TOKENS


def choose(
    spans: Sequence[SequenceSpan], shared: Sequence[SharedSpan], *, window: int | None = None
) -> tuple[SharedSpan, ...]:
    """The shared spans that pay, of the members that decode and see them whole; the rest is read by each member."""
    chosen = []
    for common in shared:
        members = tuple(index for index in common.members if _sees_whole(spans[index], common, window))
        if worthwhile(num_members=len(members), num_tokens=common.num_tokens):
            chosen.append(replace(common, members=members))
    return tuple(chosen)


def _sees_whole(span: SequenceSpan, common: SharedSpan, window: int | None) -> bool:
    assert common.first_token + common.num_tokens <= span.num_tokens, (span, common)
    return span.num_queries == 1 and (window is None or common.first_token >= span.num_tokens - window)
