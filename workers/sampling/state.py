"""Holds what sampling needs to know of a sequence, and defines its results."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from placement.errors import FieldError


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """The parameters by which a sequence's tokens are chosen.

    Attributes:
        temperature: the divisor of the logits; 0 takes the most likely token.
        top_k: keeps the k most likely tokens; 0 keeps all. Of equally likely ones, lower ids come first.
        top_p: keeps the fewest of those that hold this much probability, the most likely first; 1 keeps all.
        min_p: keeps tokens that are at least this many times as likely as the most likely one; 0 keeps all.
        repetition_penalty: divides positive and multiplies negative logits of tokens in the prompt or the answer
            (Keskar et al. 2019, CTRL).
        presence_penalty: is subtracted once from the logits of tokens in the answer.
        frequency_penalty: is subtracted from the logits of tokens in the answer once for each time they occur.
        bias: token ids, each once, and the number to add to their logits; ids outside the vocabulary are never drawn.
        seed: the seed of the draws, 64 bits.
        logprobs: the number of most likely tokens to report beside the chosen one; None reports nothing.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0
    logprobs: int | None = None

    def __post_init__(self) -> None:
        assert 0 <= self.temperature < math.inf and self.top_k >= 0, self
        assert 0 < self.top_p <= 1 and 0 <= self.min_p <= 1, self
        assert 0 < self.repetition_penalty < math.inf, self
        assert math.isfinite(self.presence_penalty) and math.isfinite(self.frequency_penalty), self
        assert all(token_id >= 0 and math.isfinite(bias) for token_id, bias in self.bias), self
        assert len({token_id for token_id, _ in self.bias}) == len(self.bias), self
        assert self.logprobs is None or self.logprobs >= 0, self


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledToken:
    """A chosen token.

    Attributes:
        token_id: the id of the token.
        logprob: its log-softmax over the raw logits; None where nobody asked for it.
        top: the most likely tokens and their log-probabilities, best first; of equally likely ones, lower ids come
            first.
    """

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class SamplingFailed(FieldError):
    """One sequence has no next token: its logits are damaged, or nothing is allowed. Its batch goes on.

    Attributes:
        grammar_problem: what is wrong with the sequence's mask, where that and not the model is at fault.
    """

    def __init__(self, *, row: int, value: object, problem: str, fix: str, grammar_problem: str | None = None) -> None:
        self.row = row
        self.grammar_problem = grammar_problem
        super().__init__(field=f"logits[{row}]", value=value, problem=problem, fix=fix)


class TokenMask(Protocol):
    """Says which tokens may come next in a sequence, as a grammar does. Each sequence has its own object.

    ``fill`` and ``accept`` may raise HeterodyneError: that sequence then fails, and the others of its batch do not.
    """

    @property
    def done(self) -> bool:
        """Tells whether the answer is complete, so that nothing but its end may come."""

    def fill(self, row: Tensor) -> bool:
        """Writes which tokens are allowed into ``row``, int32 [ceil(V / 32)] on the CPU, which is zero before.

        Bit i of word w is token 32 * w + i. Returns False, and may write nothing, where every token is allowed.
        """

    def accept(self, token_id: int) -> None:
        """Moves on by this token."""


class TokenCounts:
    """The distinct tokens of a sequence, and how often each is in its answer."""

    def __init__(self, prompt_ids: Iterable[int]) -> None:
        self._slots = {token_id: slot for slot, token_id in enumerate(dict.fromkeys(prompt_ids))}
        self._ids = np.fromiter(self._slots, dtype=np.int64, count=len(self._slots))
        self._counts = np.zeros(len(self._slots), dtype=np.float32)

    def append(self, token_id: int) -> None:
        """Counts one more ``token_id`` in the answer."""
        slot = self._slots.setdefault(token_id, len(self._slots))
        if slot == len(self._ids):  # doubled, so that appending costs the same however long the answer is
            self._ids = np.concatenate((self._ids, np.zeros(slot + 64, dtype=np.int64)))
            self._counts = np.concatenate((self._counts, np.zeros(slot + 64, dtype=np.float32)))
        self._ids[slot] = token_id
        self._counts[slot] += 1

    def arrays(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Returns the ids, each once, and their counts, as views that are valid until the next append."""
        return self._ids[: len(self._slots)], self._counts[: len(self._slots)]


class SamplerState:
    """The state that decides a sequence's next token beside its logits. The thread that samples owns it.

    Args:
        params: the parameters by which tokens are chosen.
        prompt_ids: the prompt, which counts only under a repetition penalty.
        stop_token_ids: tokens that are not drawn before ``min_tokens`` tokens.
        min_tokens: the least number of tokens in the answer.
        emitted_ids: the answer so far, where a sequence that was begun elsewhere goes on.
        grammar: a new mask, to which the emitted ids are given first.

    Attributes:
        num_tokens: tokens in the answer. Together with the seed, it decides the draw.
        last_token_id: the newest token of the answer; None before the first.
        counts: the counts that penalties need; None where there are none.
    """

    __slots__ = ("counts", "grammar", "last_token_id", "min_tokens", "num_tokens", "params", "stop_token_ids")

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Iterable[int],
        *,
        stop_token_ids: frozenset[int] = frozenset(),
        min_tokens: int = 0,
        emitted_ids: Iterable[int] = (),
        grammar: TokenMask | None = None,
    ) -> None:
        self.params = params
        self.stop_token_ids = stop_token_ids
        self.min_tokens = min_tokens
        self.grammar = grammar
        self.num_tokens = 0
        self.last_token_id: int | None = None
        self.counts: TokenCounts | None = None
        if params.repetition_penalty != 1:
            self.counts = TokenCounts(prompt_ids)
        elif params.presence_penalty or params.frequency_penalty:
            self.counts = TokenCounts(())
        for token_id in emitted_ids:
            self.append(token_id)

    @property
    def is_adjusted(self) -> bool:
        """Tells whether anything but the raw logits decides the next token."""
        return bool(self.params.bias) or self.is_too_short or self.grammar is not None or self.counts is not None

    @property
    def is_too_short(self) -> bool:
        """Tells whether the answer is too short to stop."""
        return self.num_tokens < self.min_tokens and bool(self.stop_token_ids)

    def append(self, token_id: int) -> None:
        """Appends a token to the answer. Raises what the grammar raises; the state is then unchanged."""
        if self.grammar is not None:
            self.grammar.accept(token_id)
        if self.counts is not None:
            self.counts.append(token_id)
        self.num_tokens += 1
        self.last_token_id = token_id
