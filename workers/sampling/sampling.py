"""Chooses tokens from logits, one for each row of a batch, each as if it were alone.

What is changed in a row's logits and drawn from them depends on that row's logits, parameters and tokens, never on
its batch-mates: the same bits alone or in any batch, on any number of threads (sampling_draw says why).

Shapes: B rows of the batch; R rows of a part of it; V vocabulary.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from enum import Enum, auto

import torch
from torch import Tensor

from placement.errors import HeterodyneError, cause_of
from workers.sampling.adjust import adjust
from workers.sampling.draw import FEW, Cuts, draw_open, draw_top_k, draw_top_p
from workers.sampling.logprobs import token_logprobs
from workers.sampling.rows import copy_rows, highest, in_parts
from workers.sampling.state import SampledToken, SamplerState, SamplingFailed, SamplingParams, TokenMask

__all__ = ["SampledToken", "SamplerState", "SamplingFailed", "SamplingParams", "TokenMask", "sample", "uniform"]

_MASK64 = (1 << 64) - 1
# A lower temperature is as good as 0; one that rounds to 0 would divide 0 by 0.
_LEAST_TEMPERATURE = 1e-30


class _Way(Enum):
    """How a row's token is found."""

    GREEDY = auto()  # the most likely, and the raw logits say which
    ADJUSTED_GREEDY = auto()
    OPEN = auto()  # drawn from all, or all that min-p keeps
    TOP_K = auto()  # drawn from few
    TOP_P = auto()  # drawn from as many as it takes


@torch.inference_mode()
def sample(logits: Tensor, states: Sequence[SamplerState]) -> list[SampledToken | SamplingFailed]:
    """One token for each row, appended to the row's state.

    In this order: raw logits, bias, minimum tokens (no stop id before), mask, repetition penalty, presence and
    frequency penalty; at temperature 0 the most likely token (the lowest id of several), else temperature, min-p,
    top-k, top-p and the draw, by inverse CDF in the order of token ids. That order, unlike one by likelihood, does
    not turn on rounding between tokens that are nearly as likely. Log-probabilities are of the raw logits.

    Args:
        logits: [B, V], any floating type; left as they are.
        states: one a row.

    Returns:
        The tokens, in row order. For a row with a NaN or an infinity among its logits, with no token allowed, or
        whose mask raised, the failure; its state is then unchanged.
    """
    assert len(logits) == len(states)
    if not states:
        return []
    peaks, tokens = highest(logits)
    errors: dict[int, HeterodyneError] = {}
    rows_by_way: defaultdict[_Way, list[int]] = defaultdict(list)
    for row, state in enumerate(states):
        rows_by_way[_way(state, logits.shape[1])].append(row)
    for way, all_rows in rows_by_way.items():
        if way is not _Way.GREEDY:
            for rows in in_parts(all_rows, logits):
                raised = _choose(way, logits, [states[row] for row in rows], rows, peaks, tokens)
                errors.update((rows[at], error) for at, error in raised.items())
    return _finish(logits, states, tokens.tolist(), peaks.tolist(), errors)


def uniform(seed: int, index: int) -> float:
    """The ``index``-th draw of ``seed``, in [0, 1): splitmix64 (Steele et al. 2014), top 53 bits."""
    return (_mix(_mix(seed) + index) >> 11) * 2.0**-53


def _mix(state: int) -> int:
    """One step of splitmix64 from ``state``."""
    state = (state + 0x9E3779B97F4A7C15) & _MASK64
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK64
    return state ^ (state >> 31)


def _way(state: SamplerState, vocab_size: int) -> _Way:
    params = state.params
    if params.temperature == 0:
        return _Way.ADJUSTED_GREEDY if state.adjusts else _Way.GREEDY
    if 0 < params.top_k <= FEW:
        return _Way.TOP_K
    return _Way.TOP_P if params.top_p < 1 or 0 < params.top_k < vocab_size else _Way.OPEN


def _choose(
    way: _Way, logits: Tensor, states: Sequence[SamplerState], rows: Sequence[int], peaks: Tensor, tokens: Tensor
) -> dict[int, HeterodyneError]:
    """Put the tokens of ``rows`` [R] into ``tokens`` [B], and into ``peaks`` [B] the highest logit there was then.

    Returns:
        What masks raised, by place in ``rows``.
    """
    at = torch.tensor(rows, device=logits.device)
    copy = copy_rows(logits, rows)
    errors: dict[int, HeterodyneError] = {}
    best = tokens[at]
    if any(state.adjusts for state in states):
        errors = adjust(copy, states, logits.shape[1])
        adjusted, best = highest(copy)
        # A damaged row stays so, even where what was damaged is masked.
        peaks[at] = torch.where(peaks[at].isfinite(), adjusted, peaks[at])
    tokens[at] = best if way is _Way.ADJUSTED_GREEDY else _draw(way, copy, peaks[at], states)
    return errors


def _draw(way: _Way, logits: Tensor, peaks: Tensor, states: Sequence[SamplerState]) -> Tensor:
    """Token ids [R] from adjusted logits [R, V] and the highest of each row [R]. Overwrites the logits."""
    temperature, cuts = _cuts(states, logits)
    # The highest goes first, so that a tiny temperature cannot overflow.
    scaled = logits.sub_(peaks[:, None]).div_(temperature)
    match way:
        case _Way.OPEN:
            return draw_open(scaled, cuts)
        case _Way.TOP_K:
            return draw_top_k(scaled, cuts, max(state.params.top_k for state in states))
        case _:
            return draw_top_p(scaled, cuts)


def _cuts(states: Sequence[SamplerState], like: Tensor) -> tuple[Tensor, Cuts]:
    """The temperatures [R, 1] and the rest of the parameters, sent to the device at once."""
    figures = [
        (
            max(p.temperature, _LEAST_TEMPERATURE),
            math.log(p.min_p) if p.min_p else -math.inf,
            p.top_k or math.inf,
            p.top_p if p.top_p < 1 else math.inf,
            uniform(p.seed, state.num_tokens),
        )
        for state in states
        for p in (state.params,)
    ]
    columns = torch.tensor(figures, dtype=torch.float64).to(like.device).T.unsqueeze(-1)
    temperature, log_min_p, top_k, top_p, draw = columns
    return temperature.to(like.dtype), Cuts(
        uniform=draw,
        log_min_p=log_min_p.to(like.dtype) if any(state.params.min_p for state in states) else None,
        top_k=top_k,
        top_p=top_p,
    )


def _finish(
    logits: Tensor,
    states: Sequence[SamplerState],
    token_ids: list[int],
    peaks: list[float],
    errors: dict[int, HeterodyneError],
) -> list[SampledToken | SamplingFailed]:
    """Append the tokens to the sequences that can go on, and report them."""
    results: list[SampledToken | SamplingFailed] = []
    for row, (state, token_id, peak) in enumerate(zip(states, token_ids, peaks, strict=True)):
        try:
            if row in errors:
                raise errors[row]
            if not math.isfinite(peak):
                raise _damaged(row, peak)
            state.append(token_id)
            results.append(SampledToken(token_id=token_id))
        except SamplingFailed as failure:
            results.append(failure)
        except HeterodyneError as error:
            results.append(_refused(row, error))
    return _with_logprobs(logits, states, results)


def _with_logprobs(
    logits: Tensor, states: Sequence[SamplerState], results: list[SampledToken | SamplingFailed]
) -> list[SampledToken | SamplingFailed]:
    """``results``, with log-probabilities in the rows that asked for them."""
    asked = [
        (row, result.token_id, num_top)
        for row, (state, result) in enumerate(zip(states, results, strict=True))
        if isinstance(result, SampledToken) and (num_top := state.params.logprobs) is not None
    ]
    if asked:
        rows, token_ids, num_tops = zip(*asked, strict=True)
        for row, token in zip(rows, token_logprobs(logits, rows, token_ids, num_tops), strict=True):
            results[row] = token
    return results


def _damaged(row: int, peak: float) -> SamplingFailed:
    if peak == -math.inf:
        return SamplingFailed(
            row=row,
            value=peak,
            problem="allow no token",
            fix="Loosen the grammar or the minimum number of tokens, or check the model's weights.",
        )
    return SamplingFailed(
        row=row,
        value=peak,
        problem="are not numbers",
        fix="Check the model's weights, or serve it in a wider dtype.",
    )


def _refused(row: int, error: HeterodyneError) -> SamplingFailed:
    failure = SamplingFailed(row=row, value=cause_of(error), problem="cannot follow the mask", fix="Check the grammar.")
    failure.__cause__ = error
    return failure
