"""Log-probabilities of a prompt's own tokens: what the model thought of each, given those before it.

Shapes: N prompt tokens, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from placement.memory import SCORED_ROWS


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredPrompt:
    """A run of prompt tokens to be scored.

    Attributes:
        first_index: position in the prompt of the first, at least 1: nothing comes before the prompt's first token.
        token_ids: the tokens.
        num_top: how many of the most likely tokens to report for each position.
    """

    first_index: int
    token_ids: Sequence[int]
    num_top: int

    def __post_init__(self) -> None:
        assert self.first_index >= 1 and self.token_ids and self.num_top >= 0, self


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptScores:
    """Log-probabilities of prompt tokens.

    Attributes:
        first_index: position in the prompt of the first.
        logprobs: of each token.
        top: the most likely tokens of each position and their log-probabilities, best first.
    """

    first_index: int
    logprobs: tuple[float, ...]
    top: tuple[tuple[tuple[int, float], ...], ...]


def score(hidden: Tensor, project: Callable[[Tensor], Tensor], prompt: ScoredPrompt) -> PromptScores:
    """Scores a run of tokens.

    Args:
        hidden: the last layer's output [N, E] at the position before each of the tokens.
        project: hidden states [rows, E] to logits [rows, V].
        prompt: the N tokens.
    """
    logprobs: list[float] = []
    top: list[tuple[tuple[int, float], ...]] = []
    targets = torch.tensor(prompt.token_ids, dtype=torch.int64, device=hidden.device)
    assert len(targets) == len(hidden), prompt
    # In parts: the logits of all positions of a long prompt would take more memory than the weights.
    for start in range(0, len(hidden), SCORED_ROWS):
        likely = project(hidden[start : start + SCORED_ROWS]).float().log_softmax(dim=-1)
        logprobs += likely.gather(1, targets[start : start + SCORED_ROWS, None])[:, 0].tolist()
        best = likely.topk(min(prompt.num_top, likely.shape[-1]))
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        top += [tuple(zip(ids, values, strict=True)) for ids, values in pairs]
    return PromptScores(first_index=prompt.first_index, logprobs=tuple(logprobs), top=tuple(top))
