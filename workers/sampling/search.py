"""Finds the end of a prefix of the ordered tokens by a few passes over them, without sorting.

Shapes: R rows; V tokens.
"""

from collections.abc import Callable

import torch
from torch import Tensor

LOWEST = 40.0  # exp(-40) is below half of any quantum, so tokens further below 0 have no weight
_FAR = 1e30
_PROBES = 6  # probes before the ends are compared, which takes longer than a probe


def prefix(scaled: Tensor, measure: Tensor, target: Tensor, guess: Tensor) -> Tensor:
    """Finds the tokens that are preceded by less than a target.

    Args:
        scaled: float32 [R, V], at most 0 and finite. It orders the tokens, highest first, then by index.
        measure: float32 [R, V], whole and not negative, with sums that are exact in float64.
        target: float64 [R, 1], above 0. The prefix ends where the preceding tokens' ``measure`` sums to this or more.
        guess: float32 [R, 1], an estimate of how far below 0 the prefix ends.

    Returns:
        float32 [R, V], which is 1 in the prefix and 0 elsewhere. Tokens LOWEST and more below 0 may be either.
    """
    tokens = _Tokens(scaled, measure)
    last = -_last_distance(tokens, target, guess)
    ties = compared(torch.eq, scaled, last)
    num_ties = ties.sum(-1, keepdim=True).clamp_(min=1).double()  # float32 holds any number of tokens
    before, each = tokens.measure_above(last), (tokens.measure_of(ties) / num_ties)
    if bool((before + (num_ties - 1) * each < target).all()):  # the last of the ties is in the prefix too
        return compared(torch.ge, scaled, last)
    # Ties have the same measure, in whole numbers, so all of this is exact.
    preceding = before + (ties.cumsum(-1, dtype=torch.float64) - 1) * each
    return compared(torch.gt, scaled, last).add_(ties.mul_(preceding < target))


def compared(comparison: Callable[..., Tensor], left: Tensor, right: Tensor) -> Tensor:
    """Compares, with 1.0 and 0.0 of ``left``'s type as the result. On a CPU that is several times faster than bool."""
    return comparison(left, right, out=torch.empty_like(left))


class _Tokens:
    """The tokens to search, with scratch memory for the passes, since new memory would take longer than they do."""

    def __init__(self, scaled: Tensor, measure: Tensor) -> None:
        self._scaled, self._measure = scaled, measure
        self._scratch = torch.empty_like(scaled)
        self._wide = torch.empty_like(scaled, dtype=torch.float64)

    def measure_of(self, chosen: Tensor) -> Tensor:
        """Sums the measure where ``chosen`` [R, V] is 1 and not 0; [R, 1]."""
        return self._wide.copy_(torch.mul(chosen, self._measure, out=self._scratch)).sum(-1, keepdim=True)

    def measure_above(self, bound: Tensor) -> Tensor:
        """Sums the measure of tokens above ``bound`` [R, 1]; [R, 1]."""
        return self.measure_of(torch.gt(self._scaled, bound, out=self._scratch))

    def highest_to(self, bound: Tensor) -> Tensor:
        """Finds the highest token that is not above ``bound`` [R, 1]; [R, 1]."""
        above = torch.gt(self._scaled, bound, out=self._scratch)
        return torch.sub(self._scaled, above, alpha=_FAR, out=self._scratch).amax(-1, keepdim=True)

    def lowest_above(self, bound: Tensor) -> Tensor:
        """Finds the lowest token above ``bound`` [R, 1]; [R, 1]."""
        others = torch.le(self._scaled, bound, out=self._scratch)
        return torch.add(self._scaled, others, alpha=_FAR, out=self._scratch).amin(-1, keepdim=True)


def _last_distance(tokens: _Tokens, target: Tensor, guess: Tensor) -> Tensor:
    """Finds how far below 0 the last token of the prefix is, [R, 1]; LOWEST where the prefix has all tokens of weight.

    The tokens above ``low`` measure less than the target, and those above ``high`` do not. Regula falsi with the
    Illinois step (Dowell and Jarratt 1971) narrows the interval in few passes, and some probes halve it, so that the
    search ends. Then both ends move to the tokens next to them, until they meet.
    """
    low, high = torch.zeros_like(guess), torch.full_like(guess, LOWEST)
    missing, excess = -target, tokens.measure_above(-high) - target
    bounded = excess >= 0
    searching, probe = bounded.clone(), guess
    while bool(searching.any()):
        fell = torch.zeros_like(searching)
        for number in range(_PROBES):
            probe = torch.maximum(torch.minimum(probe, high.nextafter(low)), low.nextafter(high))
            surplus = tokens.measure_above(-probe) - target
            falls = surplus >= 0
            # An end that stays twice counts half, since it would stay for long otherwise.
            repeated = (falls == fell) & (number > 0)
            missing = torch.where(falls, torch.where(repeated, missing / 2, missing), surplus)
            excess = torch.where(falls, surplus, torch.where(repeated, excess / 2, excess))
            low, high = torch.where(falls, low, probe), torch.where(falls, probe, high)
            fell = falls
            probe = (low + high) / 2 if number == _PROBES - 2 else _crossing(low, high, missing, excess)
        nearest, farthest = -tokens.highest_to(-low), -tokens.lowest_above(-high)
        low, high = nearest.abs(), farthest.nextafter(torch.full_like(high, torch.inf))
        searching &= nearest < farthest
    return torch.where(bounded, low, LOWEST)


def _crossing(low: Tensor, high: Tensor, missing: Tensor, excess: Tensor) -> Tensor:
    """Finds where the line from ``missing`` at ``low`` to ``excess`` at ``high`` is 0."""
    return low + (high - low) * (missing / (missing - excess)).float()
