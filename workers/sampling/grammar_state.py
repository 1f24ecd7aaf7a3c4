"""Follows answers through their grammars, and finds the tokens that may come next.

Shapes: V token ids, with those that pad the vocabulary; W = ceil(V / 32) words of a mask; N sequences.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from llguidance import LLExecutor, LLMatcher
from torch import Tensor

from placement.errors import HeterodyneError
from placement.serving.grammar import GrammarKind

_MAX_PROBLEM = 200


class GrammarFailed(HeterodyneError):
    """An answer cannot go on as its grammar requires. Only its own sequence ends."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GrammarSpec:
    """The source of a grammar, which an answer must match from its first to its last character.

    Attributes:
        kind: the language of the source.
        source: a JSON Schema as JSON text, a regular expression (Rust's syntax), or a grammar in llguidance's Lark.
    """

    kind: GrammarKind
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Grammar:
    """A compiled grammar. Any number of sequences start from it, on any thread.

    Attributes:
        origin: a matcher at the beginning of the grammar, which is copied and never moved.
        executor: fills the masks of several sequences at once, on a thread of its own.
        eos_token_ids: the model's end-of-sequence ids.
    """

    origin: LLMatcher
    executor: LLExecutor
    eos_token_ids: frozenset[int]

    def start(self) -> "GrammarState":
        """Makes a sequence's state at the beginning. It takes about 1 us."""
        return GrammarState(self)


class GrammarState:
    """The state of one answer in its grammar. One thread at a time may use it.

    Where the grammar may end, the model's end-of-sequence ids are allowed beside other tokens; where it must end, they
    alone are. So the grammar decides about the end, and the request's stop ids do not: the sequence ends when this is
    ``done``, with or without such an id, whether the request ignores them or not.
    """

    __slots__ = ("_grammar", "_matcher", "_ready")

    def __init__(self, grammar: Grammar) -> None:
        self._grammar = grammar
        self._matcher = grammar.origin.deep_copy()
        self._ready: Tensor | GrammarFailed | None = None  # the mask of the next token, or why there is none

    @property
    def done(self) -> bool:
        """Tells whether only the end is left: the answer matches, and nothing can be added."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def fill(self, row: Tensor) -> bool:
        """Writes which tokens may come next into ``row``, int32 [W] on the CPU; bit i of word w is token 32 w + i.

        It releases the interpreter's lock meanwhile.

        Returns:
            True, since some tokens, the special ones, are never allowed.

        Raises:
            GrammarFailed: nothing can follow, or the search takes more than llguidance's limits of a step.
        """
        _check_rows(row)
        ready, self._ready = self._ready, None
        if isinstance(ready, GrammarFailed):
            raise ready
        if ready is not None:
            row.copy_(ready)
            return True
        self._matcher.unsafe_compute_mask_ptr(row.data_ptr(), row.numel() * row.element_size())
        if self._matcher.is_error():
            raise self._failure()
        return True

    def accept(self, token_id: int) -> None:
        """Moves on by a token. Once it is ``done``, end-of-sequence ids change nothing.

        Raises:
            GrammarFailed: the token does not follow the grammar.
        """
        self._ready = None
        if self.done and token_id in self._grammar.eos_token_ids:
            return
        if not self._matcher.consume_token(token_id):
            raise self._failure()

    def _failure(self) -> GrammarFailed:
        return GrammarFailed(f"the answer cannot follow its grammar: {problem_of(self._matcher.get_error())}")


def fill_all(states: Sequence[GrammarState], rows: Tensor) -> dict[int, GrammarFailed]:
    """Fills the masks of a step at once, without the interpreter's lock.

    Args:
        states: N states, at least one, all of grammars of one factory.
        rows: int32 [N, W], contiguous, on the CPU.

    Returns:
        The failures of states without a mask, by row. Such a row holds the end-of-sequence ids.
    """
    _check_rows(rows)
    assert rows.dim() == 2 and len(rows) == len(states) >= 1, (rows.shape, len(states))
    states[0]._grammar.executor.unsafe_compute_mask_ptr(
        [(state._matcher, row) for row, state in enumerate(states)],
        rows.data_ptr(),
        rows.shape[1] * rows.element_size(),
        len(rows),
    )
    return {row: state._failure() for row, state in enumerate(states) if state._matcher.is_error()}


def prefetch(states: Sequence[GrammarState], vocab_size: int) -> None:
    """Finds the masks of the states' next tokens ahead of time, as :func:`fill_all` does; ``fill`` then copies them."""
    rows = torch.zeros(len(states), -(-vocab_size // 32), dtype=torch.int32)
    failures = fill_all(states, rows)
    for index, state in enumerate(states):
        state._ready = failures.get(index, rows[index])


def problem_of(error: str) -> str:
    """Shortens llguidance's error to a clause, with nothing of the answer in it."""
    lines = error.strip().splitlines() or ["unknown"]
    if lines[0].startswith("NoExtension"):
        return "no token can follow"
    if "doesn't satisfy the grammar" in lines[0]:  # it goes on to name the token
        return "a token does not fit"
    # A regular expression's error ends in the reason; a grammar's begins with it.
    reason = next((line for line in lines if line.startswith("error: ")), lines[0])
    return reason.removeprefix("error: ")[:_MAX_PROBLEM]


def _check_rows(rows: Tensor) -> None:
    """Checks the rows, since the library writes to the address that it is given, whatever is there."""
    assert rows.dtype == torch.int32 and rows.is_contiguous() and rows.device.type == "cpu", rows
