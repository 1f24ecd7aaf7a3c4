"""Scores a prompt: it computes the log-probability of each of its tokens, given those before it.

Shapes: N prompt tokens, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from placement.planning.memory import SCORED_ROWS
from workers.sampling.logprobs import token_logprobs
from workers.sampling.state import SampledToken


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredPrompt:
    """A run of prompt tokens to be scored.

    Attributes:
        first_index: the position in the prompt of the first token of the run. It is at least 1, since no token comes
            before the prompt's first.
        token_ids: the tokens.
        num_top: the number of most likely tokens to report for each position.
    """

    first_index: int
    token_ids: Sequence[int]
    num_top: int

    def __post_init__(self) -> None:
        assert self.first_index >= 1 and self.token_ids and self.num_top >= 0, self


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptScores:
    """The log-probabilities of a run of prompt tokens.

    Attributes:
        first_index: the position in the prompt of the first token.
        logprobs: the log-probability of each token.
        top: the most likely tokens at each position and their log-probabilities, best first.
    """

    first_index: int
    logprobs: tuple[float, ...]
    top: tuple[tuple[tuple[int, float], ...], ...]


def score(hidden: Tensor, project: Callable[[Tensor], Tensor | None], prompt: ScoredPrompt) -> PromptScores:
    """Scores a run of tokens.

    Args:
        hidden: the last layer's output [N, E] at the position before each of the tokens.
        project: a function from hidden states [rows, E] to logits [rows, V]. It returns None at a rank that follows,
            where nothing is scored.
        prompt: the N tokens.
    """
    assert len(prompt.token_ids) == len(hidden), prompt
    tokens: list[SampledToken] = []
    # A few rows at a time, since the logits of all positions of a long prompt would take more memory than the weights.
    for start in range(0, len(hidden), SCORED_ROWS):
        token_ids = prompt.token_ids[start : start + SCORED_ROWS]
        logits = project(hidden[start : start + SCORED_ROWS])
        if logits is None:
            continue
        num_top = min(prompt.num_top, logits.shape[-1])
        tokens += token_logprobs(logits, range(len(token_ids)), token_ids, [num_top] * len(token_ids))
    return PromptScores(
        first_index=prompt.first_index,
        logprobs=tuple(token.logprob for token in tokens if token.logprob is not None),
        top=tuple(token.top for token in tokens),
    )
