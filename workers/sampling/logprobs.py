"""Computes log-probabilities of tokens from raw logits, with the same bits for a row whatever is computed beside it.

Shapes: N rows asked for; V vocabulary.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from workers.sampling.draw import scale, weights
from workers.sampling.rows import copy_rows, first, highest, in_parts
from workers.sampling.state import SampledToken


def token_logprobs(
    logits: Tensor, rows: Sequence[int], token_ids: Sequence[int], num_tops: Sequence[int]
) -> list[SampledToken]:
    """Computes log-probabilities of given tokens, sampled or of a prompt, and of the most likely tokens beside them.

    Args:
        logits: raw logits [B, V], finite or -inf.
        rows: the rows [N] to use.
        token_ids: the token [N] of each of these rows.
        num_tops: the number [N] of most likely tokens to report, at most V.

    Returns:
        A result for each of ``rows``. Errors are below 1e-6 nats and two roundings of float32.
    """
    tokens: list[SampledToken] = []
    for places in in_parts(range(len(rows)), logits):
        part = [[values[place] for place in places] for values in (rows, token_ids, num_tops)]
        tokens.extend(_part(logits, *part))
    return tokens


def _part(logits: Tensor, rows: list[int], token_ids: list[int], num_tops: list[int]) -> list[SampledToken]:
    values = copy_rows(logits, rows)
    chosen = values.gather(-1, torch.tensor(token_ids, device=logits.device)[:, None])
    top_values, top_ids = first(values, min(max(num_tops), logits.shape[1]))
    normalizers = _log_sum_exp(values)
    tops = zip(top_ids.tolist(), top_values.tolist(), strict=True)
    return [
        SampledToken(
            token_id=token_id,
            logprob=logit - normalizer,
            top=tuple((i, value - normalizer) for i, value in zip(ids[:num_top], best[:num_top], strict=True)),
        )
        for token_id, (logit,), normalizer, (ids, best), num_top in zip(
            token_ids, chosen.tolist(), normalizers, tops, num_tops, strict=True
        )
    ]


def _log_sum_exp(values: Tensor) -> list[float]:
    """Computes ln sum exp of each row of ``values`` [R, V], and overwrites them."""
    quanta = scale(values.shape[1])
    peaks, _ = highest(values)
    total = weights(values.sub_(peaks[:, None]), quanta).sum(-1, dtype=torch.float64)
    # The host computes the logarithm, since there it does not depend on a row's place.
    return [peak + math.log(mass / quanta) for peak, mass in zip(peaks.tolist(), total.tolist(), strict=True)]
