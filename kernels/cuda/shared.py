"""Decides which tokens that decodes share are attended to once for all of them (Juravsky et al. 2024, Hydragen).

Parts, partial results and their merge are the same whether a part is shared or not. So sharing saves reads of keys and
values, and costs only one more kernel launch over the step's tables in every layer.
"""

from collections.abc import Sequence

from kernels.attention import SequenceSpan, SharedSpan
from kernels.cuda.plan import PART, SharedParts

# One more kernel takes about 3 us, in which an H200 reads 14 MB (at 4.8 TB/s), and an A100 6 MB. The plan does not know
# the model, so a token's keys and values are assumed to take 4 KB a layer, those of 8 KV heads of 128 in bfloat16. If
# they take a quarter of that, sharing pays only later than is assumed here, which costs a pass at most.
PASS_BYTES, TOKEN_BYTES = 14_000_000, 4096


def worthwhile(shared: Sequence[SharedParts]) -> bool:
    """Tells whether sharing saves more bytes of keys and values than are read in the time of one more pass."""
    saved_tokens = sum((len(parts.members) - 1) * (parts.stop - parts.first) * PART for parts in shared)
    return saved_tokens * TOKEN_BYTES > PASS_BYTES


def choose(
    spans: Sequence[SequenceSpan], shared: Sequence[SharedSpan], *, window: int | None = None
) -> tuple[SharedParts, ...]:
    """Chooses the shared parts, of members that are decodes and see all of them; none where sharing does not pay.

    Each member reads the rest of its tokens by itself.
    """
    found = [parts for common in shared if (parts := _whole_parts(spans, common, window)) is not None]
    return tuple(found) if worthwhile(found) else ()


def _whole_parts(spans: Sequence[SequenceSpan], common: SharedSpan, window: int | None) -> SharedParts | None:
    """Returns the whole parts of a shared span that at least two members see whole; None where there are none."""
    stop = (common.first_token + common.num_tokens) // PART
    firsts: dict[int, int] = {}
    for index in common.members:
        span = spans[index]
        assert common.first_token + common.num_tokens <= span.num_tokens, (span, common)
        seen_from = 0 if window is None else span.num_tokens - window
        first = -(-max(seen_from, common.first_token) // PART)
        if span.num_queries == 1 and first < stop:
            firsts[index] = first
    if len(firsts) < 2:
        return None
    return SharedParts(members=tuple(firsts), first=max(firsts.values()), stop=stop)
