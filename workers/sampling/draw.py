"""Draws tokens from scaled logits, many rows at once, each as if it were alone.

A row's weights are ``exp`` of its scaled logits in whole multiples of a quantum so small that no token of note is
rounded away, and so large that any sum of them is exact in float64. Sums therefore do not depend on their order:
not on the batch, the number of threads, the device, nor on which of the ways below found the token.

Tokens have one order: by scaled logit, highest first, then by id. Min-p, top-k and top-p each keep a prefix of it.
Mostly the prefix is short and lies in the CANDIDATES first tokens; where not, its end is searched for in all.

Shapes: R rows; V vocabulary, padded with -inf to a multiple of CHUNK; K candidates.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from workers.sampling.rows import CHUNK, first
from workers.sampling.search import LOWEST, compared, prefix

CANDIDATES = 128  # more nuclei would fit into more, but all rows would pay for them
FEW = 1024  # a higher top-k is better searched for


@dataclass(frozen=True, slots=True, kw_only=True)
class Cuts:
    """How each row is drawn; columns [R, 1].

    Attributes:
        uniform: float64, in [0, 1).
        log_min_p: float32, the lowest scaled logit kept; -inf keeps all, and None does so in every row.
        top_k: float64, how many are kept; inf keeps all.
        top_p: float64, how much of what is left is kept; inf keeps all.
    """

    uniform: Tensor
    log_min_p: Tensor | None
    top_k: Tensor
    top_p: Tensor

    def select(self, rows: Tensor) -> "Cuts":
        """Those of some rows [r]."""
        return Cuts(
            uniform=self.uniform[rows],
            log_min_p=None if self.log_min_p is None else self.log_min_p[rows],
            top_k=self.top_k[rows],
            top_p=self.top_p[rows],
        )


def scale(vocab_size: int) -> float:
    """How many quanta the weight 1 has: the power of two that keeps the sum of V of them exact in float64."""
    return 2.0 ** (53 - math.ceil(math.log2(vocab_size)))


def weights(scaled: Tensor, quanta: float) -> Tensor:
    """exp of ``scaled`` [R, V] (at most 0) in whole quanta, float32."""
    return scaled.exp().mul_(quanta).round_()


def draw_open(scaled: Tensor, cuts: Cuts) -> Tensor:
    """Token ids [R], from all tokens that min-p keeps. Top-k and top-p are not looked at."""
    return _invert(_kept_weights(scaled, scale(scaled.shape[-1]), cuts), cuts.uniform)


def draw_top_k(scaled: Tensor, cuts: Cuts, k: int) -> Tensor:
    """Token ids [R], where no row's top-k is above ``k``, so that the first k tokens are all that matters."""
    k = min(k, scaled.shape[-1])
    values, ids = first(scaled, k)
    mass = _kept_weights(values, scale(scaled.shape[-1]), cuts)
    mass.mul_(torch.arange(k, device=mass.device) < cuts.top_k)
    target = cuts.top_p * mass.sum(-1, keepdim=True, dtype=torch.float64)
    return _draw_first(ids, mass, target, cuts.uniform)


def draw_top_p(scaled: Tensor, cuts: Cuts) -> Tensor:
    """Token ids [R], whatever the cuts. The host waits for the device once, to see which rows want all tokens."""
    mass = _kept_weights(scaled, scale(scaled.shape[-1]), cuts)
    k = min(CANDIDATES, scaled.shape[-1])
    _, ids = first(scaled, k)
    near = mass.gather(-1, ids)
    target = cuts.top_p * mass.sum(-1, keepdim=True, dtype=torch.float64)
    tokens = _draw_first(ids, near, target, cuts.uniform)
    reached = (near.sum(-1, keepdim=True, dtype=torch.float64) >= target) & cuts.top_k.isinf()
    far = (~reached.squeeze(-1)).nonzero().squeeze(-1)
    if len(far):
        tokens[far] = _draw_far(scaled.index_select(0, far), mass.index_select(0, far), cuts.select(far))
    return tokens


def _kept_weights(scaled: Tensor, quanta: float, cuts: Cuts) -> Tensor:
    """Weights of what min-p keeps of ``scaled`` [R, n]."""
    mass = weights(scaled, quanta)
    return mass if cuts.log_min_p is None else mass.mul_(compared(torch.ge, scaled, cuts.log_min_p))


def _draw_first(ids: Tensor, mass: Tensor, target: Tensor, uniform: Tensor) -> Tensor:
    """Token ids [R] from candidates in order, [R, K], up to where their mass reaches ``target`` [R, 1]."""
    before = mass.cumsum(-1, dtype=torch.float64) - mass
    kept = mass * (before < target)
    ids, order = ids.sort(dim=-1)
    return ids.gather(-1, _invert(kept.gather(-1, order), uniform)[:, None]).squeeze(-1)


def _draw_far(scaled: Tensor, mass: Tensor, cuts: Cuts) -> Tensor:
    """Token ids [R] by a search for the end of each prefix among all tokens. Overwrites its arguments."""
    scaled.clamp_(min=-2 * LOWEST)  # what is below has no weight, and -inf would spoil arithmetic
    if bool(cuts.top_k.isfinite().any()):
        kept = prefix(scaled, torch.ones_like(mass), cuts.top_k, torch.full_like(cuts.top_k, LOWEST / 4).float())
        mass.mul_(kept)
        scaled.masked_fill_(kept == 0, -2 * LOWEST)  # or those left out would count among equals of those that stay
    total = mass.sum(-1, keepdim=True, dtype=torch.float64)
    target = cuts.top_p * total
    # Were all tokens that are left out at this distance, the prefix would end here.
    guess = (scale(mass.shape[-1]) * mass.shape[-1] / (total - target)).log().float()
    return _invert(mass.mul_(prefix(scaled, mass, target, guess)), cuts.uniform)


def _invert(mass: Tensor, uniform: Tensor) -> Tensor:
    """Where [R] the running sum of ``mass`` [R, n] first exceeds the share ``uniform`` [R, 1] of the whole."""
    rows, size = mass.shape
    if size % CHUNK or size <= 4 * CHUNK:
        return _locate(mass, _target(mass, uniform))[0]
    chunks = mass.view(rows, -1, CHUNK)
    sums = chunks.sum(-1, dtype=torch.float64)
    chunk, rest = _locate(sums, _target(sums, uniform))
    within, _ = _locate(chunks[torch.arange(rows, device=mass.device), chunk], rest)
    return chunk * CHUNK + within


def _target(mass: Tensor, uniform: Tensor) -> Tensor:
    """The whole number of quanta [R, 1] that a running sum must exceed: below the total, however it rounds."""
    total = mass.sum(-1, keepdim=True, dtype=torch.float64)
    return torch.minimum((total * uniform).floor_(), total - 1)


def _locate(mass: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Where [R] the running sum of ``mass`` [R, n] first exceeds ``target`` [R, 1], and what is left of it there."""
    running = mass.cumsum(-1, dtype=torch.float64)
    # Damaged logits may exceed it nowhere; their token is thrown away later.
    at = (running <= target).sum(-1, keepdim=True).clamp_(max=mass.shape[-1] - 1)
    return at.squeeze(-1), target - running.gather(-1, at) + mass.gather(-1, at)
