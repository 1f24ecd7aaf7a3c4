"""Chooses tokens from logits, one for each row of a batch, as if each row were alone.

The changes to a row's logits, and the draw from them, depend on that row's logits, parameters and tokens, and never on
the rest of the batch. They give the same bits alone or in any batch, on any number of threads;
:mod:`workers.sampling.draw` says why.

Shapes: B rows of the batch; R rows of a part of it; V vocabulary.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from enum import Enum, auto

import torch
from torch import Tensor

from placement.errors import HeterodyneError, cause_of
from placement.serving.grammar import ENDS_TOO_SOON
from workers.sampling.adjust import adjust
from workers.sampling.draw import FEW, DrawSettings, draw_open, draw_top_k, draw_top_p
from workers.sampling.logprobs import token_logprobs
from workers.sampling.rows import copy_rows, highest, in_parts
from workers.sampling.state import SampledToken, SamplerState, SamplingFailed, SamplingParams, TokenMask

__all__ = ["SampledToken", "SamplerState", "SamplingFailed", "SamplingParams", "TokenMask", "sample", "uniform"]

_MASK64 = (1 << 64) - 1
# A lower temperature has the same effect as 0, and one that rounds to 0 would divide 0 by 0.
_LEAST_TEMPERATURE = 1e-30


class _Method(Enum):
    """The methods by which a row's token is found."""

    GREEDY = auto()  # takes the most likely token of the raw logits
    ADJUSTED_GREEDY = auto()  # takes the most likely token of the adjusted logits
    OPEN = auto()  # draws from all tokens, or all that min-p keeps
    TOP_K = auto()  # draws from few tokens
    TOP_P = auto()  # draws from as many tokens as top-p needs


@torch.inference_mode()
def sample(logits: Tensor, states: Sequence[SamplerState]) -> list[SampledToken | SamplingFailed]:
    """Samples one token for each row, and appends it to the row's state.

    The raw logits are changed in this order: bias, minimum tokens (no stop id before), mask, repetition penalty,
    presence and frequency penalty. Temperature 0 takes the most likely token, the lowest id of several. Otherwise come
    temperature, min-p, top-k, top-p and the draw, by inverse CDF in the order of token ids. That order, unlike one by
    likelihood, does not depend on how tokens that are nearly as likely are rounded. Log-probabilities are those of the
    raw logits.

    Args:
        logits: [B, V] of any floating type; they are left as they are.
        states: the state of each row.

    Returns:
        The tokens, in row order. A row that has a NaN or an infinity among its logits, no token allowed, or a mask that
        raised gets the failure instead, and its state is unchanged.
    """
    assert len(logits) == len(states)
    if not states:
        return []
    peaks, tokens = highest(logits)
    errors: dict[int, HeterodyneError] = {}
    rows_by_method: defaultdict[_Method, list[int]] = defaultdict(list)
    for row, state in enumerate(states):
        rows_by_method[_method(state, logits.shape[1])].append(row)
    for method, all_rows in rows_by_method.items():
        if method is not _Method.GREEDY:
            for rows in in_parts(all_rows, logits):
                raised = _choose(method, logits, [states[row] for row in rows], rows, peaks, tokens)
                errors.update((rows[place], error) for place, error in raised.items())
    return _finish(logits, states, tokens.tolist(), peaks.tolist(), errors)


def uniform(seed: int, index: int) -> float:
    """Returns the ``index``-th draw of ``seed``, in [0, 1): the top 53 bits of splitmix64 (Steele et al. 2014)."""
    return (_mix(_mix(seed) + index) >> 11) * 2.0**-53


def _mix(state: int) -> int:
    """Computes one step of splitmix64 from ``state``."""
    state = (state + 0x9E3779B97F4A7C15) & _MASK64
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK64
    return state ^ (state >> 31)


def _method(state: SamplerState, vocab_size: int) -> _Method:
    params = state.params
    if params.temperature == 0:
        return _Method.ADJUSTED_GREEDY if state.is_adjusted else _Method.GREEDY
    if 0 < params.top_k <= FEW:
        return _Method.TOP_K
    return _Method.TOP_P if params.top_p < 1 or 0 < params.top_k < vocab_size else _Method.OPEN


def _choose(
    method: _Method, logits: Tensor, states: Sequence[SamplerState], rows: Sequence[int], peaks: Tensor, tokens: Tensor
) -> dict[int, HeterodyneError]:
    """Puts the tokens of ``rows`` [R] into ``tokens`` [B], and the highest adjusted logit into ``peaks`` [B].

    Returns:
        The errors that masks raised, by place in ``rows``.
    """
    index = torch.tensor(rows, device=logits.device)
    copy = copy_rows(logits, rows)
    errors: dict[int, HeterodyneError] = {}
    best = tokens[index]
    if any(state.is_adjusted for state in states):
        errors = adjust(copy, states, logits.shape[1])
        adjusted, best = highest(copy)
        # A damaged row stays damaged, even where a mask hides the damage.
        peaks[index] = torch.where(peaks[index].isfinite(), adjusted, peaks[index])
    tokens[index] = best if method is _Method.ADJUSTED_GREEDY else _draw(method, copy, peaks[index], states)
    return errors


def _draw(method: _Method, logits: Tensor, peaks: Tensor, states: Sequence[SamplerState]) -> Tensor:
    """Draws token ids [R] from adjusted logits [R, V], given the highest of each row [R]. Overwrites the logits."""
    temperature, settings = _draw_settings(states, logits)
    # The highest logit is subtracted first, so that a tiny temperature cannot overflow.
    scaled = logits.sub_(peaks[:, None]).div_(temperature)
    match method:
        case _Method.OPEN:
            return draw_open(scaled, settings)
        case _Method.TOP_K:
            return draw_top_k(scaled, settings, max(state.params.top_k for state in states))
        case _:
            return draw_top_p(scaled, settings)


def _draw_settings(states: Sequence[SamplerState], like: Tensor) -> tuple[Tensor, DrawSettings]:
    """Sends the temperatures [R, 1] and the rest of the parameters to the device of ``like`` at once."""
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
    return temperature.to(like.dtype), DrawSettings(
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
    """Appends the tokens to the sequences that can go on, and reports them."""
    results: list[SampledToken | SamplingFailed] = []
    for row, (state, token_id, peak) in enumerate(zip(states, token_ids, peaks, strict=True)):
        try:
            if row in errors:
                raise errors[row]
            if not math.isfinite(peak):
                raise _damaged(row, peak, _nothing_allowed(logits[row], state))
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
    """Adds log-probabilities to the results of the rows that asked for them."""
    requests = [
        (row, result.token_id, num_top)
        for row, (state, result) in enumerate(zip(states, results, strict=True))
        if isinstance(result, SampledToken) and (num_top := state.params.logprobs) is not None
    ]
    if requests:
        rows, token_ids, num_tops = zip(*requests, strict=True)
        for row, token in zip(rows, token_logprobs(logits, rows, token_ids, num_tops), strict=True):
            results[row] = token
    return results


def _nothing_allowed(logits: Tensor, state: SamplerState) -> str | None:
    """Returns why the mask of a row allows nothing, whose raw logits are [V]; None where it is not to blame."""
    if state.grammar is None or not logits.max().isfinite():
        return None
    if state.is_too_short:
        return ENDS_TOO_SOON
    return "the grammar allows no token of this model"


def _damaged(row: int, peak: float, grammar_problem: str | None) -> SamplingFailed:
    if peak == -math.inf:
        return SamplingFailed(
            row=row,
            value=peak,
            problem="allow no token",
            fix="Loosen the grammar or the minimum number of tokens, or check the model's weights.",
            grammar_problem=grammar_problem,
        )
    return SamplingFailed(
        row=row,
        value=peak,
        problem="are not numbers",
        fix="Check the model's weights, or serve it in a wider dtype.",
    )


def _refused(row: int, error: HeterodyneError) -> SamplingFailed:
    failure = SamplingFailed(
        row=row,
        value=cause_of(error),
        problem="cannot follow the mask",
        fix="Check the grammar.",
        grammar_problem=str(error),
    )
    failure.__cause__ = error
    return failure
