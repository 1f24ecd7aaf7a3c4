"""Draws tokens from scaled logits, many rows at once, as if each row were alone.

A row's weights are ``exp`` of its scaled logits in whole multiples of a quantum. The quantum is so small that no token
of note is rounded away, and so large that any sum of weights is exact in float64. Sums therefore do not depend on their
order: not on the batch, the number of threads or the device, and not on which function below found the token.

Tokens are ordered by scaled logit, highest first, then by id. Min-p, top-k and top-p each keep a prefix of that order.
Mostly the prefix is short and lies in the first CANDIDATES tokens; otherwise its end is searched for in all tokens.

Shapes: R rows; V vocabulary, padded with -inf to a multiple of CHUNK; K candidates.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from workers.sampling.rows import CHUNK, first
from workers.sampling.search import LOWEST, compared, prefix

CANDIDATES = 128  # more would hold the prefixes of more rows, but all rows would take longer
FEW = 1024  # a search is faster for a higher top-k


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawSettings:
    """The settings for the draw of each row, as columns [R, 1].

    Attributes:
        uniform: the draw, float64 in [0, 1).
        log_min_p: float32, the lowest scaled logit that is kept; -inf keeps all, and None does so in every row.
        top_k: float64, the number of tokens that are kept; inf keeps all.
        top_p: float64, the share of the remaining weight that is kept; inf keeps all.
    """

    uniform: Tensor
    log_min_p: Tensor | None
    top_k: Tensor
    top_p: Tensor

    def select(self, rows: Tensor) -> "DrawSettings":
        """Selects the settings of some rows [r]."""
        return DrawSettings(
            uniform=self.uniform[rows],
            log_min_p=None if self.log_min_p is None else self.log_min_p[rows],
            top_k=self.top_k[rows],
            top_p=self.top_p[rows],
        )


def scale(vocab_size: int) -> float:
    """Returns the quanta of a weight of 1: the power of two that keeps the sum of V weights exact in float64."""
    return 2.0 ** (53 - math.ceil(math.log2(vocab_size)))


def weights(scaled: Tensor, quanta: float) -> Tensor:
    """Computes exp of ``scaled`` [R, V] (at most 0) in whole quanta, float32."""
    return scaled.exp().mul_(quanta).round_()


def draw_open(scaled: Tensor, settings: DrawSettings) -> Tensor:
    """Draws token ids [R] from all tokens that min-p keeps. Top-k and top-p do not count."""
    return _invert(_kept_weights(scaled, scale(scaled.shape[-1]), settings), settings.uniform)


def draw_top_k(scaled: Tensor, settings: DrawSettings, k: int) -> Tensor:
    """Draws token ids [R] where no row's top-k is above ``k``, so that only the first k tokens matter."""
    k = min(k, scaled.shape[-1])
    values, ids = first(scaled, k)
    mass = _kept_weights(values, scale(scaled.shape[-1]), settings)
    mass.mul_(torch.arange(k, device=mass.device) < settings.top_k)
    target = settings.top_p * mass.sum(-1, keepdim=True, dtype=torch.float64)
    return _draw_first(ids, mass, target, settings.uniform)


def draw_top_p(scaled: Tensor, settings: DrawSettings) -> Tensor:
    """Draws token ids [R] with any settings. The host waits for the device once, to see which rows need a search."""
    mass = _kept_weights(scaled, scale(scaled.shape[-1]), settings)
    k = min(CANDIDATES, scaled.shape[-1])
    _, ids = first(scaled, k)
    near = mass.gather(-1, ids)
    target = settings.top_p * mass.sum(-1, keepdim=True, dtype=torch.float64)
    tokens = _draw_first(ids, near, target, settings.uniform)
    reached = (near.sum(-1, keepdim=True, dtype=torch.float64) >= target) & settings.top_k.isinf()
    far = (~reached.squeeze(-1)).nonzero().squeeze(-1)
    if len(far):
        tokens[far] = _draw_far(scaled.index_select(0, far), mass.index_select(0, far), settings.select(far))
    return tokens


def _kept_weights(scaled: Tensor, quanta: float, settings: DrawSettings) -> Tensor:
    """Computes the weights of ``scaled`` [R, n], which are 0 where min-p drops the token."""
    mass = weights(scaled, quanta)
    return mass if settings.log_min_p is None else mass.mul_(compared(torch.ge, scaled, settings.log_min_p))


def _draw_first(ids: Tensor, mass: Tensor, target: Tensor, uniform: Tensor) -> Tensor:
    """Draws token ids [R] from ordered candidates [R, K], up to where their mass reaches ``target`` [R, 1]."""
    before = mass.cumsum(-1, dtype=torch.float64) - mass
    kept = mass * (before < target)
    ids, order = ids.sort(dim=-1)
    return ids.gather(-1, _invert(kept.gather(-1, order), uniform)[:, None]).squeeze(-1)


def _draw_far(scaled: Tensor, mass: Tensor, settings: DrawSettings) -> Tensor:
    """Draws token ids [R] by a search for the end of each prefix among all tokens. Overwrites its arguments."""
    scaled.clamp_(min=-2 * LOWEST)  # lower tokens have no weight, and -inf would spoil arithmetic
    if bool(settings.top_k.isfinite().any()):
        kept = prefix(
            scaled, torch.ones_like(mass), settings.top_k, torch.full_like(settings.top_k, LOWEST / 4).float()
        )
        mass.mul_(kept)
        scaled.masked_fill_(kept == 0, -2 * LOWEST)  # else dropped tokens would count among equals of kept ones
    total = mass.sum(-1, keepdim=True, dtype=torch.float64)
    target = settings.top_p * total
    # The prefix would end here if all tokens that are dropped were at this distance.
    guess = (scale(mass.shape[-1]) * mass.shape[-1] / (total - target)).log().float()
    return _invert(mass.mul_(prefix(scaled, mass, target, guess)), settings.uniform)


def _invert(mass: Tensor, uniform: Tensor) -> Tensor:
    """Finds where [R] the running sum of ``mass`` [R, n] first exceeds the share ``uniform`` [R, 1] of the whole."""
    rows, size = mass.shape
    if size % CHUNK or size <= 4 * CHUNK:
        return _locate(mass, _target(mass, uniform))[0]
    chunks = mass.view(rows, -1, CHUNK)
    sums = chunks.sum(-1, dtype=torch.float64)
    chunk, rest = _locate(sums, _target(sums, uniform))
    within, _ = _locate(chunks[torch.arange(rows, device=mass.device), chunk], rest)
    return chunk * CHUNK + within


def _target(mass: Tensor, uniform: Tensor) -> Tensor:
    """Returns the quanta [R, 1] that a running sum must exceed, which are below the total however they are rounded."""
    total = mass.sum(-1, keepdim=True, dtype=torch.float64)
    return torch.minimum((total * uniform).floor_(), total - 1)


def _locate(mass: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Finds where [R] the running sum of ``mass`` [R, n] first exceeds ``target`` [R, 1].

    The second result is what is left of the target there, [R, 1].
    """
    running = mass.cumsum(-1, dtype=torch.float64)
    # Damaged logits may exceed it nowhere; their token is thrown away later.
    place = (running <= target).sum(-1, keepdim=True).clamp_(max=mass.shape[-1] - 1)
    return place.squeeze(-1), target - running.gather(-1, place) + mass.gather(-1, place)
