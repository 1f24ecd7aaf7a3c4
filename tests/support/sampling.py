"""Provides logits, a mask and a shorthand that tests of sampling share."""

import torch
from torch import Tensor

from workers.sampling.sampling import SampledToken, SamplerState, sample

LOGITS = torch.tensor([1.0, 0.3, -0.5, 2.0, 0.0, -3.0, 1.5, 0.9, -1.0, 0.2])


class OnlyIds:
    """A mask that always allows the same tokens, and records those that it accepts."""

    done = False

    def __init__(self, *allowed: int) -> None:
        self.allowed = allowed
        self.accepted: list[int] = []

    def fill(self, row: Tensor) -> bool:
        row[0] = sum(1 << token_id for token_id in self.allowed)
        return True

    def accept(self, token_id: int) -> None:
        self.accepted.append(token_id)


def next_token(logits: Tensor, state: SamplerState) -> SampledToken:
    (result,) = sample(logits[None], [state])
    assert isinstance(result, SampledToken), result
    return result
