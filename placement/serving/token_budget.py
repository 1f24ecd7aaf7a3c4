"""Chooses the token budget of a step from measured times."""

from collections.abc import Sequence
from dataclasses import dataclass

from placement.measured.step_times import StepTimes
from placement.planning.limits import ReplicaLimits

_LEAST_PROMPT_TOKENS = 16
"""The tokens of a prompt that a step has room for beside a decode of every sequence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepBudget:
    """The token budget of a replica, and what led to it.

    Attributes:
        token_budget: the most tokens of a step.
        is_auto: whether it was chosen by ``times``; else it was set.
        expected_s: seconds that a step of as many tokens is expected to take; 0 where nothing was measured.
        times: the steps that were measured.
    """

    token_budget: int
    is_auto: bool
    expected_s: float
    times: StepTimes


def budget_of(limits: ReplicaLimits, times: StepTimes) -> StepBudget:
    """Returns the token budget that a replica serves with: the one that is set, or the one that the times suggest.

    The latter is never above the budget of ``limits``, for which memory was planned, and mostly some tokens above the
    most sequences: with fewer, decodes or a prompt beside them could stall.
    """
    budget, step_time_s = limits.token_budget, limits.step_time_s
    if step_time_s is not None and times.steps:
        profile = [(step.num_tokens, step.duration_s) for step in times.steps if step.num_tokens <= budget]
        budget = choose_token_budget(profile, step_time_s, least=_least_tokens(limits))
    return StepBudget(
        token_budget=budget,
        is_auto=step_time_s is not None,
        expected_s=times.expected_s(budget),
        times=times,
    )


def _least_tokens(limits: ReplicaLimits) -> int:
    """Returns the fewest tokens of a step, in which prompts go on while all sequences decode."""
    return min(limits.token_budget, limits.max_num_seqs + _LEAST_PROMPT_TOKENS)


def choose_token_budget(
    profile: Sequence[tuple[int, float]], objective_s: float, tile: int = 1, *, least: int = 1
) -> int:
    """Chooses the largest token budget that meets a time-between-tokens objective (Sarathi-Serve, 4.3).

    It chooses measured sizes alone, nothing between or beyond them, and only multiples of ``tile``: one token over a
    tile costs as much as a whole one (257 tokens cost 32 % more than 256 in the paper).

    Args:
        profile: measured (tokens in the step, seconds).
        objective_s: the longest that a step may take.
        tile: tokens that the matrix kernels compute at once.
        least: the fewest tokens that the budget must have, whatever they take.

    Returns:
        the largest budget that meets the objective; where none does, ``tile``: decodes then exceed the objective, but
        no smaller budget would make the step much shorter. It is ``least`` where that is more.
    """
    assert tile >= 1, tile
    chosen = max(
        (tokens for tokens, step_s in profile if tokens % tile == 0 and tokens and step_s <= objective_s),
        default=tile,
    )
    return max(chosen, least)
