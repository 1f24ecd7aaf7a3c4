"""Chooses tokens from logits. The whole state of a sampled sequence is its seed and how many tokens it has.

Shapes: B rows, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_MASK64 = (1 << 64) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How a sequence's tokens are chosen.

    Attributes:
        temperature: divisor of the logits; 0 takes the most likely token.
        top_k: only the k most likely tokens (and ties with the last); 0 means all.
        top_p: of those, the fewest most likely ones that hold this much probability; 1 means all.
        seed: of the draws, 64 bits.
        logprobs: how many of the most likely tokens to report beside the chosen one; None reports nothing.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    logprobs: int | None = None

    def __post_init__(self) -> None:
        assert self.temperature >= 0 and self.top_k >= 0 and 0 < self.top_p <= 1, self
        assert self.logprobs is None or self.logprobs >= 0, self


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledToken:
    """A chosen token.

    Attributes:
        token_id: the token.
        logprob: log-softmax of the raw logits at it, where logprobs were asked for.
        top: the most likely tokens and their logprobs, best first.
    """

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def sample(logits: Tensor, params: Sequence[SamplingParams], indices: Sequence[int]) -> list[SampledToken]:
    """One token for each row.

    Args:
        logits: [B, V].
        params: one a row.
        indices: how many tokens each row's sequence was given before. Together with the seed it decides the
            draw, whatever else is in the batch.

    Returns:
        The tokens, in row order.
    """
    assert len(logits) == len(params) == len(indices)
    token_ids = logits.argmax(dim=-1).tolist()
    tokens = []
    for row, (greedy, chosen, index) in enumerate(zip(token_ids, params, indices, strict=True)):
        token_id = greedy if chosen.temperature == 0 else _draw(logits[row], chosen, index)
        tokens.append(_report(logits[row], token_id, chosen.logprobs))
    return tokens


def uniform(seed: int, index: int) -> float:
    """The ``index``-th draw of ``seed``, in [0, 1): splitmix64 (Steele et al. 2014), top 53 bits."""
    return (_mix(_mix(seed) + index) >> 11) * 2.0**-53


def _mix(state: int) -> int:
    """One step of splitmix64 from ``state``."""
    state = (state + 0x9E3779B97F4A7C15) & _MASK64
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK64
    return state ^ (state >> 31)


def _draw(logits: Tensor, params: SamplingParams, index: int) -> int:
    """A token of one row [V] by inverse CDF, in the order of token ids.

    That order, unlike one by likelihood, does not turn on rounding between tokens that are nearly as likely.
    """
    wide = logits.double()
    # The maximum goes first, so that a tiny temperature cannot overflow.
    probabilities = ((wide - wide.max()) / params.temperature).softmax(dim=0)
    if 0 < params.top_k < len(probabilities):
        threshold = probabilities.topk(params.top_k).values[-1]
        probabilities = probabilities.where(probabilities >= threshold, 0.0)
    if params.top_p < 1:
        probabilities = _nucleus(probabilities / probabilities.sum(), params.top_p)
    cumulative = probabilities.cumsum(dim=0)
    total = cumulative[-1]
    # Below the total even where the product rounds up to it: the token found then has some probability.
    target = torch.minimum(total * uniform(params.seed, index), total.nextafter(torch.zeros_like(total)))
    return int(torch.searchsorted(cumulative, target, right=True))


def _nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """``probabilities`` [V] with all but the smallest set of mass ``top_p`` zeroed (Holtzman et al. 2020)."""
    ordered, order = probabilities.sort(descending=True, stable=True)
    before = ordered.cumsum(dim=0) - ordered
    kept = ordered.where(before < top_p, 0.0)
    return torch.zeros_like(probabilities).scatter(0, order, kept)


def _report(logits: Tensor, token_id: int, num_top: int | None) -> SampledToken:
    if num_top is None:
        return SampledToken(token_id=token_id)
    logprobs = logits.float().log_softmax(dim=0)
    best = logprobs.topk(min(num_top, len(logprobs)))
    top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return SampledToken(token_id=token_id, logprob=float(logprobs[token_id]), top=top)
