import pytest

from placement.serving.sequence import Phase, Sequence


def make(**fields: int) -> Sequence:
    """A sequence that runs."""
    defaults = {"sequence_id": 1, "num_prompt_tokens": 3, "max_tokens": 8, "arrival": 0}
    return Sequence(**{**defaults, **fields}, phase=Phase.RUNNING)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("output", "computed", "is_decode"),
    [
        (0, 0, False),  # new
        (0, 2, False),  # the prompt's last token is still the prompt
        (0, 3, False),  # its sampled token has not arrived
        (1, 3, True),
        (1, 4, False),
        (4, 6, True),
        (4, 0, False),  # preempted: a prefill again
        (4, 5, False),  # a recomputation that is not through
    ],
)
def test_decode_has_exactly_its_newest_generated_token_uncomputed(output: int, computed: int, is_decode: bool) -> None:
    assert make(num_output_tokens=output, num_computed_tokens=computed).is_decode is is_decode


def test_one_token_prompt_is_a_prefill_also_after_a_preemption() -> None:
    assert not make(num_prompt_tokens=1).is_decode
    assert not make(num_prompt_tokens=1, num_output_tokens=1).is_decode


def test_rank_orders_by_priority_then_arrival() -> None:
    late, early, urgent = make(arrival=2), make(arrival=1), make(arrival=3, priority=5)
    assert sorted([late, early, urgent], key=lambda sequence: sequence.rank) == [urgent, early, late]


def test_counts_cover_prompt_and_answer() -> None:
    sequence = make(num_output_tokens=2, num_computed_tokens=1)
    assert (sequence.num_tokens, sequence.num_uncomputed_tokens) == (5, 4)
