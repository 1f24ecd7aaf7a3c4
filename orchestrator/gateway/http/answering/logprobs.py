"""Writes log-probabilities in the two forms of the OpenAI API. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.gateway.client import TokenScore
from orchestrator.gateway.http.answering.token_texts import Offsets, TokenTexts

_LEAST = -9999.0  # stands for an impossible token's, as JSON has no infinity


def _number(logprob: float) -> float:
    return max(logprob, _LEAST)


def chat_logprobs(
    token_ids: Sequence[int], scores: Mapping[int, TokenScore], *, num_top: int, texts: TokenTexts
) -> list[dict[str, Any]]:
    """Returns an entry for each token that was scored, with as many alternatives as were asked for."""
    entries = []
    for position, token_id in enumerate(token_ids):
        score = scores.get(position)
        if score is not None:
            top = [_chat_entry(other, logprob, texts) for other, logprob in score.top[:num_top]]
            entries.append({**_chat_entry(token_id, score.logprob, texts), "top_logprobs": top})
    return entries


def _chat_entry(token_id: int, logprob: float, texts: TokenTexts) -> dict[str, Any]:
    text = texts.text_of(token_id)
    data = texts.bytes_of(token_id) or text.encode()
    return {"token": text, "logprob": _number(logprob), "bytes": list(data)}


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionLogprobs:
    """Writes the log-probabilities of one choice, piece by piece.

    Attributes:
        num_top: how many alternatives were asked for; with none there is no table of them.
        as_ids: whether tokens are named by their ids, such as ``token_id:17``.
    """

    texts: TokenTexts
    offsets: Offsets
    num_top: int
    as_ids: bool = False

    def take(self, token_ids: Sequence[int], scores: Mapping[int, TokenScore]) -> dict[str, Any]:
        """Returns the four lists for the next tokens. A token without a score, as the first of a prompt, has null."""
        return {
            "tokens": [self._name(token_id) for token_id in token_ids],
            "token_logprobs": [
                _number(scores[position].logprob) if position in scores else None for position in range(len(token_ids))
            ],
            "top_logprobs": [self._top(token_id, scores.get(place)) for place, token_id in enumerate(token_ids)]
            if self.num_top
            else None,
            "text_offset": self.offsets.of(token_ids),
        }

    def _top(self, token_id: int, score: TokenScore | None) -> dict[str, float] | None:
        """Returns the likeliest tokens, and the chosen one where it is none of them. Of two alike the first counts."""
        if score is None:
            return None
        found: dict[str, float] = {}
        for other, logprob in (*score.top[: self.num_top], (token_id, score.logprob)):
            found.setdefault(self._name(other), _number(logprob))
        return found

    def _name(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self.as_ids else self.texts.text_of(token_id)


def join_logprobs(pieces: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the lists of all pieces as one of each kind."""
    joined: dict[str, Any] = {}
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        lists = [piece[name] for piece in pieces]
        joined[name] = None if None in lists else [item for each in lists for item in each]
    return joined
