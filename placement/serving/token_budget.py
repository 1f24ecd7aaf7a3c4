"""Chooses the token budget of a step from measured times."""

from collections.abc import Sequence


# No caller yet: the cost model chooses serving.token_budget by the objective's time between tokens with it.
def choose_token_budget(profile: Sequence[tuple[int, float]], objective_s: float, tile: int) -> int:
    """Chooses the largest token budget that meets a time-between-tokens objective (Sarathi-Serve, 4.3).

    It chooses measured sizes alone, nothing between or beyond them, and only multiples of ``tile``: one token over a
    tile costs as much as a whole one (257 tokens cost 32 % more than 256 in the paper).

    Args:
        profile: measured (tokens in the step, seconds).
        objective_s: the longest that a step may take.
        tile: tokens that the matrix kernels compute at once.

    Returns:
        the largest budget that meets the objective; where none does, ``tile``: decodes then exceed the objective, but
        no smaller budget would make the step much shorter.
    """
    assert tile >= 1, tile
    return max(
        (tokens for tokens, step_s in profile if tokens % tile == 0 and tokens and step_s <= objective_s),
        default=tile,
    )
