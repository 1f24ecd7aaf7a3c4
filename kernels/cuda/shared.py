"""Which tokens that decodes have in common a GPU attends to once for all of them (Juravsky et al. 2024, Hydragen).

Parts are the same whoever shares them, and so are partial results and their merge: sharing saves the reading of keys
and values, and costs nothing but one more pass over the step's tables in every layer.
"""

from collections.abc import Sequence

from kernels.attention import SequenceSpan, SharedSpan
from kernels.cuda.plan import PART, SharedParts

# One more kernel takes about 3 us, in which an H200 reads 14 MB (4.8 TB/s), and an A100 6 MB. A token's keys and values
# are taken to be 4 KB a layer, those of 8 KV heads of 128 in bfloat16: the plan does not know the model. With a quarter
# of that sharing begins to pay later than is thought here, by what at most a pass costs.
PASS_BYTES, TOKEN_BYTES = 14_000_000, 4096


def worthwhile(shared: Sequence[SharedParts]) -> bool:
    """Whether sharing all of it saves more bytes of keys and values than are read in the time of one more pass."""
    saved_tokens = sum((len(parts.members) - 1) * (parts.stop - parts.first) * PART for parts in shared)
    return saved_tokens * TOKEN_BYTES > PASS_BYTES


def choose(
    spans: Sequence[SequenceSpan], shared: Sequence[SharedSpan], *, window: int | None = None
) -> tuple[SharedParts, ...]:
    """The shared parts, of the members that decode and that all of these see, if they pay; the rest is read by each."""
    found = [parts for common in shared if (parts := _whole_parts(spans, common, window)) is not None]
    return tuple(found) if worthwhile(found) else ()


def _whole_parts(spans: Sequence[SequenceSpan], common: SharedSpan, window: int | None) -> SharedParts | None:
    """What of a shared span are whole parts that two members or more see from the first to the last token."""
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
