"""Changes logits by a sequence's parameters and tokens: bias, minimum length, masks, penalties.

One indexed operation changes the few tokens of all rows. Nothing here makes a token possible that was not: -inf stays
-inf.

Shapes: R rows; V vocabulary, padded; W words of a mask; N changed tokens of all rows together.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from placement.errors import HeterodyneError
from workers.sampling.state import SamplerState

# [256, 8]: the numbers that a mask's byte adds to the logits of its 8 tokens.
_BYTE_BIAS = torch.where(torch.arange(256)[:, None] >> torch.arange(8) & 1 == 1, 0.0, -torch.inf)


def adjust(logits: Tensor, states: Sequence[SamplerState], vocab_size: int) -> dict[int, HeterodyneError]:
    """Changes float32 ``logits`` [R, V] in place: bias, minimum tokens, masks, repetition, presence, frequency.

    Returns:
        The errors that masks raised, by row.
    """
    _add_biases(logits, states, vocab_size)
    _hold_stops(logits, states, vocab_size)
    errors = _apply_masks(logits, states, vocab_size)
    _penalize(logits, states)
    return errors


def _add_biases(logits: Tensor, states: Sequence[SamplerState], vocab_size: int) -> None:
    changes = [
        (row, token_id, bias)
        for row, state in enumerate(states)
        for token_id, bias in state.params.bias
        if token_id < vocab_size
    ]
    if changes:
        rows, ids, biases = zip(*changes, strict=True)
        logits[_index(logits, rows, ids)] += torch.tensor(biases, device=logits.device)


def _hold_stops(logits: Tensor, states: Sequence[SamplerState], vocab_size: int) -> None:
    changes = [
        (row, token_id)
        for row, state in enumerate(states)
        if state.is_too_short
        for token_id in state.stop_token_ids
        if token_id < vocab_size
    ]
    if changes:
        rows, ids = zip(*changes, strict=True)
        logits[_index(logits, rows, ids)] = -torch.inf


def _apply_masks(logits: Tensor, states: Sequence[SamplerState], vocab_size: int) -> dict[int, HeterodyneError]:
    grammars = [(row, state.grammar) for row, state in enumerate(states) if state.grammar is not None]
    errors: dict[int, HeterodyneError] = {}
    if not grammars:
        return errors
    masks = torch.zeros(len(grammars), -(-vocab_size // 32), dtype=torch.int32)
    limited = []
    for mask, (row, grammar) in zip(masks, grammars, strict=True):
        try:
            limited.append(grammar.fill(mask))
        except HeterodyneError as error:
            errors[row] = error
            limited.append(False)
    rows = [row for (row, _), is_limited in zip(grammars, limited, strict=True) if is_limited]
    if rows:
        _mask(logits, rows, masks[torch.tensor(limited)], vocab_size)
    return errors


def _mask(logits: Tensor, rows: list[int], masks: Tensor, vocab_size: int) -> None:
    """Writes -inf into ``rows`` where the bit of ``masks``, int32 [len(rows), W], is not set.

    A mask's bytes are in token order, since its words are little-endian.
    """
    mask_bytes = masks.view(torch.uint8).to(logits.device, torch.int32)
    barriers = _BYTE_BIAS.to(logits.device).index_select(0, mask_bytes.flatten()).view(len(rows), -1)[:, :vocab_size]
    if len(rows) == len(logits):
        logits[:, :vocab_size] += barriers
    else:
        logits[torch.tensor(rows, device=logits.device), :vocab_size] += barriers


def _penalize(logits: Tensor, states: Sequence[SamplerState]) -> None:
    counted = [(row, state.params, state.counts) for row, state in enumerate(states) if state.counts is not None]
    arrays = [counts.arrays() for _, _, counts in counted]
    lengths = [len(ids) for ids, _ in arrays]
    if not sum(lengths):
        return
    # [4, N]: row, repetition, presence and frequency penalty of each token.
    figures = np.array([[row, p.repetition_penalty, p.presence_penalty, p.frequency_penalty] for row, p, _ in counted])
    rows, repetition, presence, frequency = np.repeat(figures, lengths, axis=0).T
    counts = np.concatenate([counts for _, counts in arrays])
    penalties = presence * (counts > 0) + frequency * counts
    index = _index(logits, rows, np.concatenate([ids for ids, _ in arrays]))
    device = logits.device
    factor = torch.from_numpy(repetition.astype(np.float32)).to(device)
    counted_logits = logits[index]
    counted_logits = torch.where(counted_logits > 0, counted_logits / factor, counted_logits * factor)
    logits[index] = counted_logits - torch.from_numpy(penalties.astype(np.float32)).to(device)


def _index(logits: Tensor, rows: Sequence[int] | np.ndarray, ids: Sequence[int] | np.ndarray) -> tuple[Tensor, Tensor]:
    """Makes an index of [N] elements of ``logits``, and sends it to their device at once."""
    pairs = torch.from_numpy(np.array([rows, ids], dtype=np.int64)).to(logits.device)
    return pairs[0], pairs[1]
